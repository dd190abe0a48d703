"""Fira's limiter: how fast the norm of a residual may grow."""

from typing import Any

import jax
import jax.numpy as jnp

GROWTH = 1.01  # that of the paper's code
_EPS = 1e-8  # keeps quotients finite, also as there


def limit(
  norm: jax.Array, last_norm: jax.Array, growth: Any = GROWTH
) -> tuple[jax.Array, jax.Array]:
  """What residuals are divided by so that their norms grow no faster.

  The first residual is not limited, and neither is one after a residual of
  zero: from zero it would take thousands of steps to grow.

  Args:
    norm: Norms of the residuals, (...).
    last_norm: Norms of those that were last added, (...); 0 before the first.
    growth: Largest ratio of the two.

  Returns:
    Divisors, 1 or more, and the norms of the residuals that are added. Where a
    norm is zero or not finite, the last one stays.
  """
  is_valid = jnp.isfinite(norm) & (norm > 0)
  excess = jnp.maximum(norm / ((last_norm + _EPS) * growth), 1)
  excess = jnp.where(is_valid & (last_norm > 0), excess, 1)
  new_norm = jnp.where(is_valid, norm / excess, last_norm)
  return excess, new_norm.astype(last_norm.dtype)


def root(square: jax.Array) -> jax.Array:
  """The root of a sum of squares; its derivative at zero is zero."""
  positive = square > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
