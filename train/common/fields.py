"""Asks the fields of a JSON object for values of a type.

    fields = Fields("model/config.json", {"num_hidden_layers": "2"})
    fields.integer("num_hidden_layers", low=1)

raises a `UserError` that names the file, the field, what was found and what
would work. JSON's null stands for a field that is absent, as in the files of
`transformers`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from train.common.errors import UserError

REQUIRED: Any = object()  # the default of fields that have none
LARGEST = 2**31 - 1  # of sizes and ids, which devices count in 32 bits
LONGEST = 60  # characters of a value in a message


def shown(value: Any) -> str:
  """A value as messages show it: JSON, cut off where it is long."""
  try:
    text = json.dumps(value)
  except (TypeError, ValueError, RecursionError):
    text = repr(value)
  return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def is_text(value: Any) -> bool:
  """Whether a value is a string that UTF-8 can hold: no half of a pair."""
  if not isinstance(value, str):
    return False
  return not any("\ud800" <= character <= "\udfff" for character in value)


def is_integer(value: Any) -> bool:
  """Whether a value is a whole number; true and false are none."""
  return isinstance(value, int) and not isinstance(value, bool)


class Fields:
  """The fields of an object, each asked for by its type."""

  def __init__(self, source: str, values: Mapping[str, Any], group: str = ""):
    """Takes the fields.

    Args:
      source: the file, as messages call it.
      values: the fields by name.
      group: comes before the names in messages, as in `rope_scaling.`.
    """
    self.source, self.values, self._group = source, values, group

  def has(self, name: str) -> bool:
    """Whether a field is there and not null."""
    return self.values.get(name) is not None

  def refuse(self, name: str, expected: str) -> NoReturn:
    """Raises for a field that is not what it must be."""
    raise UserError(
      f"{self.source}: {self._group}{name} is {shown(self.values.get(name))};"
      f" it must be {expected}"
    )

  def _given(self, name: str, default: Any) -> bool:
    """Whether a field is given; False where its default is to be used."""
    if self.has(name):
      return True
    if default is REQUIRED:
      raise UserError(f"{self.source} has no {self._group}{name}")
    return False

  def integer(
    self, name: str, default: Any = REQUIRED, low: int = 0, high: int = LARGEST
  ) -> Any:
    """A whole number from `low` to `high`."""
    if not self._given(name, default):
      return default
    value = self.values[name]
    if not is_integer(value) or not low <= value <= high:
      self.refuse(name, f"a whole number from {low} to {high}")
    return value

  def integers(self, name: str, default: Any = REQUIRED) -> Any:
    """A whole number or a list of them, none below 0, as a tuple."""
    if not self._given(name, default):
      return default
    value = self.values[name]
    several = value if isinstance(value, list) else [value]
    if not all(is_integer(x) and 0 <= x <= LARGEST for x in several):
      self.refuse(name, f"whole numbers from 0 to {LARGEST}")
    return tuple(several)

  def number(
    self, name: str, default: Any = REQUIRED, low: float = -math.inf
  ) -> Any:
    """A finite number, `low` or more."""
    if not self._given(name, default):
      return default
    value = self.values[name]
    if not is_number(value) or not low <= value:
      least = "" if low == -math.inf else f", {low:g} or more"
      self.refuse(name, f"a number{least}")
    return float(value)

  def flag(self, name: str, default: Any = REQUIRED) -> Any:
    """True or False."""
    if not self._given(name, default):
      return default
    value = self.values[name]
    if not isinstance(value, bool):
      self.refuse(name, "true or false")
    return value

  def text(self, name: str, default: Any = REQUIRED) -> Any:
    """A string."""
    if not self._given(name, default):
      return default
    if not is_text(self.values[name]):
      self.refuse(name, "a text")
    return self.values[name]

  def texts(self, name: str, default: Any = REQUIRED) -> Any:
    """A list of strings."""
    if not self._given(name, default):
      return default
    value = self.values[name]
    if not isinstance(value, list) or not all(map(is_text, value)):
      self.refuse(name, "a list of texts")
    return value

  def choice(
    self, name: str, choices: Sequence[str], default: Any = REQUIRED
  ) -> Any:
    """One of some strings."""
    if not self._given(name, default):
      return default
    value = self.values[name]
    if not isinstance(value, str) or value not in choices:
      self.refuse(name, f"one of {', '.join(choices)}")
    return value

  def group(self, name: str) -> "Fields":
    """The fields of an object in this one; none where it is absent."""
    value = self.values.get(name)
    if value is None:
      value = {}
    if not isinstance(value, Mapping):
      self.refuse(name, "an object")
    return Fields(self.source, value, f"{self._group}{name}.")

  def token(self, name: str) -> str:
    """A special token in a tokenizer_config.json; "" where it is absent.

    It is a string, or an object whose `content` is one.
    """
    if isinstance(self.values.get(name), Mapping):
      return self.group(name).text("content")
    return self.text(name, "")


def is_number(value: Any) -> bool:
  """Whether a value is a number that a float can hold; NaN is none."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return False
  try:
    return math.isfinite(float(value))
  except OverflowError:
    return False
