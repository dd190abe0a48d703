"""Projects gradients on bases, lifts updates back, and stores bases."""

import dataclasses
import string
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax import flax_dicts, linalg
from galore_optax.quantization import qarray
from galore_optax.tree import sides

Bases = Mapping[str, jax.Array]


@flax_dicts.serializable("seed", lambda basis: "x".join(map(str, basis.shape)))
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RandomBasis:
  """A random projection of which only the seed is stored.

  All matrices of a stack share it. Its entries are normal with variance 1 / r,
  so that it preserves the norms of vectors in expectation. Its columns are only
  approximately orthogonal.

  Attributes:
    seed: Random seed of the entries, uint32 scalar.
    shape: Shape (..., m, r) of the stack of projections.

  Example:
    >>> p = read({"left": RandomBasis(jnp.uint32(7), (3, 64, 16))})["left"]
    >>> p.shape, bool(abs(jnp.mean(p * p) - 1 / 16) < 0.01)
    ((64, 16), True)
  """

  seed: Any
  shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

  def __post_init__(self):
    """Makes the class known to Flax, which may have been imported since."""
    flax_dicts.register()

  def draw(self) -> jax.Array:
    """The projection (m, r), float32; with a stack of seeds, one for each."""
    size, rank = self.shape[-2:]

    def normal(seed: jax.Array) -> jax.Array:
      key = jax.random.key(seed)
      return jax.random.normal(key, (size, rank), jnp.float32) / rank**0.5

    drawn = jax.vmap(normal)(jnp.reshape(self.seed, -1))
    return drawn.reshape(*jnp.shape(self.seed), size, rank)

  def renewed(self, due: jax.Array) -> "RandomBasis":
    """The next projection if `due` is true, else this one."""
    following = jax.random.bits(jax.random.key(self.seed), (), jnp.uint32)
    return dataclasses.replace(self, seed=jnp.where(due, following, self.seed))


def read(stored: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Bases as arrays, whatever the format in which the state stores them.

  Args:
    stored: Side to basis: an array; or a :class:`galore_optax.QArray` of the
      transposed basis; or a `RandomBasis`. (A basis is transposed so that a
      block lies within one direction. Compilers choose that layout for the
      product, and need no copy.)

  Returns:
    Side to basis (..., m, r) or (..., n, r). A `RandomBasis` has no stack axes.
  """
  return {side: _read(x) for side, x in stored.items()}


def read_stacked(stored: Mapping[str, Any]) -> dict[str, jax.Array]:
  """As :func:`read`, but random bases have the stack axes, too."""
  return {
    side: jnp.broadcast_to(x, stored[side].shape)
    if isinstance(stored[side], RandomBasis) and not jnp.ndim(stored[side].seed)
    else x
    for side, x in read(stored).items()
  }


def _read(stored: Any) -> jax.Array:
  if isinstance(stored, RandomBasis):
    return stored.draw()
  if qarray.is_quantized(stored):
    return jnp.swapaxes(qarray.dequantize(stored), -1, -2)
  return stored


def basis_shape(stored: Any) -> tuple[int, ...]:
  """Shape (..., m, r) of a basis, whatever the format the state keeps it in."""
  shape = stored.shape
  if qarray.is_quantized(stored):
    return (*shape[:-2], shape[-1], shape[-2])
  return shape


def basis_shapes(
  projector: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, tuple[int, ...]]]:
  """Path to side to shape of a basis, of all bases in a state.

  Args:
    projector: Path to side to basis, as the state keeps them.
  """
  return {
    path: {side: basis_shape(x) for side, x in stored.items()}
    for path, stored in projector.items()
  }


def write(bases: Bases, stored: Mapping[str, Any]) -> dict[str, Any]:
  """Bases in the format in which the state stores them.

  A quantized basis is rounded to the nearest, and not made orthonormal again:
  the gradient is projected and lifted with the same, slightly skew basis.

  Args:
    bases: Side to basis.
    stored: Side to the stored basis that it replaces.

  Returns:
    The bases, each in the format of the one that it replaces.
  """
  return {
    side: qarray.requantize(stored[side], jnp.swapaxes(x, -1, -2))
    if qarray.is_quantized(stored[side])
    else x.astype(stored[side].dtype)
    for side, x in bases.items()
  }


def project(g: jax.Array, bases: Bases) -> jax.Array:
  r"""Projects gradients on their bases, :math:`R = P^\top G Q`.

  A tensor is multiplied by a factor along each projected axis, :math:`R = G
  \times_1 P_1^\top \times_2 P_2^\top \dots`.

  Args:
    g: Gradients (..., m, n), or of tensors.
    bases: `left` (..., m, r), `right` (..., n, r), or both. Of tensors `axis0`
      and so on, see :mod:`galore_optax.tree.sides`.

  Returns:
    Projected gradients: (..., r, n), (..., m, r) or (..., r, r); of tensors,
    with r in place of the size of each projected axis.

  Example:
    >>> bases = {"left": jnp.eye(4)[:, :2]}
    >>> project(jnp.ones((4, 3)), bases).shape
    (2, 3)
  """
  if "left" in bases:
    g = linalg.matmul("...mr,...mn->...rn", bases["left"], g)
  if "right" in bases:
    g = linalg.matmul("...mn,...nr->...mr", g, bases["right"])
  for side in _by_shrinking(bases):
    tensor, factor, core = _specs(g, bases[side], side)
    g = linalg.matmul(f"...{tensor},...{factor}->...{core}", g, bases[side])
  return g


def lift(low: jax.Array, bases: Bases) -> jax.Array:
  r"""Lifts low-rank updates back, :math:`U = P N Q^\top`.

  Args:
    low: Updates of the shape of projected gradients.
    bases: As for :func:`project`.

  Returns:
    Updates (..., m, n), or of tensors.
  """
  if "right" in bases:
    low = linalg.matmul("...mr,...nr->...mn", low, bases["right"])
  if "left" in bases:
    low = linalg.matmul("...mr,...rn->...mn", bases["left"], low)
  for side in reversed(_by_shrinking(bases)):
    tensor, factor, core = _specs(low, bases[side], side)
    low = linalg.matmul(f"...{core},...{factor}->...{tensor}", low, bases[side])
  return low


def _by_shrinking(bases: Bases) -> list[str]:
  """The sides of tensors, first those whose basis shrinks a tensor most."""
  names = [side for side in bases if sides.is_tensor_side(side)]
  share = lambda side: bases[side].shape[-1] / bases[side].shape[-2]
  return sorted(names, key=share)


def _specs(x: jax.Array, basis: jax.Array, side: str) -> tuple[str, str, str]:
  """Letters of the axes of a tensor, of a factor, and of the tensor's core.

  Args:
    x: Tensors, or their cores; the stack axes are those of `basis`.
    basis: The factor of one axis.
    side: Which axis.
  """
  tensor = string.ascii_lowercase[: tensor_ndim(x, basis)]
  axis = tensor[sides.axis_of(side)]
  return tensor, f"{axis}R", tensor.replace(axis, "R")


def tensor_ndim(x: jax.Array, basis: jax.Array) -> int:
  """Number of axes of one tensor in a stack.

  Args:
    x: Tensors, or their cores.
    basis: The factors of one axis, with the same stack axes.
  """
  return x.ndim - (basis.ndim - 2)


def tensor_gram(g: jax.Array, low: jax.Array, side: str) -> jax.Array:
  r"""Product of one tensor's unfolding with that of its projection.

  With the unfolding :math:`G_{(i)}`, whose rows are along axis i, and that of
  :math:`R = G \times_i P^\top`, it is :math:`G_{(i)} R_{(i)}^\top`.

  Args:
    g: One tensor.
    low: The tensor projected on the factor of one axis.
    side: Which axis.

  Returns:
    Array (n, r), float32 at least.
  """
  tensor = string.ascii_lowercase[: g.ndim]
  axis = tensor[sides.axis_of(side)]
  core = tensor.replace(axis, "R")
  return linalg.matmul(f"{tensor},{core}->{axis}R", g, low)


def unfold(g: jax.Array, side: str) -> tuple[jax.Array, str]:
  """One gradient as a matrix, and the side of it.

  Args:
    g: One gradient, (m, n) or a tensor.
    side: The side.

  Returns:
    A matrix as it is. Of a tensor the unfolding, whose rows are along the
    side's axis, and `left`.
  """
  if not sides.is_tensor_side(side):
    return g, side
  g = jnp.moveaxis(g, sides.axis_of(side), 0)
  return g.reshape(len(g), -1), "left"


def overlap(new: Bases, old: Bases) -> dict[str, jax.Array]:
  r"""Overlap of new bases with old ones, :math:`C = P_{new}^\top P_{old}`.

  It expresses the old directions in the new ones, see
  :func:`galore_optax.subspace.moments.rotate`.

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

  If the numerical rank of the gradient is below r, the remaining rows of R are
  rounding errors, about 1e-7 of the largest row. A normalizing optimizer such
  as Adam would scale them up to full-size updates in random directions.

  Args:
    low: Projected gradients R. One with a non-finite entry is zeroed.
    bases: The bases they were made with.
    tolerance: Directions whose norm is below this fraction of the Frobenius
      norm are zeroed; scalar.

  Returns:
    R with the null directions exactly zero.
  """
  if any(map(sides.is_tensor_side, bases)):
    return _drop_null_of_tensors(low, bases, tolerance)
  axes = [axis for side, axis in (("left", -1), ("right", -2)) if side in bases]
  energy = low * low
  keep = jnp.bool_(True)
  for axis in axes:
    of_direction = jnp.sum(energy, axis)
    # Comparisons with NaN are false. Sums compile faster than maxima.
    total = jnp.sum(of_direction, -1)[..., None]
    signal = (of_direction >= tolerance**2 * total) & (total < jnp.inf)
    keep &= jnp.expand_dims(signal, axis)
  return jnp.where(keep, low, 0)


def _drop_null_of_tensors(
  low: jax.Array, bases: Bases, tolerance: jax.Array
) -> jax.Array:
  """As :func:`drop_null`, along each projected axis of cores."""
  ndim = tensor_ndim(low, next(iter(bases.values())))
  axes = tuple(range(low.ndim - ndim, low.ndim))
  energy = low * low
  total = jnp.sum(energy, axes, keepdims=True)
  keep = total < jnp.inf  # false for NaN
  for side in bases:
    own = axes[sides.axis_of(side)]
    others = tuple(axis for axis in axes if axis != own)
    of_direction = jnp.sum(energy, others, keepdims=True)
    keep &= of_direction >= tolerance**2 * total
  return jnp.where(keep, low, 0)
