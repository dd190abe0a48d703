"""Sides and ranks of a projection, and the size of its state.

A side is an axis that is projected. A matrix has the sides `left` (its rows)
and `right` (its columns), a tensor the sides `axis0`, `axis1`, ...
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full", "auto")

_AXIS = "axis"


def axis_of(side: str) -> int:
  """The axis of one matrix or tensor that a side is about.

  Args:
    side: `left`, `right`, or what :func:`tensor_side` returns.

  Example:
    >>> axis_of("left"), axis_of("right"), axis_of("axis2")
    (0, 1, 2)
  """
  if is_tensor_side(side):
    return int(side.removeprefix(_AXIS))
  return ("left", "right").index(side)


def tensor_side(axis: int) -> str:
  """The name of an axis of a tensor, as the state has it."""
  return f"{_AXIS}{axis}"


def is_tensor_side(side: str) -> bool:
  """Whether a side is an axis of a tensor."""
  return side.startswith(_AXIS)


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


def tensor_ranks(
  rank: Any, dims: tuple[int, ...], factored: Sequence[int]
) -> dict[int, int]:
  """The rank of each axis of a tensor that gets a factor.

  Args:
    rank: A positive integer, a fraction of each axis in (0, 1], or one of these
      for each axis of `factored`.
    dims: Shape of the tensor.
    factored: Axes that are projected.

  Returns:
    Axis to rank, without the axes whose rank would be their size: these stay
    whole, which is the same, and costs nothing.

  Raises:
    ValueError: If the rank is traced, or no axis is left.

  Example:
    >>> tensor_ranks(0.25, (3, 3, 16, 32), (2, 3))
    {2: 4, 3: 8}
  """
  entries = rank if isinstance(rank, tuple) else (rank,) * len(factored)
  ranks = {
    axis: resolve_rank(entry, dims[axis], dims[axis])
    for axis, entry in zip(factored, entries, strict=True)
  }
  smaller = {axis: r for axis, r in ranks.items() if r < dims[axis]}
  if not smaller:
    sizes = tuple(dims[axis] for axis in factored)
    raise ValueError(
      f"`tensor` names axes of sizes {sizes}, none of which the rank {rank} "
      "makes smaller. Take a smaller `rank`, such as 0.25, or give the leaf "
      "the rule None to leave it at full rank."
    )
  return smaller


def tensor_state_elements(dims: Sequence[int], ranks: Mapping[int, int]) -> int:
  """Number of elements of a tensor's factors and two moments.

  Args:
    dims: Shape of the tensor.
    ranks: Axis to rank.

  Returns:
    Number of elements.

  Example:
    >>> tensor_state_elements((3, 3, 16, 32), {2: 4, 3: 8})
    896
  """
  core = math.prod(ranks.get(axis, size) for axis, size in enumerate(dims))
  return sum(dims[axis] * r for axis, r in ranks.items()) + 2 * core
