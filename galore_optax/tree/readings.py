"""The ways to read a leaf: as matrices, or as tensors."""

import itertools
from collections.abc import Iterable, Iterator

from galore_optax.tree import matrix_view, tensor_view
from galore_optax.tree import sides as sides_lib
from galore_optax.tree.rules import Projection

View = matrix_view.MatrixView | tensor_view.TensorView


def takes_names(how: Projection) -> bool:
  """Whether names of axes decide what counts matrices or tensors."""
  if how.tensor is not None:
    return how.stack is None
  return (how.rows, how.cols) == (None, None)


def read(
  shape: tuple[int, ...], how: Projection, stacked: tuple[int, ...]
) -> View | None:
  """How a leaf is read if some of its axes stack matrices or tensors."""
  if how.tensor is not None:
    if how.stack is not None:
      return tensor_view.tensor_view(shape, how.tensor, how.stack)
    named = matrix_view.axes(shape, how.tensor, "tensor")
    counting = tuple(axis for axis in stacked if axis not in named)
    return tensor_view.tensor_view(shape, how.tensor, counting or None)
  if not stacked or not takes_names(how):
    return matrix_view.matrix_view(shape, how.rows, how.cols)
  others = [axis for axis in range(len(shape)) if axis not in stacked]
  return matrix_view.matrix_view(shape, *others[-2:]) if others[1:] else None


def possible(shape: tuple[int, ...], how: Projection | None) -> Iterator[View]:
  """The ways to read a leaf as matrices or tensors, the usual one first.

  If no rule names its axes, any of them may stack layers. A leaf that no rule
  projects is not read so.
  """
  if how is None:
    return
  usual = read(shape, how, ())
  if usual is None:
    return
  yield usual
  if not takes_names(how):
    return
  for view in _stacked(shape, how):
    if view is not None and view != usual:
      yield view


def has_sides(view: View, sides: Iterable[str]) -> bool:
  """Whether sides that a state has are sides of matrices or tensors."""
  is_tensor = isinstance(view, tensor_view.TensorView)
  return all(
    sides_lib.is_tensor_side(side) == is_tensor
    and sides_lib.axis_of(side) < len(view.dims)
    for side in sides
  )


def _stacked(shape: tuple[int, ...], how: Projection) -> Iterator[View | None]:
  """The ways to read a leaf of which some axes may stack layers."""
  if how.tensor is None:
    for rows, cols in itertools.combinations(range(len(shape)), 2):
      yield matrix_view.matrix_view(shape, rows, cols)
    return
  named = matrix_view.axes(shape, how.tensor, "tensor")
  others = [axis for axis in range(len(shape)) if axis not in named]
  for count in range(1, len(others) + 1):
    for stack in itertools.combinations(others, count):
      yield tensor_view.tensor_view(shape, how.tensor, stack)
