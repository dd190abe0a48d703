"""What is right, checked value by value: classes, numbers and spans."""

import dataclasses
import math
from typing import Any

from train.common.errors import UserError
from train.finetuning.tables import Table
from train.finetuning.tasks import Task

HIDDEN = -1  # what the hub gives for labels that are kept secret
SECRET = " (-1: the labels of this split are not published)"
MOST = 1000  # classes


@dataclasses.dataclass(frozen=True)
class Span:
  """The right answers to a question: none where there is none in the text."""

  texts: tuple[str, ...]
  starts: tuple[int, ...]  # of each in the context, in characters


def check(
  values: list[Any],
  contexts: list[str] | None,
  table: Table,
  task: Task,
  name: str,
) -> list[Any]:
  """The answers of a column: numbers of classes, numbers, or `Span`s.

  Args:
    values: of the column `task.label`.
    contexts: that spans are parts of.
    table: that the column is of.
    task: what is to be found.
    name: of the table, as messages call it.

  Raises:
    UserError: a value is none of the task's; its row is named.
  """
  place = lambda i: f"{name}, row {i}, column {task.label!r}"
  if task.kind == "span":
    pairs = zip(values, contexts or [], strict=True)
    return [span(v, text, place(i)) for i, (v, text) in enumerate(pairs)]
  if task.kind == "regress":
    if all(v == HIDDEN for v in values):
      raise UserError(
        f"{name}: column {task.label!r} holds -1 only{SECRET}; name another"
        " split"
      )
    return [number(v, place(i)) for i, v in enumerate(values)]
  names = _names(table, task.label)
  if names:
    _check_names(names, task, name)
  check_there(values, task, name)
  return [
    _class(v, task.labels, bool(names), place(i)) for i, v in enumerate(values)
  ]


def classes(
  values: list[Any], table: Table, task: Task, name: str
) -> tuple[str, ...]:
  """The classes of a column: its values, numbers in their order.

  Raises:
    UserError: they are no names nor whole numbers, or too many.
  """
  named = _names(table, task.label)
  if named:
    return named
  check_there(values, task, name)
  kinds = {type(value) for value in values}
  whole = lambda v: isinstance(v, int) or float(v).is_integer()
  if kinds == {str} or kinds == {bool}:
    found = sorted({str(v).strip().lower() for v in values})
  elif kinds <= {int, float} and all(map(whole, values)):
    found = [str(v) for v in sorted({int(v) for v in values})]
  else:
    raise UserError(
      f"{name}: column {task.label!r} holds neither names nor whole numbers"
      " of classes; name another with task.label"
    )
  if not 2 <= len(found) <= MOST:
    raise UserError(
      f"{name}: column {task.label!r} has {len(found)} classes; between 2 and"
      f" {MOST:,} can be told apart"
    )
  return tuple(found)


def check_there(values: list[Any], task: Task, name: str) -> None:
  """Sees that every row has a label.

  Raises:
    UserError: one has none.
  """
  empty = next((i for i, value in enumerate(values) if value is None), None)
  if empty is not None:
    raise UserError(
      f"{name}, row {empty}, column {task.label!r} is empty; fill it, or leave"
      " the row out"
    )


def _names(table: Table, column: str) -> tuple[str, ...]:
  """Names that a table gives to the numbers in a column; none: no names."""
  return tuple(getattr(table.features.get(column), "names", None) or ())


def _check_names(names: tuple[str, ...], task: Task, name: str) -> None:
  """They must be in the task's order: the numbers count them."""
  if [n.lower() for n in names] != [n.lower() for n in task.labels]:
    raise UserError(
      f"{name}: column {task.label!r} counts the labels {', '.join(names)},"
      f" the task {', '.join(task.labels)}; say the right order with"
      " task.labels"
    )


def _class(
  value: Any, labels: tuple[str, ...], counted: bool, place: str
) -> int:
  """The number of a class, given by its name or its number.

  Args:
    value: of the column.
    labels: the names of the classes.
    counted: whether the column holds numbers that the table has names for.
    place: the value's, as messages call it.
  """
  known = [label.lower() for label in labels]
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  names = [str(value).strip().lower()]
  if isinstance(value, bool):
    names.append(str(int(value)))
  for name in names:
    if name in known and not counted:
      return known.index(name)
  # Classes whose names are numbers are not counted: 1 is the class "1".
  counts = counted or not any(map(_is_number, known))
  if counts and isinstance(value, int) and 0 <= value < len(known):
    return int(value)
  or_number = f", nor a number from 0 to {len(known) - 1}" * counts
  raise UserError(
    f"{place}: the label {value!r} is none of {', '.join(labels)}{or_number}"
    f"{SECRET * (value == HIDDEN)}; name the classes with task.labels"
  )


def _is_number(name: str) -> bool:
  return name.removeprefix("-").isdigit()


def number(value: Any, place: str) -> float:
  """A finite number.

  Raises:
    UserError: it is none.
  """
  try:
    found = math.nan if isinstance(value, bool) else float(value)
  except (TypeError, ValueError):
    found = math.nan
  if not math.isfinite(found):
    raise UserError(f"{place}: the label {value!r} is no finite number")
  return found


def span(value: Any, context: str, place: str) -> Span:
  """Answers in the hub's form, found in the context where they are said.

  Raises:
    UserError: they are of another form, or not there.
  """
  texts, starts = _span_parts(value, place)
  for text, start in zip(texts, starts, strict=True):
    there = context[max(start, 0) : max(start, 0) + len(text)]
    if not text or start < 0 or there != text:
      raise UserError(
        f"{place}: {text!r} is not what the context has at its character"
        f" {start}, {there!r}"
      )
  return Span(texts, starts)


def _span_parts(
  value: Any, place: str
) -> tuple[tuple[str, ...], tuple[int, ...]]:
  if isinstance(value, dict) and {"text", "answer_start"} <= value.keys():
    texts, starts = value["text"], value["answer_start"]
    if (
      isinstance(texts, list | tuple)
      and isinstance(starts, list | tuple)
      and len(texts) == len(starts)
      and all(isinstance(text, str) for text in texts)
      and all(isinstance(start, int) for start in starts)
    ):
      return tuple(texts), tuple(starts)
  raise UserError(
    f"{place} holds {str(value)[:60]!r}; an answer is"
    ' {"text": [...], "answer_start": [...]}, two lists of one length'
  )
