"""Examples of a task: read from the hub, from files or from a package.

Columns and labels are looked at here, all of them, before anything else is
made: what is wrong is said with the file's own names.
"""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any, cast

import datasets

from train import sources
from train.config import HUB, DataConfig
from train.errors import UserError
from train.tuning import packaged
from train.tuning.tasks import PACKAGE, Task

HIDDEN = -1  # what the hub gives for labels that are kept secret


@dataclasses.dataclass(frozen=True)
class Span:
  """The right answers to a question: none where there is none in the text."""

  texts: tuple[str, ...]
  starts: tuple[int, ...]  # of each in the context, in characters


@dataclasses.dataclass(frozen=True)
class Split:
  """Examples, checked."""

  name: str
  first: list[Any]  # texts; of a chat its messages
  second: list[str] | None
  answers: list[Any]  # classes, numbers or `Span`s; None each in a chat

  def __len__(self) -> int:
    return len(self.first)

  def part(self, chosen: Iterable[int], name: str) -> "Split":
    """Those of the given numbers."""
    chosen = list(chosen)
    second = self.second
    return Split(
      name,
      [self.first[i] for i in chosen],
      None if second is None else [second[i] for i in chosen],
      [self.answers[i] for i in chosen],
    )


@dataclasses.dataclass(frozen=True)
class Examples:
  """What is trained on and what is evaluated."""

  task: Task  # with its labels, where they were found in the data
  train: Split
  evaluated: list[Split]


def load(task: Task, config: DataConfig, cache: pathlib.Path) -> Examples:
  """Reads and checks the splits that a run needs.

  Args:
    task: what is to be learned.
    config: `path` and `validation` say where the examples are.
    cache: folder for the files that `datasets` maps into memory.

  Raises:
    UserError: a file, a split, a column or a label is not what it should be.
  """
  path = config.path or task.path
  if not path:
    raise UserError(
      f"--task {task.name} has no data of its own; name a file, a folder or"
      f" {HUB}NAME with data.path"
    )
  name = f"data.path {path}"
  train, evaluated = _tables(path, task, config, cache, name)
  if task.kind == "classify" and not task.labels:
    task = dataclasses.replace(task, labels=_found_labels(train, task, name))
  first = _check(train, task, f"{name} ({config.split})")
  if evaluated:
    others = [
      _check(table, task, f"{name} ({split})", split)
      for split, table in evaluated.items()
    ]
  else:
    first, held_out = _hold_out(first, task, config.holdout_every)
    others = [held_out]
  return Examples(task, first, others)


Tables = dict[str, datasets.Dataset]


def _tables(
  path: str, task: Task, config: DataConfig, cache: pathlib.Path, name: str
) -> tuple[datasets.Dataset, Tables]:
  """The training table, and those to evaluate; none: to be held out."""
  folder = pathlib.Path(path).expanduser()
  if path.startswith(PACKAGE):
    with sources.quiet():
      splits: Any = packaged.load(path.removeprefix(PACKAGE))
  elif path.startswith(HUB):
    splits = _hub(path, config, cache, name)
  elif folder.is_dir():
    splits = _folder(folder, cache, name)
  else:
    table = _files(path, cache, name)
    wanted = config.validation
    if wanted in ("", "none"):
      return table, {}
    return table, {
      pathlib.Path(one).stem: _files(one, cache, f"data.validation {one}")
      for one in wanted.split(",")
    }
  train = _pick(splits, config.split, name, "data.split")
  wanted = config.validation.split(",") if config.validation else []
  if wanted == ["none"]:
    return train, {}
  found = wanted or [s for s in task.validation if s in splits]
  return train, {s: _pick(splits, s, name, "data.validation") for s in found}


def _pick(splits: Tables, split: str, name: str, field: str) -> Any:
  if split not in splits:
    raise UserError(
      f"{name} has no split {split!r} ({field}); its splits are"
      f" {', '.join(splits)}"
    )
  return splits[split]


def _hub(
  path: str, config: DataConfig, cache: pathlib.Path, name: str
) -> Tables:
  repository, _, subset = path.removeprefix(HUB).partition(":")
  with sources.reading(name), sources.quiet():
    return cast(
      Tables,
      datasets.load_dataset(
        repository,
        subset or None,
        revision=config.revision or None,
        cache_dir=str(cache),
      ),
    )


def _folder(folder: pathlib.Path, cache: pathlib.Path, name: str) -> Tables:
  """Splits by the names of files: `train.csv`, `validation-00000.parquet`."""
  found: dict[str, list[str]] = {}
  for path in sources.find_files(name, str(folder)):
    split = path.name.split(".")[0].split("-")[0]
    found.setdefault(split, []).append(str(path))
  return {
    split: _read(paths, cache, f"{name} ({split})")
    for split, paths in found.items()
  }


def _files(pattern: str, cache: pathlib.Path, name: str) -> datasets.Dataset:
  paths = [str(p) for p in sources.find_files(name, pattern)]
  return _read(paths, cache, name)


def _read(paths: list[str], cache: pathlib.Path, name: str) -> datasets.Dataset:
  kinds = {sources.kind_of(pathlib.Path(path)) for path in paths}
  if kinds - {"csv", "json", "parquet"}:
    raise UserError(
      f"{name}: {paths[0]} is no table; examples are read from .csv, .tsv,"
      " .jsonl, .json and .parquet"
    )
  if len(kinds) > 1:
    raise UserError(f"{name} mixes {' and '.join(map(str, kinds))} files")
  (kind,) = kinds
  options: dict[str, Any] = {"sep": "\t"} if ".tsv" in paths[0].lower() else {}
  with sources.reading(name), sources.quiet():
    table = datasets.load_dataset(
      str(kind),
      data_files=paths,
      split="train",
      cache_dir=str(cache),
      **options,
    )
  return cast(datasets.Dataset, table)


def _column(
  table: datasets.Dataset, column: str, field: str, name: str
) -> list:
  if column not in table.column_names:
    raise UserError(
      f"{name} has no column {column!r}; its columns are"
      f" {', '.join(table.column_names)}: name one with {field}"
    )
  return list(cast(Iterable[Any], table[column]))


def _check(
  table: datasets.Dataset, task: Task, name: str, split: str = "train"
) -> Split:
  """A table's columns under the task's names, every value looked at."""
  first = _column(table, task.first, "task.first", name)
  second = None
  if task.second:
    second = _column(table, task.second, "task.second", name)
  if not first:
    raise UserError(f"{name} holds no example")
  if task.kind == "chat":
    return Split(split, first, second, [None] * len(first))
  for column, values in ((task.first, first), (task.second, second or [])):
    _check_texts(values, column, name)
  raw = _column(table, task.label, "task.label", name)
  if task.kind == "span":
    answers: list[Any] = [
      _span(value, context, f"{name}, row {i}, {task.label!r}")
      for i, (value, context) in enumerate(zip(raw, second or [], strict=True))
    ]
  elif task.kind == "regress":
    answers = [_number(v, f"{name}, row {i}") for i, v in enumerate(raw)]
  else:
    _check_names(table, task, name)
    classes = {label.lower(): i for i, label in enumerate(task.labels)}
    answers = [
      _label(v, classes, f"{name}, row {i}, column {task.label!r}")
      for i, v in enumerate(raw)
    ]
  return Split(split, first, second, answers)


def _check_texts(values: list, column: str, name: str) -> None:
  for i, value in enumerate(values):
    if not isinstance(value, str):
      raise UserError(
        f"{name}, row {i}: column {column!r} holds {value!r}, not a text"
      )


def _check_names(table: datasets.Dataset, task: Task, name: str) -> None:
  """Names that the table gives its labels must be in the task's order."""
  feature = table.features[task.label]
  named = getattr(feature, "names", None)
  if named and [n.lower() for n in named] != [n.lower() for n in task.labels]:
    raise UserError(
      f"{name}: column {task.label!r} counts the labels {', '.join(named)},"
      f" the task {', '.join(task.labels)}; say the right order with"
      " task.labels"
    )


def _label(value: Any, classes: dict[str, int], place: str) -> int:
  """The number of a class that is given as a number, a name or a truth."""
  number: Any = value
  if isinstance(value, str):
    number = classes.get(value.strip().lower(), value)
  elif isinstance(value, bool):
    number = classes.get(str(value).lower(), int(value))
  if isinstance(number, float) and number.is_integer():
    number = int(number)
  if isinstance(number, int) and 0 <= number < len(classes):
    return number
  hint = " (-1: the labels of this split are not published)"
  raise UserError(
    f"{place}: the label {value!r} is none of {', '.join(classes)}, nor a"
    f" number from 0 to {len(classes) - 1}{hint * (value == HIDDEN)}; name"
    " the classes with task.labels"
  )


def _number(value: Any, place: str) -> float:
  try:
    return float(value)
  except (TypeError, ValueError):
    raise UserError(f"{place}: the label {value!r} is no number") from None


def _span(value: Any, context: str, place: str) -> Span:
  """Answers in the hub's form, found in the context where they are said."""
  if not isinstance(value, dict) or {"text", "answer_start"} - value.keys():
    raise UserError(
      f"{place} holds {str(value)[:60]!r}; an answer is"
      ' {"text": [...], "answer_start": [...]}'
    )
  texts, starts = tuple(value["text"]), tuple(value["answer_start"])
  for text, start in zip(texts, starts, strict=True):
    if context[start : start + len(text)] != text:
      raise UserError(
        f"{place}: {text!r} is not what the context has at its character"
        f" {start}, {context[start : start + len(text)]!r}"
      )
  return Span(texts, starts)


def _found_labels(
  table: datasets.Dataset, task: Task, name: str
) -> tuple[str, ...]:
  """The classes of a column that names none: its values, in their order."""
  named = getattr(table.features.get(task.label), "names", None)
  if named:
    return tuple(named)
  values = _column(table, task.label, "task.label", name)
  kinds = {type(v) for v in values}
  if kinds <= {int, bool}:
    found = [str(i) for i in range(max(int(v) for v in values) + 1)]
  elif kinds == {str}:
    found = sorted({v.strip().lower() for v in values})
  else:
    raise UserError(
      f"{name}: column {task.label!r} holds neither names nor numbers of"
      " classes; name another with task.label"
    )
  if not 2 <= len(found) <= 1000:
    raise UserError(
      f"{name}: column {task.label!r} has {len(found)} classes; between 2 and"
      " 1,000 can be told apart"
    )
  return tuple(found)


def _hold_out(split: Split, task: Task, every: int) -> tuple[Split, Split]:
  """One example in `every` for evaluation, in the order of the file.

  Questions on one context stay together: it would be known otherwise.
  """
  keys = list(range(len(split)))
  if task.kind == "span" and split.second is not None:
    place = {text: i for i, text in enumerate(dict.fromkeys(split.second))}
    keys = [place[text] for text in split.second]
  apart = [i for i, key in enumerate(keys) if key % every == every - 1]
  kept = [i for i, key in enumerate(keys) if key % every != every - 1]
  if not apart or not kept:
    raise UserError(
      f"{len(split)} examples are too few to hold one in data.holdout_every="
      f"{every} out; lower it, or name others with data.validation"
    )
  return split.part(kept, split.name), split.part(apart, "held_out")
