"""The folder of a run: its config, and the check that it is the right one.

`config.json` holds the config, `text.json` identifies the training text,
`checkpoints/` holds the newest and best states, `metrics.jsonl` the metrics.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import filelock

from train.common import atomic_files, inputs, links
from train.common.errors import UserError
from train.common.fields import Fields
from train.config import schema
from train.data.corpus import Corpus

CONFIG = "config.json"
TEXT = "text.json"
FOLDER = "checkpoints"
LOCK = ".lock"


def check_folder(
  out: pathlib.Path, config: schema.SharedConfig, overwrite: bool
) -> None:
  """Raises unless a run may use a folder; writes nothing.

  Args:
    out: the folder: new, empty, or of an earlier run with the same config.
    config: the run's config.
    overwrite: an earlier run there may differ, because it will be deleted.

  Raises:
    UserError: the folder holds something else, or a run that differs.
  """
  saved = out / CONFIG
  if out.exists() and not out.is_dir():
    raise UserError(f"--out {out} is a file; name a folder")
  if saved.exists():
    if not overwrite:
      _compare(out, _read(saved), config)
  elif out.exists() and any(path.name != LOCK for path in out.iterdir()):
    raise UserError(
      f"--out {out} is not empty and holds no {CONFIG} of a run; name an"
      " empty or new folder"
    )


# Options whose defaults in a preset differ from those of version 0.1.
CHANGED = ("optimizer.residual", "optimizer.scale")
# It was empty by default before bfloat16 weights had bfloat16 moments.
STATE_DTYPE = "optimizer.state_dtype"


def goes_on_as_begun(
  out: pathlib.Path, config: schema.AnyConfig, settings: Sequence[str]
) -> schema.AnyConfig:
  """The config with the defaults of the version that began the run.

  Args:
    out: the run's folder.
    config: the config with today's defaults.
    settings: the `--set` flags, which stay as they are.
  """
  saved = out / CONFIG
  if not saved.exists():
    return config
  begun = _read(saved)
  given = {setting.partition("=")[0] for setting in settings}
  old = _defaults(config) | begun
  now = schema.flatten(config)
  names = () if CHANGED[0] in begun else CHANGED
  changes = [
    f"{name}={old[name]}"
    for name in names
    if name not in given and old[name] != now.get(name)
  ]
  if changes:
    print(
      f"note: {out} was begun by version 0.1, and goes on with its"
      f" {', '.join(changes)}"
    )
  if STATE_DTYPE not in given and not old[STATE_DTYPE]:
    changes.append(f"{STATE_DTYPE}=")
    if now["model.param_dtype"] != "float32":
      print(f"note: {out} was begun with float32 moments, and goes on so")
  return schema.override(config, changes)


@contextlib.contextmanager
def held(out: pathlib.Path) -> Iterator[None]:
  """Keeps a folder for this process, which writes into it.

  Raises:
    UserError: another process holds it.
  """
  atomic_files.make_folder(out, "--out")
  if (out / LOCK).is_symlink():
    (out / LOCK).unlink()  # locking would empty the file that it leads to
  lock = filelock.FileLock(out / LOCK)
  try:
    lock.acquire(blocking=False)
  except filelock.Timeout:
    raise UserError(
      f"another process is training in --out {out}; wait for it, or name"
      " another --out"
    ) from None
  except (NotImplementedError, OSError) as error:
    print(
      f"note: {out} cannot be locked ({error}); start no second run there"
      " while this one is training"
    )
  try:
    yield
  finally:
    lock.release()


def write_config(
  out: pathlib.Path, config: schema.SharedConfig, overwrite: bool
) -> None:
  """Writes the config into a folder that has passed `check_folder`."""
  atomic_files.make_folder(out, "--out")
  if overwrite:
    _delete_run(out)
  text = json.dumps(schema.flatten(config), indent=2)
  atomic_files.write_text(out / CONFIG, text + "\n")


def record_text(out: pathlib.Path, corpus: Corpus) -> None:
  """Writes the tokenizer and what identifies the training text.

  Raises:
    UserError: the run in this folder was trained on another text.
  """
  end = corpus.tokenizer.id_to_token(corpus.encoder.end)
  _record_data(
    out,
    {"digest": corpus.digest, "end_token": end},
    "on other text or with another tokenizer: what data.path or"
    " data.tokenizer name has changed since",
  )
  atomic_files.write_text(out / "tokenizer.json", corpus.tokenizer.to_str())


def record_examples(out: pathlib.Path, digest: str) -> None:
  """Writes what identifies the examples of a fine-tuning run.

  Raises:
    UserError: the run in this folder was trained on other examples.
  """
  _record_data(
    out,
    {"digest": digest},
    "on other examples: what data.path or data.validation name has changed"
    " since",
  )


def examples_digest(out: pathlib.Path) -> str:
  """The digest that `record_examples` has written."""
  return Fields(str(out / TEXT), _read(out / TEXT)).text("digest")


def _record_data(
  out: pathlib.Path, identity: dict[str, Any], other: str
) -> None:
  """Writes what identifies the data, unless other data was recorded."""
  path = out / TEXT
  if path.exists() and _read(path) != identity:
    raise UserError(
      f"--out {out} belongs to a run {other}. Restore them, use another --out,"
      " or --overwrite to delete the run"
    )
  atomic_files.write_text(path, json.dumps(identity, indent=2) + "\n")


def _delete_run(out: pathlib.Path) -> None:
  """Removes what a run writes, and no other files of the folder."""
  for name in (FOLDER, *OWN_FOLDERS):
    path = out / name
    links.remove_folder(path)
    if path.exists():
      raise UserError(
        f"--overwrite cannot delete {path}; delete it, or name another --out"
      )
  for name in OWN_FILES:
    (out / name).unlink(missing_ok=True)


# Everything that a run leaves in its folder besides the checkpoints.
OWN_FILES = (
  CONFIG,
  TEXT,
  "metrics.jsonl",
  "tokenizer.json",
  "run.png",
  "sample.txt",
  "result.json",
)
OWN_FOLDERS = ("tensorboard", "wandb", "model")


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    return inputs.read_object(links.inside(path.parent, path.name))
  except UserError as error:
    raise UserError(f"{error}; --overwrite starts the run again") from None


def _shown(fields: dict[str, Any], name: str) -> Any:
  """A value as error messages show it."""
  value = fields.get(name, "absent")
  return '""' if value == "" else value


def _without_foreign(
  saved: dict[str, Any], new: dict[str, Any]
) -> dict[str, Any]:
  """Drops fields that version 0.1 wrote for fine-tuning runs as well.

  They are those of pre-training, which had to stay at their defaults, and the
  model's sizes, which the checkpoint decided.
  """
  defaults = schema.flatten(schema.Config(preset=""))
  return {
    name: value
    for name, value in saved.items()
    if name in new
    or (value != defaults.get(name) and not name.startswith("model."))
  }


def _defaults(config: schema.AnyConfig) -> dict[str, Any]:
  """What runs that are older than a field had in its place."""
  return schema.flatten(type(config)(preset="")) | {STATE_DTYPE: ""}


def _compare(
  out: pathlib.Path, saved: dict[str, Any], config: schema.SharedConfig
) -> None:
  defaults = _defaults(config)
  new = schema.fixed_fields(schema.flatten(config))
  old = schema.fixed_fields(defaults | _without_foreign(saved, new))
  names = [n for n in {**old, **new} if old.get(n) != new.get(n)]
  if names:
    changes = "; ".join(
      f"{n}: {_shown(old, n)} there, {_shown(new, n)} now" for n in names
    )
    raise UserError(
      f"--out {out} belongs to another run. {changes}. Use another --out to"
      " keep both, or --overwrite to delete it"
    )
