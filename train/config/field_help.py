"""Help on the fields of a config, from the comments beside the fields.

The comments are read from the source, so that `--help` says the same as
`train/config/schema.py`.
"""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
import typing
from collections.abc import Collection
from typing import Any, Literal

from train.config import schema

WIDTH = 80
COLUMN = 34  # where the comments start


def field_notes(cls: type) -> dict[str, str]:
  """The comment beside each field of a dataclass, or in the lines above it.

  Fields that a class inherits come first; one that it declares again has the
  later comment.
  """
  notes: dict[str, str] = {}
  for base in reversed(cls.__mro__):
    if dataclasses.is_dataclass(base):
      notes |= _own_notes(base)
  return notes


def _own_notes(cls: type) -> dict[str, str]:
  """The comments of the fields that a class itself declares."""
  source = textwrap.dedent(inspect.getsource(cls))
  lines = source.splitlines()
  comments = {
    token.start[0]: token.string.lstrip("# ")
    for token in tokenize.generate_tokens(io.StringIO(source).readline)
    if token.type == tokenize.COMMENT
  }
  (body,) = ast.parse(source).body
  assert isinstance(body, ast.ClassDef)
  notes = {}
  for field in body.body:
    if not isinstance(field, ast.AnnAssign):
      continue
    assert isinstance(field.target, ast.Name) and field.end_lineno is not None
    above = field.lineno - 1
    while lines[above - 1].lstrip().startswith("#"):
      above -= 1
    rows = range(above + 1, field.end_lineno + 1)
    texts = [comments[row] for row in rows if row in comments]
    notes[field.target.id] = " ".join(texts)
  return notes


def summary(
  config: schema.SharedConfig, without: Collection[str] = frozenset()
) -> str:
  """The fields that `--set` takes: values in `config`, choices, meanings.

  Args:
    config: whose values are shown.
    without: fields that are left out, as `group.name`.
  """
  parts = []
  for group in dataclasses.fields(config):
    value = getattr(config, group.name)
    if dataclasses.is_dataclass(value):
      about = (type(value).__doc__ or "").strip().splitlines()[0]
      lines = _describe(group.name, value, without)
      parts += ["", f"{group.name}: {about}", *lines]
  return "\n".join(parts[1:])


def _describe(group: str, value: Any, without: Collection[str]) -> list[str]:
  notes = field_notes(type(value))
  kinds = typing.get_type_hints(type(value))
  lines = []
  for field in dataclasses.fields(value):
    if f"{group}.{field.name}" in without:
      continue
    text = f"  {group}.{field.name}={_shown(getattr(value, field.name))}"
    note = f"{notes[field.name].rstrip('.')} ({_takes(kinds[field.name])})"
    wrapped = textwrap.wrap(note, WIDTH - COLUMN)
    if len(text) > COLUMN - 2:
      lines.append(text)
      text = ""
    for row in wrapped:
      lines.append(f"{text:<{COLUMN}}{row}")
      text = ""
  return lines


def _shown(value: Any) -> str:
  """A value as `--set` takes it."""
  if isinstance(value, bool):
    return str(value).lower()
  return '""' if value == "" else str(value)


def _takes(kind: Any) -> str:
  """What a field of this type may be set to."""
  if typing.get_origin(kind) is Literal:
    return ", ".join(map(_shown, typing.get_args(kind)))
  return {bool: "true, false", str: "text"}.get(kind, kind.__name__)
