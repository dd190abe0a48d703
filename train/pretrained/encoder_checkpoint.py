"""Encoders in and out of Hugging Face's layout: BERT and RoBERTa.

    found = hf_encoder.load(path, head="classify", labels=3)
    found.config, found.params, found.tokenizer, found.notes
    hf_encoder.save(found, out)       # a folder that transformers loads

A folder holds config.json, safetensors (one file or shards) and a tokenizer.
`hub:NAME` is a repository of the hub, of which these files are fetched.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import huggingface_hub as hub
import safetensors.numpy

from train.common import atomic_files
from train.common.errors import UserError
from train.config.schema import HUB
from train.data import sources
from train.models.encoder_config import Config, Head
from train.pretrained import checkpoint_folder, encoder_names, encoder_tokenizer

# What is fetched of a repository: not its weights in other formats.
FETCHED = (
  checkpoint_folder.CONFIG,
  checkpoint_folder.ONE,
  checkpoint_folder.INDEX,
  "model-*.safetensors",
  checkpoint_folder.TOKENIZER,
  *checkpoint_folder.SIDECARS,
  "vocab.txt",
  "vocab.json",
  "merges.txt",
)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """An encoder that somebody else has trained, ready to be fine-tuned."""

  config: Config
  params: dict  # nested dicts of arrays on the host
  tokenizer: encoder_tokenizer.Tokenizer
  notes: tuple[str, ...]  # sentences: what starts afresh, what was left out
  # Of config.json, what is not the shape: names of labels, ids of tokens.
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load(
  path: str | pathlib.Path,
  head: Head = "none",
  labels: int = 2,
  seed: int = 0,
  names: Sequence[str] = (),
  **changes: Any,
) -> Loaded:
  """Reads a checkpoint as an encoder with the head that a task needs.

  Args:
    path: a folder, or `hub:NAME`.
    head: what stands on the encoder. Where the checkpoint has none that fits
      it is initialised, which `notes` says.
    labels: outputs of a classification head; 1: regression.
    seed: of a head that is initialised.
    names: of the classes, in the order of the task. A head that tells the same
      apart in another order is turned round; one that tells others apart is
      initialised.
    **changes: other fields of `Config` (`dtype`, `remat`, `dropout`, ...).

  Raises:
    UserError: there is none, it is of another architecture, or its parts do
      not belong together. Nothing is allocated then.
  """
  folder = fetch(str(path))
  given = checkpoint_folder.read_json(folder / checkpoint_folder.CONFIG)
  config = encoder_names.config_from_hf(
    given, str(folder / checkpoint_folder.CONFIG), head, labels, **changes
  )
  tokenizer = encoder_tokenizer.load(folder, config)
  shapes, read = checkpoint_folder.open_tensors(folder)
  theirs, ours = _class_names(given), [name.lower() for name in names]
  # Where either side has numbers for names, they are places.
  named = bool(theirs) and bool(ours) and not all(map(_is_number, ours))
  same = sorted(theirs) == sorted(ours)
  refused = {}
  if named and not same:
    few = encoder_names.some(theirs)
    refused["head"] = f"classes of other names, {few}"
  params, notes = encoder_names.to_params(
    str(folder), config, shapes, read, seed, refused
  )
  if named and same:
    order = [theirs.index(name) for name in ours]
    params["head"] = {k: x[..., order] for k, x in params["head"].items()}
  extra = {name: v for name, v in given.items() if name.endswith("_token_id")}
  return Loaded(config, params, tokenizer, notes, extra)


def _class_names(given: Mapping[str, Any]) -> list[str]:
  """The classes that a checkpoint's head tells apart; none: it has no names."""
  found = given.get("id2label")
  if not isinstance(found, Mapping):
    return []
  names = [str(found.get(str(i), "")).lower() for i in range(len(found))]
  return [] if all(map(_is_number, names)) else names


def _is_number(name: str) -> bool:
  return re.fullmatch(r"(label_)?-?\d*", name) is not None


def fetch(path: str) -> pathlib.Path:
  """The folder of a checkpoint; of `hub:NAME` a copy is fetched.

  Raises:
    UserError: there is none.
  """
  if path.startswith(HUB):
    return _from_hub(path.removeprefix(HUB))
  folder = pathlib.Path(path).expanduser()
  if not folder.is_dir():
    raise UserError(
      f"{folder} is no folder; name one with {checkpoint_folder.CONFIG},"
      " safetensors and a"
      f" tokenizer, or {HUB}NAME"
    )
  return folder


def _from_hub(repository: str) -> pathlib.Path:
  name = f"{HUB}{repository}"
  try:
    return pathlib.Path(
      hub.snapshot_download(repository, allow_patterns=list(FETCHED))
    )
  except hub.errors.LocalEntryNotFoundError as error:
    raise UserError(sources.unreachable(name, error)) from error
  except hub.errors.GatedRepoError as error:
    raise UserError(
      f"{name} is gated: accept its terms on its page, then `hf auth login`"
    ) from error
  except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError) as error:
    raise UserError(
      f"{name} is not on the hub: {sources.first_line(error)}"
    ) from error


def save(
  loaded: Loaded, out: pathlib.Path, extra: Mapping[str, Any] | None = None
) -> None:
  """Writes a folder that `transformers` and `load` read.

  Args:
    loaded: config, parameters and tokenizer.
    out: a new or empty folder.
    extra: fields of config.json beside the shape, such as `id2label`.

  Raises:
    UserError: the folder is not empty or cannot be written.
  """
  if out.is_dir() and any(out.iterdir()):
    raise UserError(f"{out} is not empty; name a new folder")
  atomic_files.make_folder(out, "the model's folder")
  config = encoder_names.config_to_hf(
    loaded.config, {**loaded.extra, **(extra or {})}
  )
  described = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": loaded.config.max_length,
    **loaded.tokenizer.special_tokens(),
  }
  texts = {
    checkpoint_folder.CONFIG: json.dumps(config, indent=2) + "\n",
    "tokenizer_config.json": json.dumps(described, indent=2) + "\n",
    checkpoint_folder.TOKENIZER: loaded.tokenizer.text,
  }
  tensors = encoder_names.to_tensors(loaded.config, loaded.params)
  try:
    # "pt" is what transformers wants to be told, whoever wrote the file.
    safetensors.numpy.save_file(
      tensors, out / checkpoint_folder.ONE, {"format": "pt"}
    )
    for name, text in texts.items():
      atomic_files.write_text(out / name, text)
  except OSError as error:
    raise UserError(f"{out} cannot be written ({error})") from None
