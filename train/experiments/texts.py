"""Texts of the experiments, split into training, validation and test parts.

One document in twenty is in the test part, which is only reported on. One in
twenty of the others is in the validation part, which decides about learning
rates. No document is in two parts, and all runs train on the same rows.
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
  """Writes the parts of a text, unless they are there already.

  Args:
    name: One of `TEXTS`, or a file as for `data.path`.
    cache: The folder of cached files.

  Raises:
    UserError: The text does not exist or is too short.
  """
  documents = _documents(name, cache)
  texts = list(documents["text"])
  digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=6)
  folder = cache / "experiments" / digest.hexdigest()
  parts = Parts(*(folder / f"{part}.jsonl" for part in Parts._fields))
  # The test part is written last: if it is there, all of them are.
  if not parts.test.exists():
    for path, part in zip(parts, _split(documents, name), strict=True):
      lines = (json.dumps({"text": text}) for text in part["text"])
      atomic_files.write_text(path, "\n".join(lines) + "\n")
  return parts


def _documents(name: str, cache: pathlib.Path) -> datasets.Dataset:
  if name == "reviews":
    splits = packaged_datasets.load("imdb")
    both = [splits["train"], splits["validation"]]
    documents = datasets.concatenate_datasets(both).select_columns(["text"])
    return cast(datasets.Dataset, documents)
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
