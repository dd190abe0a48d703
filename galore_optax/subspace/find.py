"""Finds the basis of a gradient's dominant subspace, or a random basis."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax import linalg
from galore_optax.subspace import projection
from galore_optax.tree import sides

METHODS = ("subspace", "svd", "random")

# Shift of the Gram operator: bounds the condition number of an iterate by 1e6.
_GRAM_SHIFT = 1e-6


def start_basis(key: jax.Array, size: int, rank: int) -> jax.Array:
  r"""An orthonormal basis to start from, computed elementwise.

  Its columns are the first r of a cosine transform (type IV) with random signs,
  :math:`P_{ij} = s_i \sqrt{2/m} \cos(\pi (2 i + 1)(2 j + 1) / 4 m)`. They are
  exactly orthonormal, and like those of a random basis they have a component in
  every coordinate: no entry is zero.

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
  # The period is taken off in integers: cos of a large angle is inexact.
  phase = (i * j) % jnp.uint32(8 * size)
  angle = phase.astype(jnp.float32) * jnp.float32(jnp.pi / (4 * size))
  signs = jax.random.rademacher(key, (size, 1), jnp.float32)
  return signs * jnp.float32((2 / size) ** 0.5) * jnp.cos(angle)


def random_basis(key: jax.Array, size: int, rank: int) -> jax.Array:
  """An orthonormal basis drawn uniformly among all (from the Haar measure).

  It is the Gram-Schmidt process applied to independent normal numbers.

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

  If the gradient is zero or not finite, `old` is returned.

  Args:
    g: One gradient, (m, n) or a tensor.
    old: The present basis, (m, r) for `left` and (n, r) for `right`.
    side: `left` or `right`; of a tensor `axis0` and so on.
    method: `subspace`, subspace iteration from `old`; or `svd`, exact.
    iterations: Number of iterations for `subspace`, int32 scalar.

  Returns:
    Basis of the shape and dtype of `old`.

  Example:
    >>> g = jnp.outer(jnp.arange(1.0, 5.0), jnp.ones(3))
    >>> old = start_basis(jax.random.key(0), 4, 1)
    >>> new = find_basis(g, old, "left", "subspace", 2)
    >>> low = projection.project(g, {"left": new})
    >>> lifted = projection.lift(low, {"left": new})
    >>> bool(jnp.allclose(lifted, g, atol=1e-4))
    True
  """
  if method == "svd":
    return svd_basis(g, old, side)[0]
  return iterate(lambda basis: gram(g, basis, side), old, iterations)[0]


def svd_basis(
  g: jax.Array, old: jax.Array, side: str
) -> tuple[jax.Array, jax.Array]:
  """The first singular vectors, with signs that are equal on all backends.

  Args:
    g: One gradient, (m, n) or a tensor, whose singular vectors are those of the
      unfolding along the side's axis.
    old: The present basis.
    side: As for :func:`find_basis`.

  Returns:
    The basis, and whether the gradient was finite and non-zero.
  """
  g, side = projection.unfold(g.astype(jnp.float32), side)
  largest = jnp.max(jnp.abs(g))
  valid = jnp.isfinite(largest) & (largest > 0)
  g = jnp.where(valid, g / jnp.where(valid, largest, 1), 0)
  rank = old.shape[-1]
  u, _, vh = _svd(g)
  new = u[:, :rank] if side == "left" else vh[:rank].T
  peak = jnp.argmax(jnp.abs(new), axis=0)
  sign = jnp.sign(jnp.take_along_axis(new, peak[None], axis=0))
  new = new * jnp.where(sign == 0, 1, sign)
  return _new_or_old(valid, new, old)


def gram(g: jax.Array, basis: jax.Array, side: str) -> jax.Array:
  r"""A gradient's Gram operator applied to a basis, up to a positive factor.

  Args:
    g: One gradient, (m, n) or a tensor.
    basis: A basis of that side.
    side: `left`, for :math:`G G^\top P`, or `right`, for :math:`G^\top G Q`; of
      a tensor `axis0` and so on, for :math:`G_{(i)} G_{(i)}^\top P` with the
      unfolding :math:`G_{(i)}`.

  Returns:
    The image, float32 of the shape of the basis.
  """
  low = projection.project(g, {side: basis})
  low = scaled(low)
  if sides.is_tensor_side(side):
    return projection.tensor_gram(g, low, side).astype(jnp.float32)
  spec = "mn,rn->mr" if side == "left" else "mn,mr->nr"
  return linalg.matmul(spec, g, low).astype(jnp.float32)


def iterate(
  gram_of: Callable[[jax.Array], jax.Array],
  old: jax.Array,
  iterations: Any,
) -> tuple[jax.Array, jax.Array]:
  r"""Subspace iteration from a basis, with a shifted Gram operator.

  :math:`P \leftarrow \mathrm{orth}(Y / \|Y\|_F + \epsilon P)` with
  :math:`Y = G G^\top P`. The shift does not change the eigenvectors. It gives
  every iterate full rank whatever the gradient is, and bounds its condition
  number.

  Args:
    gram_of: From a basis to its image, see :func:`gram`.
    old: The present basis.
    iterations: Number of iterations; if it is traced, there is no reverse-mode
      differentiation.

  Returns:
    The basis, and whether the gradient was finite and non-zero. If it was not,
    the basis is `old`.
  """

  def once(_, carry):
    basis, valid = carry
    y = gram_of(basis)
    size = jnp.sum(jnp.abs(y))
    y = _scaled(y, size)  # squares must stay in range
    y = _scaled(y, jnp.sqrt(jnp.sum(y * y)))
    valid &= (size > 0) & jnp.isfinite(size)
    return linalg.orthonormalize(y + _GRAM_SHIFT * basis), valid

  basis = old.astype(jnp.float32)
  # True, and in `shard_map` as varying over devices as the basis.
  start = basis, jnp.isfinite(jnp.sum(basis))
  if isinstance(iterations, jax.core.Tracer):
    rounds = iterations.astype(jnp.int32)
  else:
    rounds = int(iterations)
  if isinstance(rounds, int) and rounds == 1:
    new, valid = once(0, start)
  else:
    new, valid = jax.lax.fori_loop(0, rounds, once, start)
  return _new_or_old(valid, new, old)


def scaled(x: jax.Array) -> jax.Array:
  """An array over its sum of absolute values: the squares are then in range."""
  return _scaled(x, jnp.sum(jnp.abs(x)))


def _scaled(x: jax.Array, size: jax.Array) -> jax.Array:
  return x / jnp.where(size > 0, size, 1)


def _new_or_old(
  valid: jax.Array, new: jax.Array, old: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The new basis if it is valid and finite, else the old one; and which."""
  valid &= jnp.isfinite(jnp.sum(new))
  basis = jnp.where(valid, new, old.astype(jnp.float32)).astype(old.dtype)
  return basis, valid


@jax.custom_batching.sequential_vmap
def _svd(g: jax.Array) -> tuple[jax.Array, ...]:
  """Singular value decomposition; under `vmap`, of one matrix at a time."""
  return tuple(jnp.linalg.svd(g, full_matrices=False))
