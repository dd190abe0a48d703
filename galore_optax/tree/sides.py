"""Sides and rank of a matrix's projection, and the size of its state."""

from typing import Any

import jax
import jax.numpy as jnp

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full", "auto")


def choose_sides(proj_type: str, m: int, n: int, rank: int) -> tuple[str, ...]:
  """The sides of an m x n matrix that get a basis.

  Args:
    proj_type: See :func:`galore_optax.galore`.
    m: Number of rows.
    n: Number of columns.
    rank: Number of directions.

  Returns:
    `("left",)`, `("right",)` or both.

  Example:
    >>> choose_sides("std", 512, 1376, 128)
    ('left',)
    >>> choose_sides("auto", 512, 1376, 128)
    ('right',)
  """
  shorter = "left" if m <= n else "right"
  longer = "left" if m >= n else "right"
  smallest = min(
    (shorter, longer), key=lambda side: state_elements(m, n, rank, (side,))
  )
  return {
    "std": (shorter,),
    "reverse_std": (longer,),
    "left": ("left",),
    "right": ("right",),
    "full": ("left", "right"),
    "auto": (smallest,),
  }[proj_type]


def state_elements(m: int, n: int, rank: int, sides: tuple[str, ...]) -> int:
  """Number of elements of an m x n matrix's bases and two moments.

  With short side s and long side l it is s·r + 2·l·r for `std`, l·r + 2·s·r
  for `reverse_std` and (s + l)·r + 2·r² for `full`, against 2·s·l for Adam.

  Args:
    m: Number of rows.
    n: Number of columns.
    rank: Number of directions.
    sides: The sides with a basis.

  Returns:
    Number of elements.

  Example:
    >>> state_elements(512, 1376, 128, ("left",))
    417792
  """
  bases = rank * (
    (m if "left" in sides else 0) + (n if "right" in sides else 0)
  )
  rows = rank if "left" in sides else m
  cols = rank if "right" in sides else n
  return bases + 2 * rows * cols


def resolve_rank(rank: Any, m: int, n: int) -> int:
  """The rank of an m x n matrix's projection, as an integer.

  Args:
    rank: A positive integer, or a fraction of the shorter side in (0, 1].
    m: Number of rows.
    n: Number of columns.

  Returns:
    A rank between 1 and min(m, n).

  Raises:
    ValueError: If the rank is traced.

  Example:
    >>> resolve_rank(0.25, 512, 1376), resolve_rank(1024, 512, 1376)
    (128, 512)
  """
  if isinstance(rank, jax.core.Tracer):
    raise ValueError(
      "`rank` decides the shapes of the state and cannot be traced, got "
      f"{rank}. Under `optax.inject_hyperparams`, call `init` outside of "
      "`jax.jit` and `jax.eval_shape`, pass static_args=('rank',), or give the "
      "rank in `rules`."
    )
  short = min(m, n)
  if jnp.issubdtype(jnp.result_type(rank), jnp.floating):
    return max(1, round(float(rank) * short))
  return min(int(rank), short)
