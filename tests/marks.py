"""Marks of tests: values that run with `-m slow` only, and what JAX must do.

Values that take other ones' way through the code are slow, so that the default
run is short.
"""

from collections.abc import Iterable
from typing import Any

import jax
import pytest

moves_arrays = pytest.mark.skipif(
  jax.__version_info__ < (0, 10, 2),
  reason="before JAX 0.10.2, a program on a CPU cannot move arrays in memory",
)


def slow(*values: Any) -> Any:
  """One value of each parameter."""
  return pytest.param(*values, marks=pytest.mark.slow)


def with_slow(names: Iterable[str], *others: str) -> list:
  """Names as values of one parameter; `others` among them are slow."""
  return [slow(name) if name in others else name for name in names]
