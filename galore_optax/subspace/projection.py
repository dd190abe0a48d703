"""Projects gradients on bases, and lifts updates back."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax import linalg
from galore_optax.quantization import qarray

Bases = Mapping[str, jax.Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["seed"],
  meta_fields=["shape"],
)
@dataclasses.dataclass(frozen=True)
class RandomBasis:
  """A random projection that is never stored, only its seed.

  All matrices of a stack share it. Its entries are normal with variance 1 / r,
  so that it keeps the norms of vectors in the mean; its columns are not quite
  orthogonal.

  Attributes:
    seed: Gives the entries; uint32 scalar.
    shape: Shape (..., m, r) of the stack of projections.

  Example:
    >>> p = read({"left": RandomBasis(jnp.uint32(7), (3, 64, 16))})["left"]
    >>> p.shape, bool(abs(jnp.mean(p * p) - 1 / 16) < 0.01)
    ((64, 16), True)
  """

  seed: Any
  shape: tuple[int, ...]

  def draw(self) -> jax.Array:
    """The projection (m, r), float32; one for each seed."""
    size, rank = self.shape[-2:]

    def normal(seed: jax.Array) -> jax.Array:
      key = jax.random.key(seed)
      return jax.random.normal(key, (size, rank), jnp.float32) / rank**0.5

    drawn = jax.vmap(normal)(jnp.reshape(self.seed, -1))
    return drawn.reshape(*jnp.shape(self.seed), size, rank)

  def renewed(self, due: jax.Array) -> "RandomBasis":
    """The next projection where it is due, this one otherwise."""
    after = jax.random.bits(jax.random.key(self.seed), (), jnp.uint32)
    return dataclasses.replace(self, seed=jnp.where(due, after, self.seed))


def read(kept: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Bases as arrays, from how the state keeps them.

  Args:
    kept: Side to basis: an array, or a :class:`galore_optax.QArray` of the
      transposed basis, whose blocks lie within one direction and which
      compilers lay out like that without copying it; or a `RandomBasis`, which
      is without the axes that stack matrices.

  Returns:
    Side to basis (..., m, r) or (..., n, r).
  """
  return {side: _read(x) for side, x in kept.items()}


def read_stacked(kept: Mapping[str, Any]) -> dict[str, jax.Array]:
  """As :func:`read`, with the axes that stack matrices on random bases too."""
  return {
    side: jnp.broadcast_to(x, kept[side].shape)
    if isinstance(kept[side], RandomBasis) and not jnp.ndim(kept[side].seed)
    else x
    for side, x in read(kept).items()
  }


def _read(kept: Any) -> jax.Array:
  if isinstance(kept, RandomBasis):
    return kept.draw()
  if qarray.is_quantized(kept):
    return jnp.swapaxes(qarray.dequantize(kept), -1, -2)
  return kept


def shape_of(kept: Any) -> tuple[int, ...]:
  """Shape (..., m, r) of a basis that the state keeps."""
  shape = kept.shape
  if qarray.is_quantized(kept):
    return (*shape[:-2], shape[-1], shape[-2])
  return shape


def write(bases: Bases, kept: Mapping[str, Any]) -> dict[str, Any]:
  """Bases as the state keeps them.

  A quantised basis is rounded to the nearest and not made orthonormal again:
  the gradient is projected and lifted with the same, slightly skew basis.

  Args:
    bases: Side to basis.
    kept: Gives the formats.

  Returns:
    The bases, each in the format of its counterpart.
  """
  return {
    side: qarray.requantize(kept[side], jnp.swapaxes(x, -1, -2))
    if qarray.is_quantized(kept[side])
    else x.astype(kept[side].dtype)
    for side, x in bases.items()
  }


def project(g: jax.Array, bases: Bases) -> jax.Array:
  r"""Projects gradients on their bases, :math:`R = P^\top G Q`.

  Args:
    g: Gradients (..., m, n).
    bases: `left` (..., m, r), `right` (..., n, r), or both.

  Returns:
    Projected gradients: (..., r, n), (..., m, r) or (..., r, r).

  Example:
    >>> bases = {"left": jnp.eye(4)[:, :2]}
    >>> project(jnp.ones((4, 3)), bases).shape
    (2, 3)
  """
  if "left" in bases:
    g = linalg.matmul("...mr,...mn->...rn", bases["left"], g)
  if "right" in bases:
    g = linalg.matmul("...mn,...nr->...mr", g, bases["right"])
  return g


def lift(low: jax.Array, bases: Bases) -> jax.Array:
  r"""Lifts low-rank updates back, :math:`U = P N Q^\top`.

  Args:
    low: Updates (..., r, n), (..., m, r) or (..., r, r).
    bases: The bases they were made in.

  Returns:
    Updates (..., m, n).
  """
  if "right" in bases:
    low = linalg.matmul("...mr,...nr->...mn", low, bases["right"])
  if "left" in bases:
    low = linalg.matmul("...mr,...rn->...mn", bases["left"], low)
  return low


def overlap(new: Bases, old: Bases) -> dict[str, jax.Array]:
  r"""How the new bases see the old ones, :math:`C = P_{new}^\top P_{old}`.

  Args:
    new: New bases.
    old: Old bases of the same shapes.

  Returns:
    Side to C of shape (..., r, r).
  """
  return {
    side: linalg.matmul("...mr,...ms->...rs", new[side], old[side])
    for side in new
  }


def drop_null(low: jax.Array, bases: Bases, tolerance: jax.Array) -> jax.Array:
  """Zeroes the directions in which a projected gradient is rounding noise.

  Where the gradient's numerical rank is below r, the remaining rows of R hold
  rounding errors, some 1e-7 of the largest row. A normalising optimizer such
  as Adam would blow them up to full-size updates in random directions.

  Args:
    low: Projected gradients R. One that is not finite anywhere counts as zero.
    bases: The bases they were made with.
    tolerance: Directions whose norm is below this fraction of the Frobenius
      norm are zeroed; scalar.

  Returns:
    R with the null directions exactly zero.
  """
  axes = [axis for side, axis in (("left", -1), ("right", -2)) if side in bases]
  energy = low * low
  keep = jnp.bool_(True)
  for axis in axes:
    here = jnp.sum(energy, axis)
    # Comparisons with nan are false. Sums compile faster than maxima.
    whole = jnp.sum(here, -1)[..., None]
    told = (here >= tolerance**2 * whole) & (whole < jnp.inf)
    keep &= jnp.expand_dims(told, axis)
  return jnp.where(keep, low, 0)
