"""Finds the basis of a gradient's dominant subspace."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from galore_optax import linalg
from galore_optax.subspace import projection

METHODS = ("subspace", "svd", "random")

# Shift of the Gram operator: bounds the condition number of an iterate by 1e6.
_GRAM_SHIFT = 1e-6


def start_basis(key: jax.Array, size: int, rank: int) -> jax.Array:
  r"""An orthonormal basis to start from, without any linear algebra.

  The first r columns of a cosine transform (type IV) with random signs,
  :math:`P_{ij} = s_i \sqrt{2/m} \cos(\pi (2 i + 1)(2 j + 1) / 4 m)`: exactly
  orthonormal, spread over all coordinates like a random basis, with no entry
  equal to zero, and elementwise to compute.

  Args:
    key: Random key for the signs.
    size: Number of rows m.
    rank: Number of columns r.

  Returns:
    float32 (m, r) with orthonormal columns.

  Example:
    >>> p = start_basis(jax.random.key(0), 8, 3)
    >>> bool(jnp.allclose(p.T @ p, jnp.eye(3), atol=1e-6))
    True
  """
  i = 2 * jnp.arange(size, dtype=jnp.uint32)[:, None] + 1
  j = 2 * jnp.arange(rank, dtype=jnp.uint32)[None, :] + 1
  # Whole turns are taken off in integers: cos of a large angle is inexact.
  turn = (i * j) % jnp.uint32(8 * size)
  angle = turn.astype(jnp.float32) * jnp.float32(jnp.pi / (4 * size))
  signs = jax.random.rademacher(key, (size, 1), jnp.float32)
  return signs * jnp.float32((2 / size) ** 0.5) * jnp.cos(angle)


def random_basis(key: jax.Array, size: int, rank: int) -> jax.Array:
  """An orthonormal basis drawn uniformly among all (Haar's measure).

  That is what the Gram-Schmidt process makes of independent normal numbers.

  Args:
    key: Random key.
    size: Number of rows m.
    rank: Number of columns r.

  Returns:
    float32 (m, r) with orthonormal columns.

  Example:
    >>> p = random_basis(jax.random.key(0), 8, 3)
    >>> bool(jnp.allclose(p.T @ p, jnp.eye(3), atol=1e-6))
    True
  """
  return linalg.orthonormalize(
    jax.random.normal(key, (size, rank), jnp.float32)
  )


def find_basis(
  g: jax.Array, old: jax.Array, side: str, method: str, iterations: jax.Array
) -> jax.Array:
  """The basis of one gradient's dominant subspace.

  A gradient that is zero or not finite tells nothing, and `old` is kept.

  Args:
    g: One gradient (m, n).
    old: The basis so far, (m, r) for `left` and (n, r) for `right`.
    side: `left` or `right`.
    method: `subspace`, warm-started subspace iteration, or `svd`, exact.
    iterations: Number of iterations for `subspace`, int32 scalar.

  Returns:
    Basis of the shape and dtype of `old`.

  Example:
    >>> g = jnp.outer(jnp.arange(1.0, 5.0), jnp.ones(3))
    >>> old = start_basis(jax.random.key(0), 4, 1)
    >>> new = find_basis(g, old, "left", "subspace", 2)
    >>> lifted = lift(project(g, {"left": new}), {"left": new})
    >>> bool(jnp.allclose(lifted, g, atol=1e-4))
    True
  """
  if method == "svd":
    return svd_basis(g, old, side)[0]
  return iterate(lambda basis: gram(g, basis, side), old, iterations)[0]


def svd_basis(
  g: jax.Array, old: jax.Array, side: str
) -> tuple[jax.Array, jax.Array]:
  """Singular vectors, signed so that every backend gives the same ones.

  Args:
    g: One gradient (m, n).
    old: The basis so far.
    side: `left` or `right`.

  Returns:
    The basis, and whether the gradient told anything.
  """
  g = g.astype(jnp.float32)
  largest = jnp.max(jnp.abs(g))
  told = jnp.isfinite(largest) & (largest > 0)
  g = jnp.where(told, g / jnp.where(told, largest, 1), 0)
  rank = old.shape[-1]
  u, _, vh = _svd(g)
  found = u[:, :rank] if side == "left" else vh[:rank].T
  peak = jnp.argmax(jnp.abs(found), axis=0)
  sign = jnp.sign(jnp.take_along_axis(found, peak[None], axis=0))
  found = found * jnp.where(sign == 0, 1, sign)
  return _where_told(told, found, old)


def gram(g: jax.Array, basis: jax.Array, side: str) -> jax.Array:
  r"""A gradient's Gram operator on a basis, but for a positive factor.

  Args:
    g: One gradient (m, n).
    basis: Its basis on that side.
    side: `left`, for :math:`G G^\top P`, or `right`, for :math:`G^\top G Q`.

  Returns:
    The image, float32 of the shape of the basis.
  """
  low = projection.project(g, {side: basis})
  # Scaled, so that the squares of tiny and huge gradients stay in range.
  low = _scaled(low, jnp.sum(jnp.abs(low)))
  spec = "mn,rn->mr" if side == "left" else "mn,mr->nr"
  return linalg.matmul(spec, g, low).astype(jnp.float32)


def iterate(
  gram_of: Callable[[jax.Array], jax.Array],
  old: jax.Array,
  iterations: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  r"""Subspace iteration from a basis, with a shifted Gram operator.

  :math:`P \leftarrow \mathrm{orth}(Y / \|Y\|_F + \epsilon P)` with
  :math:`Y = G G^\top P`. The shift keeps the eigenvectors, gives every iterate
  full rank whatever the gradient is, and bounds its condition number.

  Args:
    gram_of: From a basis to its image, see :func:`gram`.
    old: The basis so far.
    iterations: Number of iterations, int32 scalar.

  Returns:
    The basis, and whether the gradient told anything: one that is zero or not
    finite does not, and leaves the basis `old`.
  """

  def once(_, carry):
    basis, told = carry
    y = gram_of(basis)
    size = jnp.sum(jnp.abs(y))
    y = _scaled(y, size)  # squares must stay in range
    y = _scaled(y, jnp.sqrt(jnp.sum(y * y)))
    told &= (size > 0) & jnp.isfinite(size)
    return linalg.orthonormalize(y + _GRAM_SHIFT * basis), told

  start = (old.astype(jnp.float32), jnp.bool_(True))
  found, told = jax.lax.fori_loop(0, iterations, once, start)
  return _where_told(told, found, old)


def _scaled(x: jax.Array, size: jax.Array) -> jax.Array:
  return x / jnp.where(size > 0, size, 1)


def _where_told(
  told: jax.Array, found: jax.Array, old: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The basis that was found, unless there was nothing to find."""
  told &= jnp.isfinite(jnp.sum(found))
  return jnp.where(told, found, old.astype(jnp.float32)).astype(old.dtype), told


@jax.custom_batching.sequential_vmap
def _svd(g: jax.Array) -> tuple[jax.Array, ...]:
  """An exact decomposition that never becomes a batched one under `vmap`."""
  return tuple(jnp.linalg.svd(g, full_matrices=False))
