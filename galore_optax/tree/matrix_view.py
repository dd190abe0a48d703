"""Reads a leaf as a stack of matrices.

Only this module and `tensor_view` transpose leaves.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax

Axes = int | Sequence[int]


@dataclasses.dataclass(frozen=True)
class MatrixView:
  r"""A way to read an array of any shape as a stack of matrices.

  Each axis of the array is a batch, row or column axis. Row axes are flattened
  to one, and so are column axes; batch axes are kept:
  :math:`x \mapsto X \in \mathbb{R}^{b_1 \times \dots \times m \times n}`.

  Attributes:
    shape: Shape of the array.
    batch: Axes that count matrices, as they follow each other in the array.
    rows: Axes whose product is the number of rows m; the last varies fastest.
    cols: Axes whose product is the number of columns n; likewise.

  Example:
    >>> import jax.numpy as jnp
    >>> view = MatrixView((4, 8, 2, 3), batch=(0,), rows=(1,), cols=(2, 3))
    >>> view.matrix_shape
    (4, 8, 6)
    >>> view.from_stack(view.as_stack(jnp.ones((4, 8, 2, 3)))).shape
    (4, 8, 2, 3)
  """

  shape: tuple[int, ...]
  batch: tuple[int, ...]
  rows: tuple[int, ...]
  cols: tuple[int, ...]

  @property
  def stack(self) -> tuple[int, ...]:
    """Sizes of the batch axes."""
    return tuple(self.shape[axis] for axis in self.batch)

  @property
  def m(self) -> int:
    """Number of rows."""
    return math.prod(self.shape[axis] for axis in self.rows)

  @property
  def n(self) -> int:
    """Number of columns."""
    return math.prod(self.shape[axis] for axis in self.cols)

  @property
  def dims(self) -> tuple[int, int]:
    """Shape of one matrix, (m, n)."""
    return self.m, self.n

  @property
  def count(self) -> int:
    """Number of matrices."""
    return math.prod(self.stack)

  @property
  def matrix_shape(self) -> tuple[int, ...]:
    """Shape of the stack, (..., m, n)."""
    return (*self.stack, *self.dims)

  @property
  def _permutation(self) -> tuple[int, ...]:
    """Axes of the array, in the sequence in which the matrices have them."""
    return (*self.batch, *self.rows, *self.cols)

  def as_stack(self, x: jax.Array) -> jax.Array:
    """Reads `x` as a stack of matrices.

    Args:
      x: Array of shape `self.shape`.

    Returns:
      The same entries, of shape (..., m, n).
    """
    if self._permutation != tuple(range(len(self.shape))):
      x = x.transpose(self._permutation)
    return x if x.shape == self.matrix_shape else x.reshape(self.matrix_shape)

  def from_stack(self, x: jax.Array) -> jax.Array:
    """Undoes :meth:`as_stack`.

    Args:
      x: Array of shape (..., m, n).

    Returns:
      The same entries, of shape `self.shape`.
    """
    ordered = tuple(self.shape[axis] for axis in self._permutation)
    x = x if x.shape == ordered else x.reshape(ordered)
    if self._permutation == tuple(range(len(self.shape))):
      return x
    return x.transpose(sorted(range(x.ndim), key=self._permutation.__getitem__))

  def spec(self, spec: Sequence) -> tuple:
    """Partition of the matrices that follows from the array's partition.

    A flattened side keeps the mesh axes of its first array axis. The partition
    of its other axes is lost in flattening.

    Args:
      spec: One entry an array axis, as in `jax.sharding.PartitionSpec`. If
        there are more entries, the first ones are ignored: they belong to axes
        of a stack of which the array is one layer.

    Returns:
      One entry a batch axis, then the entry of the rows and of the columns.
    """
    spec = aligned(spec, len(self.shape))
    first = lambda axes: spec[axes[0]] if axes else None
    batch = tuple(spec[axis] for axis in self.batch)
    return (*batch, first(self.rows), first(self.cols))


def matrix_view(
  shape: Sequence[int], rows: Axes | None = None, cols: Axes | None = None
) -> MatrixView | None:
  """Reads an array of a shape as a stack of matrices.

  Args:
    shape: Shape of the array.
    rows: Axis or axes that are flattened to rows; by default the second to
      last one.
    cols: Axis or axes that are flattened to columns; by default the last one.
      All other axes count matrices.

  Returns:
    The view, or None if the array has fewer than two axes.

  Raises:
    ValueError: If an axis does not exist or is named twice.

  Example:
    Reads a DenseGeneral kernel (embed, heads, head_dim) as one embed x (heads ·
    head_dim) matrix:

    >>> matrix_view((64, 4, 16), rows=0, cols=(1, 2)).matrix_shape
    (64, 64)
  """
  shape = tuple(shape)
  if len(shape) < 2:
    return None
  row_axes = axes(shape, -2 if rows is None else rows, "rows")
  col_axes = axes(shape, -1 if cols is None else cols, "cols")
  if len({*row_axes, *col_axes}) != len(row_axes) + len(col_axes):
    raise ValueError(
      f"`rows` and `cols` must name different axes, got rows={rows} and "
      f"cols={cols} for an array of shape {shape}. Give both when one of them "
      "is not the default (rows=-2, cols=-1)."
    )
  batch = tuple(
    axis for axis in range(len(shape)) if axis not in (*row_axes, *col_axes)
  )
  return MatrixView(shape, batch, row_axes, col_axes)


def axes(shape: tuple[int, ...], named: Axes, name: str) -> tuple[int, ...]:
  """Axes of an array as non-negative numbers.

  Args:
    shape: Shape of the array.
    named: The axis or axes, possibly counted from the end.
    name: Name of the argument, for the error.

  Returns:
    One number an axis.

  Raises:
    ValueError: If an axis does not exist, or none is named.
  """
  named = (named,) if isinstance(named, int) else tuple(named)
  ndim = len(shape)
  for axis in named:
    if not isinstance(axis, int) or not -ndim <= axis < ndim:
      raise ValueError(
        f"`{name}` must be axes between {-ndim} and {ndim - 1}, got {axis!r} "
        f"for an array of shape {shape}."
      )
  if not named:
    raise ValueError(f"`{name}` must name at least one axis, got {named!r}.")
  return tuple(axis % ndim for axis in named)


def aligned(spec: Sequence, ndim: int) -> tuple:
  """A partition with one entry an axis.

  Args:
    spec: Entries as in `jax.sharding.PartitionSpec`. If there are more than
      axes, the first ones are ignored: they belong to axes of a stack of which
      the array is one layer.
    ndim: Number of axes.
  """
  spec = tuple(spec)[max(0, len(spec) - ndim) :]
  return (*spec, *(None,) * (ndim - len(spec)))
