"""How an array is divided into blocks of elements that share a scale."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

# Elements that share a scale, as in bitsandbytes and Q-GaLore.
BLOCK = 256


def block_axis(shape: tuple[int, ...]) -> int:
  """The axis along which an array's blocks lie: the longer of the last two.

  Args:
    shape: Shape of the array.

  Returns:
    -1 or -2.

  Example:
    >>> block_axis((32, 4096, 1024)), block_axis((1024, 4096)), block_axis((9,))
    (-2, -1, -1)
  """
  return -2 if len(shape) > 1 and shape[-2] >= shape[-1] else -1


def scale_shape(shape: tuple[int, ...], block: int = BLOCK) -> tuple[int, ...]:
  """Shape of the scales of an array.

  Args:
    shape: Shape of the array.
    block: Elements of a block, at most.

  Returns:
    The shape, with the number of blocks second to last.

  Example:
    >>> scale_shape((1024, 11008)), scale_shape((11008, 1024))
    ((43, 1024), (43, 1024))
  """
  axis = block_axis(shape)
  count = -(-shape[axis] // block)
  other = shape[-2] if axis == -1 and len(shape) > 1 else shape[-1]
  return (*shape[:-2], count, other) if len(shape) > 1 else (count,)


def scale_spec(spec: tuple, shape: tuple[int, ...]) -> tuple:
  """Partition of the scales that follows from the array's.

  Args:
    spec: One entry an axis of the array.
    shape: Shape of the array.

  Returns:
    One entry an axis of the scales.
  """
  spec = (*spec, *(None,) * (len(shape) - len(spec)))
  if len(shape) < 2 or block_axis(shape) == -2:
    return spec
  return (*spec[:-2], spec[-1], spec[-2])


@dataclasses.dataclass(frozen=True)
class Blocks:
  """An array's division into blocks: (..., n, ...) to (..., b, n / b, ...).

  Attributes:
    shape: Shape of the array.
    scales: Shape of its scales.
  """

  shape: tuple[int, ...]
  scales: tuple[int, ...]

  @property
  def axis(self) -> int:
    """Axis of the array along which the elements of a block lie."""
    return block_axis(self.shape)

  @property
  def count(self) -> int:
    """Number of blocks b along that axis."""
    return self.scales[-2] if len(self.shape) > 1 else self.scales[-1]

  @property
  def length(self) -> int:
    """Number of elements of a block."""
    return max(1, -(-self.shape[self.axis] // max(self.count, 1)))

  @property
  def _axis_from_left(self) -> int:
    return len(self.shape) + self.axis

  def split(self, x: jax.Array) -> jax.Array:
    """The array in blocks, padded with zeros."""
    missing = self.count * self.length - self.shape[self.axis]
    if missing:
      padding = [(0, 0)] * x.ndim
      padding[self.axis] = (0, missing)
      x = jnp.pad(x, padding)
    before, after = self._other_axes()
    return x.reshape(*before, self.count, self.length, *after)

  def merge(self, x: jax.Array) -> jax.Array:
    """Undoes :meth:`split`."""
    before, after = self._other_axes()
    x = x.reshape(*before, self.count * self.length, *after)
    if x.shape == self.shape:
      return x
    axis = self._axis_from_left
    return jax.lax.slice_in_dim(x, 0, self.shape[axis], axis=axis)

  def reduce(self, f: Any, x: jax.Array) -> jax.Array:
    """One value a block, in the shape of the scales.

    Args:
      f: From an array and an axis to the array reduced along it.
      x: The array in blocks, see :meth:`split`.
    """
    return self._swap_axes(f(x, self.axis))

  def expand(self, scale: jax.Array) -> jax.Array:
    """One value a block, in a shape that broadcasts against :meth:`split`'s."""
    return jnp.expand_dims(self._swap_axes(scale), self.axis)

  def expand_to_array(self, scale: jax.Array) -> jax.Array:
    """The value of its block for each element, in the shape of the array."""
    before, after = self._other_axes()
    shape = (*before, self.count, self.length, *after)
    return self.merge(jnp.broadcast_to(self.expand(scale), shape))

  def _other_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    axis = self._axis_from_left
    return self.shape[:axis], self.shape[axis + 1 :]

  def _swap_axes(self, x: jax.Array) -> jax.Array:
    swapped = self.axis == -1 and len(self.shape) > 1
    return jnp.swapaxes(x, -1, -2) if swapped else x
