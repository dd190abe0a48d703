"""Initial values of the two factors beside, or in place of, a weight."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.subspace import find as find_lib
from galore_optax.subspace import projection
from galore_optax.tree import matrix_view, sharding, slices

STARTS = ("spectral", "random")

# Steps of subspace iteration that find a spectral start.
_ITERATIONS = 8

Pair = tuple[jax.Array, jax.Array]


def zero_product(
  key: jax.Array, view: matrix_view.MatrixView, rank: int
) -> Pair:
  """Factors whose product is zero: the left one is random, the right one zero.

  Args:
    key: Random key.
    view: How the weight is read as matrices (..., m, n).
    rank: Rank r.

  Returns:
    Factors (..., m, r), uniform in ±1/√m as public implementations of LoRA draw
    them, and (..., r, n).
  """
  bound = view.m**-0.5
  shape = (*view.stack, view.m, rank)
  a = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
  return a, jnp.zeros((*view.stack, rank, view.n))


def approximation(key: jax.Array, x: jax.Array, rank: int, start: str) -> Pair:
  """Factors that stand for matrices.

  Of a matrix of zeros one factor is zero. If both were, neither would have a
  gradient.

  Args:
    key: Random key.
    x: Matrices (..., m, n).
    rank: Rank r.
    start: `spectral`: factors of the best approximation of rank r that eight
      steps of subspace iteration find. `random`: normal factors, whose product
      has entries as large as those of the matrix.

  Returns:
    Factors (..., m, r) and (..., r, n).
  """
  *stack, m, n = x.shape
  x = x.astype(jnp.float32)
  if start == "random":
    square = jnp.mean(x * x, axis=(-2, -1), keepdims=True)
    std = (square / rank) ** 0.25
    left, right = jax.random.split(key)
    a = jnp.where(square > 0, std, m**-0.5)
    a *= jax.random.normal(left, (*stack, m, rank))
    return a, std * jax.random.normal(right, (*stack, rank, n))
  basis = find_lib.start_basis(key, m, rank)
  find = lambda g: find_lib.find_basis(
    g, basis, "left", "subspace", jnp.int32(_ITERATIONS)
  )
  # One matrix at a time: batches of factorizations can hang on CPU.
  a = slices.map_matrices(find, x)
  b = projection.project(x, {"left": a})
  # Both factors get the same norm, so that they learn at the same rate.
  norm = lambda y: jnp.linalg.norm(y, axis=(-2, -1), keepdims=True)
  balance = jnp.sqrt(norm(b) / norm(a))
  balance = jnp.where(balance > 0, balance, 1)
  return a * balance, b / balance


def sharded_like_weight(
  make: Callable[[jax.Array, jax.Array], Pair],
  view: matrix_view.MatrixView,
  rank: int,
  dtype: Any,
  key: jax.Array,
  weight: Any,
) -> Pair:
  """Makes factors, and shards them as their weight is sharded.

  Args:
    make: From a random key and the weight to the two factors.
    view: How the weight is read as matrices (..., m, n).
    rank: Rank r.
    dtype: Dtype of the factors.
    key: Random key.
    weight: The weight.

  Returns:
    The factors. Their axes of size r are whole on every device, their other
    axes are divided like the weight's.
  """
  left = lambda spec: (*view.spec(spec)[:-1], None)
  right = lambda spec: (*view.spec(spec)[:-2], None, view.spec(spec)[-1])
  shard = lambda a, b: (
    sharding.shard_like(a, weight, left),
    sharding.shard_like(b, weight, right),
  )
  if not sharding.is_explicit(weight):
    return shard(*make(key, weight))
  zeros = lambda m, n: jnp.zeros((*view.stack, m, n), dtype)
  like = shard(zeros(view.m, rank), zeros(rank, view.n))
  return sharding.run_auto(make, like, key, weight)
