"""Values of parametrized tests that run with `-m slow` only.

Values that take other ones' way through the code are slow, so that the default
run is short.
"""

from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
  """One value of each parameter."""
  return pytest.param(*values, marks=pytest.mark.slow)


def with_slow(names: Iterable[str], *others: str) -> list:
  """Names as values of one parameter; `others` among them are slow."""
  return [slow(name) if name in others else name for name in names]
