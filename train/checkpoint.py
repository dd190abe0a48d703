"""Checkpoints with Orbax, and the config they belong to.

A run lives in one folder: `config.json` says what it is, `checkpoints/` holds
its newest states, `metrics.jsonl` its history. A checkpoint is written beside
its final name and renamed, so a run that is killed keeps the one before.
"""

import json
import pathlib
import shutil
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from train import config as configs
from train import files
from train.errors import UserError
from train.step import Placed, TrainState

CONFIG = "config.json"
FOLDER = "checkpoints"


def check_run(
  out: pathlib.Path, config: configs.Config, overwrite: bool
) -> None:
  """Refuses a folder that holds something else, before anything is written.

  Args:
    out: the folder: new, empty, or of an earlier run with the same config.
    config: the run's config.
    overwrite: an earlier run there may differ, it will be deleted.

  Raises:
    UserError: the folder holds something else, or a run that differs.
  """
  saved = out / CONFIG
  if out.exists() and not out.is_dir():
    raise UserError(f"--out {out} is a file; name a folder")
  if saved.exists():
    if not overwrite:
      _compare(out, _read(saved), config)
  elif out.exists() and any(out.iterdir()):
    raise UserError(
      f"--out {out} is not empty and holds no {CONFIG} of a run; name an"
      " empty or new folder"
    )


def claim_run(
  out: pathlib.Path, config: configs.Config, overwrite: bool
) -> None:
  """Writes the config into the run's folder, which `check_run` let pass."""
  files.make_folder(out, "--out")
  if overwrite:
    _delete_run(out)
  text = json.dumps(configs.flatten(config), indent=2)
  files.write_text(out / CONFIG, text + "\n")


def _delete_run(out: pathlib.Path) -> None:
  """Removes what a run writes, and nothing else that may lie there."""
  shutil.rmtree(out / FOLDER, ignore_errors=True)
  for name in OWN_FILES:
    (out / name).unlink(missing_ok=True)


# Everything that a run leaves in its folder, beside the checkpoints.
OWN_FILES = (
  CONFIG,
  "metrics.jsonl",
  "tokenizer.json",
  "run.png",
  "sample.txt",
)


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    saved = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(
      f"{path} cannot be read ({error}); --overwrite starts the run anew"
    ) from None
  return saved


def _compare(
  out: pathlib.Path, saved: dict[str, Any], config: configs.Config
) -> None:
  old = configs.fixed_fields(saved)
  new = configs.fixed_fields(configs.flatten(config))
  names = [n for n in {**old, **new} if old.get(n) != new.get(n)]
  if names:
    changes = "; ".join(
      f"{n}: {old.get(n, 'absent')} there, {new.get(n, 'absent')} now"
      for n in names
    )
    raise UserError(
      f"--out {out} belongs to another run. {changes}. Use another --out to"
      " keep both, or --overwrite to delete it"
    )


class Checkpoints:
  """Saves and restores training states in a run's folder."""

  def __init__(self, out: pathlib.Path, keep: int):
    self._folder = out.resolve() / FOLDER
    newest: Any = ocp.training.preservation_policies.LatestN(keep)
    self._orbax = ocp.training.Checkpointer(
      str(self._folder),
      preservation_policy=newest,
      cleanup_tmp_directories=True,
    )

  @property
  def latest(self) -> int | None:
    """Step of the newest whole checkpoint."""
    newest = self._orbax.latest
    return None if newest is None else newest.step

  def save(self, state: TrainState) -> None:
    """Copies the state and writes it in the background."""
    step = int(jax.device_get(state.step))
    if self.latest == step:
      return
    self._orbax.save_checkpointables_async(step, {"state": state}, force=True)

  def restore(self, placed: Placed) -> TrainState:
    """Reads the newest checkpoint onto the devices of `placed`.

    Raises:
      UserError: the checkpoint cannot be read as this state.
    """
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      placed.state,
      placed.shardings,
    )
    try:
      loaded = self._orbax.load_checkpointables(
        self.latest, {"state": abstract}
      )
    except Exception as error:
      reason = str(error).splitlines()[0]
      raise UserError(
        f"{self._folder / str(self.latest)} cannot be restored ({reason});"
        " delete that folder to fall back to the one before, or pass"
        " --overwrite to start anew"
      ) from error
    return loaded["state"]

  def close(self) -> None:
    """Waits for the writes under way."""
    self._orbax.close()
