"""Loads and saves BERT and RoBERTa in the layout of Hugging Face.

    loaded = encoder_checkpoint.load(path, head="classify", labels=3)
    loaded.config, loaded.params, loaded.tokenizer, loaded.notes
    encoder_checkpoint.save(loaded, out)    # a folder that transformers loads

A folder holds config.json, safetensors (one file or several) and a tokenizer.
`hub:NAME` is a repository of the hub, whose files are downloaded.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from train.common import atomic_files, inputs
from train.common.fields import Fields
from train.models.encoder_config import Config, Head
from train.pretrained import (
  checkpoint_folder,
  encoder_names,
  encoder_tokenizer,
  mapping,
)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A pretrained encoder, ready to be fine-tuned."""

  config: Config
  params: dict  # nested dicts of arrays on the host
  tokenizer: encoder_tokenizer.Tokenizer
  notes: tuple[str, ...]  # sentences: what is initialized, what is not read
  # Other fields of config.json: names of labels, ids of special tokens.
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
    head: the head on top of the encoder. If the checkpoint has none that fits,
      it is initialized, and `notes` says so.
    labels: outputs of a classification head; 1: regression.
    seed: of a head that is initialized.
    names: of the classes, in the order of the task. A head for the same
      classes in another order is reordered; a head for other classes is
      initialized.
    **changes: other fields of `Config` (`dtype`, `remat`, `dropout`, ...).

  Raises:
    UserError: there is no checkpoint, it is of another architecture, or its
      files do not belong together. Nothing is allocated then.
  """
  folder = checkpoint_folder.fetch(str(path))
  source = folder / checkpoint_folder.CONFIG
  given = inputs.read_object(source)
  config = encoder_names.config_from_hf(
    given, str(source), head, labels, **changes
  )
  tokenizer = encoder_tokenizer.load(folder, config)
  shapes, read = checkpoint_folder.open_tensors(folder)
  theirs = _class_names(Fields(str(source), given))
  ours = [name.lower() for name in names]
  # Class names that are numbers are positions: their order does not change.
  named = bool(theirs) and bool(ours) and not all(map(_is_number, ours))
  same = sorted(theirs) == sorted(ours)
  refused = {}
  if named and not same:
    refused["head"] = f"classes of other names, {mapping.some(theirs)}"
  params, notes = encoder_names.to_params(
    str(folder), config, shapes, read, seed, refused
  )
  if named and same:
    permutation = [theirs.index(name) for name in ours]
    params["head"] = {k: x[..., permutation] for k, x in params["head"].items()}
  extra = {name: v for name, v in given.items() if name.endswith("_token_id")}
  return Loaded(config, params, tokenizer, notes, extra)


def _class_names(fields: Fields) -> list[str]:
  """The names of a checkpoint's classes, in order; [] if it has no names."""
  labels = fields.group("id2label").values
  names = [str(labels.get(str(i), "")).lower() for i in range(len(labels))]
  return [] if all(map(_is_number, names)) else names


def _is_number(name: str) -> bool:
  return re.fullmatch(r"(label_)?-?\d*", name) is not None


def save(
  loaded: Loaded, out: pathlib.Path, extra: Mapping[str, Any] | None = None
) -> None:
  """Writes a checkpoint folder that `transformers` and `load` read.

  Args:
    loaded: config, parameters and tokenizer.
    out: a new or empty folder.
    extra: other fields of config.json, such as `id2label`.

  Raises:
    UserError: the folder is not empty or cannot be written.
  """
  config = encoder_names.config_to_hf(
    loaded.config, {**loaded.extra, **(extra or {})}
  )
  files = {
    checkpoint_folder.CONFIG: config,
    checkpoint_folder.TOKENIZER_CONFIG: checkpoint_folder.tokenizer_config(
      loaded.config.max_length, **loaded.tokenizer.special_tokens()
    ),
  }
  with atomic_files.new_folder(out, "the output folder"):
    tensors = encoder_names.to_tensors(loaded.config, loaded.params)
    checkpoint_folder.write(out, tensors, files, loaded.tokenizer.text)
