"""Checks of config fields."""

from collections.abc import Iterable
from typing import Any

from train.common.errors import UserError


def check_above(group: str, config: Any, names: Iterable[str], low: float = 0):
  """Raises a UserError unless every named field of `config` is above `low`."""
  for name in names:
    value = getattr(config, name)
    if not value > low:
      raise UserError(f"{group}.{name} must be above {low}, got {value}")
