"""Reads a leaf as a stack of tensors, of which some axes are projected."""

import dataclasses
import math
from collections.abc import Sequence

import jax

from galore_optax.tree import matrix_view


@dataclasses.dataclass(frozen=True)
class TensorView:
  r"""A way to read an array as a stack of tensors.

  Batch axes count tensors, and come first in the stack. The others are the axes
  of a tensor: :math:`x \mapsto X \in \mathbb{R}^{b_1 \times \dots \times n_0
  \times \dots \times n_{k-1}}`. It has what :class:`MatrixView` has, so that
  most code takes either.

  Attributes:
    shape: Shape of the array.
    batch: Axes of the array that count tensors, ascending.
    factored: Axes of one tensor that are projected, as a rule names them. A
      tensor's axes are numbered without those that count tensors.

  Example:
    >>> import jax.numpy as jnp
    >>> view = TensorView((4, 3, 3, 16, 32), batch=(0,), factored=(2, 3))
    >>> view.dims
    (3, 3, 16, 32)
    >>> view.as_stack(jnp.ones((4, 3, 3, 16, 32))).shape
    (4, 3, 3, 16, 32)
  """

  shape: tuple[int, ...]
  batch: tuple[int, ...]
  factored: tuple[int, ...]

  @property
  def axes(self) -> tuple[int, ...]:
    """Axes of the array that are a tensor's, ascending."""
    return _without(len(self.shape), self.batch)

  @property
  def stack(self) -> tuple[int, ...]:
    """Sizes of the batch axes."""
    return tuple(self.shape[axis] for axis in self.batch)

  @property
  def dims(self) -> tuple[int, ...]:
    """Shape of one tensor."""
    return tuple(self.shape[axis] for axis in self.axes)

  @property
  def count(self) -> int:
    """Number of tensors."""
    return math.prod(self.stack)

  @property
  def _permutation(self) -> tuple[int, ...]:
    """Axes of the array, in the sequence in which the stack has them."""
    return (*self.batch, *self.axes)

  def as_stack(self, x: jax.Array) -> jax.Array:
    """Reads `x` as a stack of tensors.

    Args:
      x: Array of shape `self.shape`.

    Returns:
      The same entries, with the batch axes first.
    """
    if self._permutation == tuple(range(len(self.shape))):
      return x
    return x.transpose(self._permutation)

  def from_stack(self, x: jax.Array) -> jax.Array:
    """Undoes :meth:`as_stack`.

    Args:
      x: The stack.

    Returns:
      The same entries, of shape `self.shape`.
    """
    if self._permutation == tuple(range(len(self.shape))):
      return x
    return x.transpose(sorted(range(x.ndim), key=self._permutation.__getitem__))

  def spec(self, spec: Sequence) -> tuple:
    """Partition of the stack that follows from the array's partition.

    Args:
      spec: As for :meth:`MatrixView.spec`.

    Returns:
      One entry a batch axis, then one for each axis of a tensor.
    """
    spec = matrix_view.aligned(spec, len(self.shape))
    return tuple(spec[axis] for axis in self._permutation)


def tensor_view(
  shape: Sequence[int],
  factored: matrix_view.Axes,
  stack: matrix_view.Axes | None = None,
) -> TensorView:
  """Reads an array of a shape as a stack of tensors.

  Args:
    shape: Shape of the array.
    factored: Axis or axes of the array that are projected.
    stack: Axis or axes that count tensors; None for no axis. All other axes
      stay whole.

  Returns:
    The view.

  Raises:
    ValueError: If an axis does not exist or is named twice.

  Example:
    >>> tensor_view((3, 3, 16, 32), (2, 3)).dims
    (3, 3, 16, 32)
  """
  shape = tuple(shape)
  batch = () if stack is None else matrix_view.axes(shape, stack, "stack")
  named = matrix_view.axes(shape, factored, "tensor")
  if len({*named, *batch}) != len(named) + len(batch):
    raise ValueError(
      f"`tensor` and `stack` must name different axes, got tensor={factored} "
      f"and stack={stack} for an array of shape {shape}."
    )
  batch = tuple(sorted(batch))
  axes = _without(len(shape), batch)
  return TensorView(shape, batch, tuple(axes.index(axis) for axis in named))


def _without(ndim: int, axes: Sequence[int]) -> tuple[int, ...]:
  return tuple(axis for axis in range(ndim) if axis not in axes)
