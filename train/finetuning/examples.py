"""The examples of a task, checked.

All columns and labels are checked here, before a model is loaded, so errors
name the user's own files, rows and columns.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable
from typing import Any, cast

import numpy as np

from train.common.errors import UserError
from train.config.schema import HUB, SharedDataConfig
from train.data import sources
from train.finetuning import chat, tables
from train.finetuning import labels as labels_lib
from train.finetuning.tasks import Task


@dataclasses.dataclass(frozen=True)
class Split:
  """Checked examples."""

  name: str
  first: list[Any]  # texts; in a chat, conversations or questions
  second: list[str] | None
  labels: list[Any]  # classes, numbers or `Span`s; in a chat, None each
  training: bool = False  # whether the model is trained on it

  def __len__(self) -> int:
    return len(self.first)

  def take(self, indices: Iterable[int]) -> "Split":
    """The examples at the given indices."""
    indices = list(indices)
    second = self.second
    return dataclasses.replace(
      self,
      first=[self.first[i] for i in indices],
      second=None if second is None else [second[i] for i in indices],
      labels=[self.labels[i] for i in indices],
    )


@dataclasses.dataclass(frozen=True)
class Examples:
  """The training split and the evaluated splits of a task."""

  task: Task  # with the classes in the data, if it did not name its own
  train: Split
  evaluated: list[Split]


def load(task: Task, config: SharedDataConfig, cache: pathlib.Path) -> Examples:
  """Reads and checks the splits that a run needs.

  Args:
    task: the task.
    config: `path`, `split` and `validation` say where the examples are.
    cache: folder for the files that `datasets` maps into memory.

  Raises:
    UserError: a file, split, column or label is missing or wrong.
  """
  path = config.path or task.path
  if not path:
    raise UserError(
      f"--task {task.name} has no data of its own; name a file, a folder or"
      f" {HUB}NAME with data.path"
    )
  name = f"data.path {path}"
  train_table, tables_by_split = tables.read(
    path, config, task.validation, cache
  )
  if task.kind == "classify" and not task.labels:
    values = _column(train_table, task.label, "task.label", name)
    classes = labels_lib.find_classes(values, train_table, task, name)
    task = dataclasses.replace(task, labels=classes)
  if task.kind == "classify":
    _check_classes(task, name)
  train = _parse(train_table, task, f"{name} ({config.split})", "train")
  evaluated = [
    _parse(table, task, f"{name} ({split})", split)
    for split, table in tables_by_split.items()
  ]
  train = dataclasses.replace(train, training=True)
  if not evaluated:
    train, held_out = _hold_out(train, task, config.holdout_every)
    evaluated = [held_out]
  return Examples(task, train, evaluated)


def digest(examples: Examples) -> str:
  """A hash of the task and all examples.

  It uses the reprs of `Task` and `Span`, so renaming one of their fields would
  keep runs that exist from continuing.
  """
  hasher = hashlib.blake2b(repr(examples.task).encode(), digest_size=8)
  for split in (examples.train, *examples.evaluated):
    for values in (split.name, split.first, split.second, split.labels):
      hasher.update(repr(values).encode())
  return hasher.hexdigest()


def _check_classes(task: Task, name: str) -> None:
  """Checks that there are at least two classes, and that they can be scored."""
  few = ", ".join(task.labels[:8])
  if len(set(map(str.lower, task.labels))) < max(2, len(task.labels)):
    raise UserError(
      f"{name}: the classes are {few}; give at least two that differ by more"
      " than upper and lower case with task.labels"
    )
  if len(task.labels) > 2 and "f1" in task.metrics:
    raise UserError(
      f"{name}: --task {task.name} is scored by the F1 of its second class,"
      f" and there are {len(task.labels)} classes: {few}; use --task classify"
    )


def _column(table: tables.Table, column: str, field: str, name: str) -> list:
  if column not in table.column_names:
    raise UserError(
      f"{name} has no column {column!r}; its columns are"
      f" {', '.join(table.column_names)}: name one with {field}"
    )
  with sources.reading(name):
    return list(cast(Iterable[Any], table[column]))


def _parse(table: tables.Table, task: Task, name: str, split: str) -> Split:
  """Reads the columns of a table that the task names, and checks each value."""
  first = _column(table, task.first, "task.first", name)
  second = None
  if task.second:
    second = _column(table, task.second, "task.second", name)
    _check_texts(second, task.second, name)
  if not first:
    raise UserError(f"{name} holds no example")
  if task.kind == "chat":
    replies = second or [None] * len(first)
    for i, (value, reply) in enumerate(zip(first, replies, strict=True)):
      chat.parse_conversation(value, reply, f"{name}, row {i}")
    return Split(split, first, second, [None] * len(first))
  _check_texts(first, task.first, name)
  values = _column(table, task.label, "task.label", name)
  labels = labels_lib.parse(values, second, table, task, name)
  return Split(split, first, second, labels)


def _check_texts(values: list, column: str, name: str) -> None:
  for i, value in enumerate(values):
    if not isinstance(value, str):
      raise UserError(
        f"{name}, row {i}: column {column!r} holds {value!r}, not a text"
      )


def _hold_out(split: Split, task: Task, every: int) -> tuple[Split, Split]:
  """Divides a split: one random example in `every` is held out.

  The choice is the same in every run. It is random because files have an
  order: every second row may be of one class. Questions on the same context
  stay together, so that no held-out context is trained on.
  """
  groups = np.arange(len(split))
  if task.kind == "span" and split.second is not None:
    index = {text: i for i, text in enumerate(dict.fromkeys(split.second))}
    groups = np.array([index[text] for text in split.second])
  shuffled = np.random.default_rng(0).permutation(groups.max() + 1)
  is_held_out = shuffled[groups] % every == every - 1
  if is_held_out.all() or not is_held_out.any():
    raise UserError(
      f"{len(split)} examples are too few to hold one in data.holdout_every="
      f"{every} out; lower it, or name others with data.validation"
    )
  held_out = split.take(np.flatnonzero(is_held_out))
  held_out = dataclasses.replace(held_out, name="held_out", training=False)
  return split.take(np.flatnonzero(~is_held_out)), held_out
