"""Labels, checked value by value: classes, numbers and spans."""

import dataclasses
import math
from typing import Any

from train.common.errors import UserError
from train.finetuning.tables import Table
from train.finetuning.tasks import Task

SECRET = -1  # the hub's value for labels that are not published
SECRET_NOTE = " (-1: the labels of this split are not published)"
MAX_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Span:
  """The accepted answers to a question; empty if it has no answer."""

  texts: tuple[str, ...]
  starts: tuple[int, ...]  # index of each text's first character in the context


def parse(
  values: list[Any],
  contexts: list[str] | None,
  table: Table,
  task: Task,
  name: str,
) -> list[Any]:
  """The labels in a column: indices of classes, numbers, or `Span`s.

  Args:
    values: the values of the column `task.label`.
    contexts: the texts that the spans are parts of.
    table: the table of the column.
    task: the task.
    name: the table's name in errors.

  Raises:
    UserError: a value is not a label of the task; the error names its row.
  """
  where = lambda i: f"{name}, row {i}, column {task.label!r}"
  if task.kind == "span":
    pairs = zip(values, contexts or [], strict=True)
    return [parse_span(v, text, where(i)) for i, (v, text) in enumerate(pairs)]
  if task.kind == "regress":
    if all(v == SECRET for v in values):
      raise UserError(
        f"{name}: column {task.label!r} holds only -1{SECRET_NOTE}; name"
        " another split"
      )
    return [parse_number(v, where(i)) for i, v in enumerate(values)]
  names = _class_names(table, task.label)
  if names:
    _check_order(names, task, name)
  check_none_missing(values, task, name)
  return [
    _parse_class(v, task.labels, bool(names), where(i))
    for i, v in enumerate(values)
  ]


def find_classes(
  values: list[Any], table: Table, task: Task, name: str
) -> tuple[str, ...]:
  """The names of the classes in a column, sorted; numbers by their size.

  Raises:
    UserError: the values are neither names nor whole numbers, or too many.
  """
  names = _class_names(table, task.label)
  if names:
    return names
  check_none_missing(values, task, name)
  types = {type(value) for value in values}
  is_whole = lambda v: isinstance(v, int) or float(v).is_integer()
  if types == {str} or types == {bool}:
    classes = sorted({str(v).strip().lower() for v in values})
  elif types <= {int, float} and all(map(is_whole, values)):
    classes = [str(v) for v in sorted({int(v) for v in values})]
  else:
    raise UserError(
      f"{name}: column {task.label!r} holds neither names nor whole numbers"
      " of classes; name another with task.label"
    )
  if not 2 <= len(classes) <= MAX_CLASSES:
    raise UserError(
      f"{name}: column {task.label!r} has {len(classes)} classes; the number"
      f" must be between 2 and {MAX_CLASSES:,}"
    )
  return tuple(classes)


def check_none_missing(values: list[Any], task: Task, name: str) -> None:
  """Raises a `UserError` if a row has no label."""
  empty = next((i for i, value in enumerate(values) if value is None), None)
  if empty is not None:
    raise UserError(
      f"{name}, row {empty}, column {task.label!r} is empty; fill it, or leave"
      " the row out"
    )


def _class_names(table: Table, column: str) -> tuple[str, ...]:
  """The names that a table itself gives to the numbers in a column, if any."""
  return tuple(getattr(table.features.get(column), "names", None) or ())


def _check_order(names: tuple[str, ...], task: Task, name: str) -> None:
  """Checks that a table numbers the classes in the same order as the task."""
  if [n.lower() for n in names] != [n.lower() for n in task.labels]:
    raise UserError(
      f"{name}: column {task.label!r} numbers the classes as"
      f" {', '.join(names)}, but the task as {', '.join(task.labels)}; give the"
      " right order with task.labels"
    )


def _parse_class(
  value: Any, labels: tuple[str, ...], is_index: bool, where: str
) -> int:
  """The index of a class that is given by its name or its index.

  Args:
    value: the value in the column.
    labels: the names of the classes.
    is_index: whether the table says that its values are indices.
    where: the value's location in errors.
  """
  known = [label.lower() for label in labels]
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  names = [str(value).strip().lower()]
  if isinstance(value, bool):
    names.append(str(int(value)))
  for name in names:
    if name in known and not is_index:
      return known.index(name)
  # Where names of classes are numbers, 1 is the class "1", not the second one.
  is_index = is_index or not any(map(_is_number, known))
  if is_index and isinstance(value, int) and 0 <= value < len(known):
    return int(value)
  or_index = f", nor a number from 0 to {len(known) - 1}" * is_index
  raise UserError(
    f"{where}: the label {value!r} is none of {', '.join(labels)}{or_index}"
    f"{SECRET_NOTE * (value == SECRET)}; name the classes with task.labels"
  )


def _is_number(name: str) -> bool:
  return name.removeprefix("-").isdigit()


def parse_number(value: Any, where: str) -> float:
  """Reads a finite number, or raises a `UserError`."""
  try:
    number = math.nan if isinstance(value, bool) else float(value)
  except (TypeError, ValueError):
    number = math.nan
  if not math.isfinite(number):
    raise UserError(f"{where}: the label {value!r} is not a finite number")
  return number


def parse_span(value: Any, context: str, where: str) -> Span:
  """Reads answers in the form of SQuAD, and checks them against the context.

  Raises:
    UserError: they have another form, or are not in the context.
  """
  texts, starts = _span_parts(value, where)
  for text, start in zip(texts, starts, strict=True):
    found = context[max(start, 0) : max(start, 0) + len(text)]
    if not text or start < 0 or found != text:
      raise UserError(
        f"{where}: the answer is {text!r}, but the context has {found!r} at"
        f" character {start}"
      )
  return Span(texts, starts)


def _span_parts(
  value: Any, where: str
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
    f"{where} holds {str(value)[:60]!r}; an answer is"
    ' {"text": [...], "answer_start": [...]}, two lists of one length'
  )
