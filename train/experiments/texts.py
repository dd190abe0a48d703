"""Real text in three parts: trained on, selected on, reported on.

One document in twenty is reported on, one in twenty of the others decides
about learning rates. The parts have no document in common, so that all runs
train on the same rows, whichever part they are evaluated on.
"""

import hashlib
import json
import pathlib
from typing import NamedTuple, cast

import datasets

from train.common import atomic_files
from train.common.errors import UserError
from train.config.schema import DataConfig
from train.data import holdout, sources
from train.finetuning import packaged_datasets

TEXTS = {
  "speeches": "the bundled State of the Union speeches",
  "reviews": "film reviews (IMDB), from the extra `experiments`",
}


class Parts(NamedTuple):
  """The files of a text."""

  train: pathlib.Path
  validation: pathlib.Path
  test: pathlib.Path


def prepare(name: str, cache: pathlib.Path) -> Parts:
  """Writes the parts of a text, once.

  Args:
    name: one of `TEXTS`, or a file as `data.path` takes it.
    cache: the folder that keeps them.

  Raises:
    UserError: the text is not there, or too short.
  """
  documents = _documents(name, cache)
  texts = list(documents["text"])
  digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=6)
  folder = cache / "experiments" / digest.hexdigest()
  parts = Parts(*(folder / f"{part}.jsonl" for part in Parts._fields))
  # The last one is written last.
  if not parts.test.exists():
    for path, part in zip(parts, _split(documents, name), strict=True):
      lines = (json.dumps({"text": text}) for text in part["text"])
      atomic_files.write_text(path, "\n".join(lines) + "\n")
  return parts


def _documents(name: str, cache: pathlib.Path) -> datasets.Dataset:
  if name == "reviews":
    splits = packaged_datasets.load("imdb")
    both = [splits["train"], splits["validation"]]
    whole = datasets.concatenate_datasets(both).select_columns(["text"])
    return cast(datasets.Dataset, whole)
  if name not in TEXTS and not pathlib.Path(name).exists():
    raise UserError(
      f"--text {name} is neither a file nor one of {', '.join(TEXTS)}"
    )
  path = "" if name == "speeches" else name
  source = sources.load(DataConfig(path=path, stream="false"), cache)
  return cast(datasets.Dataset, source.train)


def _split(documents: datasets.Dataset, name: str) -> list[datasets.Dataset]:
  every = DataConfig().holdout_every
  rest, test = holdout.split(documents, every)
  rest = holdout.without(rest, test["text"], name)
  rest, validation = holdout.split(rest, every)
  rest = holdout.without(rest, validation["text"], name)
  return [rest, validation, test]
