"""Examples of a task, checked.

Columns and labels are looked at here, all of them, before anything else is
made: what is wrong is said with the file's own names.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable
from typing import Any, cast

import numpy as np

from train.common.errors import UserError
from train.config.schema import HUB, SharedDataConfig
from train.finetuning import chat, labels, tables
from train.finetuning.tasks import Task


@dataclasses.dataclass(frozen=True)
class Split:
  """Examples, checked."""

  name: str
  first: list[Any]  # texts; of a chat its messages
  second: list[str] | None
  answers: list[Any]  # classes, numbers or `Span`s; None each in a chat
  training: bool = False  # whether it is what is learned from

  def __len__(self) -> int:
    return len(self.first)

  def part(self, chosen: Iterable[int]) -> "Split":
    """Those of the given numbers."""
    chosen = list(chosen)
    second = self.second
    return dataclasses.replace(
      self,
      first=[self.first[i] for i in chosen],
      second=None if second is None else [second[i] for i in chosen],
      answers=[self.answers[i] for i in chosen],
    )


@dataclasses.dataclass(frozen=True)
class Examples:
  """What is trained on and what is evaluated."""

  task: Task  # with its labels, where they were found in the data
  train: Split
  evaluated: list[Split]


def load(task: Task, config: SharedDataConfig, cache: pathlib.Path) -> Examples:
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
  train, evaluated = tables.read(path, config, task.validation, cache)
  if task.kind == "classify" and not task.labels:
    values = _column(train, task.label, "task.label", name)
    found = labels.classes(values, train, task, name)
    task = dataclasses.replace(task, labels=found)
  if task.kind == "classify":
    _check_classes(task, name)
  first = _check(train, task, f"{name} ({config.split})", "train")
  others = [
    _check(table, task, f"{name} ({split})", split)
    for split, table in evaluated.items()
  ]
  first = dataclasses.replace(first, training=True)
  if not others:
    first, held_out = _hold_out(first, task, config.holdout_every)
    others = [held_out]
  return Examples(task, first, others)


def digest(found: Examples) -> str:
  """What tells the examples of a run from others."""
  made = hashlib.blake2b(repr(found.task).encode(), digest_size=8)
  for split in (found.train, *found.evaluated):
    for values in (split.name, split.first, split.second, split.answers):
      made.update(repr(values).encode())
  return made.hexdigest()


def _check_classes(task: Task, name: str) -> None:
  """Sees that there is something to tell apart, and that it can be scored."""
  few = ", ".join(task.labels[:8])
  if len(set(map(str.lower, task.labels))) < max(2, len(task.labels)):
    raise UserError(
      f"{name}: the classes are {few}; give at least two that differ, whatever"
      " the case of their letters, with task.labels"
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
  return list(cast(Iterable[Any], table[column]))


def _check(table: tables.Table, task: Task, name: str, split: str) -> Split:
  """A table's columns under the task's names, every value looked at."""
  first = _column(table, task.first, "task.first", name)
  second = None
  if task.second:
    second = _column(table, task.second, "task.second", name)
    _check_texts(second, task.second, name)
  if not first:
    raise UserError(f"{name} holds no example")
  if task.kind == "chat":
    answers_ = second or [None] * len(first)
    for i, (said, answer) in enumerate(zip(first, answers_, strict=True)):
      chat.conversation(said, answer, f"{name}, row {i}")
    return Split(split, first, second, [None] * len(first))
  _check_texts(first, task.first, name)
  right = _column(table, task.label, "task.label", name)
  found = labels.check(right, second, table, task, name)
  return Split(split, first, second, found)


def _check_texts(values: list, column: str, name: str) -> None:
  for i, value in enumerate(values):
    if not isinstance(value, str):
      raise UserError(
        f"{name}, row {i}: column {column!r} holds {value!r}, not a text"
      )


def _hold_out(split: Split, task: Task, every: int) -> tuple[Split, Split]:
  """One example in `every` for evaluation, drawn alike in every run.

  By lot, for files have an order: every second row may be of one class.
  Questions on one context stay together: it would be known otherwise.
  """
  keys = np.arange(len(split))
  if task.kind == "span" and split.second is not None:
    place = {text: i for i, text in enumerate(dict.fromkeys(split.second))}
    keys = np.array([place[text] for text in split.second])
  lots = np.random.default_rng(0).permutation(keys.max() + 1)
  apart = lots[keys] % every == every - 1
  if apart.all() or not apart.any():
    raise UserError(
      f"{len(split)} examples are too few to hold one in data.holdout_every="
      f"{every} out; lower it, or name others with data.validation"
    )
  held_out = split.part(np.flatnonzero(apart))
  held_out = dataclasses.replace(held_out, name="held_out", training=False)
  return split.part(np.flatnonzero(~apart)), held_out
