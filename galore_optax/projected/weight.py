"""A projected weight on its way from the parameters to the product."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.projected.gradient import Found
from galore_optax.quantization import qarray
from galore_optax.tree import matrix_view, slices


@dataclasses.dataclass(frozen=True)
class Form:
  """How an array that holds a weight, or some of its matrices, is laid out.

  Attributes:
    batch: Axes of the parameter that count its matrices.
    rows: Axes of the parameter that are the rows of a matrix.
    cols: Axes of the parameter that are the columns.
    axes: The parameter's axis that each axis of the array is. A loop over
      layers takes one away; a transposition permutes them.
    dtype: Dtype of the array.
    gradient_dtype: Dtype of projected gradients: that of the parameter.
    basis_dtype: Dtype in which new bases are handed out.
    iterations: Subspace iterations of a refresh; None if it is traced.
    varying: Mesh axes of `jax.shard_map` over which the model has declared the
      array to vary, although it does not.
    axis_name: Mesh axes over whose devices the caller sums gradients.
  """

  batch: tuple[int, ...]
  rows: tuple[int, ...]
  cols: tuple[int, ...]
  axes: tuple[int, ...]
  dtype: Any
  gradient_dtype: Any
  basis_dtype: Any
  iterations: int | None
  varying: tuple[str, ...] = ()
  axis_name: Any = None

  @property
  def kept(self) -> tuple[int, ...]:
    """The axes that are left, in the parameter's sequence."""
    return tuple(sorted(self.axes))

  @property
  def stack(self) -> tuple[int, ...]:
    """The axes that are left and count matrices, in the bases' sequence."""
    return tuple(axis for axis in self.batch if axis in self.axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
  """A weight with all that its gradient is projected with.

  Attributes:
    stored: The weight, an array or a QArray; its axes are `form.kept`.
    bases: Side to basis (..., m, r) as the state stores it.
    due: Whether the bases are due for a refresh, bool (...).
    iterations: Subspace iterations of a refresh, if the number is traced.
    slot: Zeros; their derivative is the projected gradient and its bases.
    form: How the array is laid out that the model sees.
  """

  stored: Any
  bases: Mapping[str, Any]
  due: jax.Array
  iterations: Any
  slot: Found | None
  form: Form = dataclasses.field(metadata={"static": True})

  def with_form(self, **changes: Any) -> "Weight":
    """The same weight, laid out in another way."""
    form = dataclasses.replace(self.form, **changes)
    return dataclasses.replace(self, form=form)

  def array(self) -> jax.Array:
    """The array that the model sees. It has no derivative."""
    form, x = self.form, jax.lax.stop_gradient(self.stored)
    if qarray.is_quantized(x):
      # In a loop over layers, compilers would copy all layers' codes to the
      # layout that a product with them prefers.
      x = jax.tree.map(slices.keep_layout, x)
      x = qarray.dequantize(x, form.dtype)
    permutation = tuple(map(form.kept.index, form.axes))
    x = x.astype(form.dtype)
    if permutation != tuple(range(x.ndim)):
      x = x.transpose(permutation)
    return jax.lax.pcast(x, form.varying, to="varying") if form.varying else x

  def view(self) -> matrix_view.MatrixView:
    """How the array is read as matrices."""
    form = self.form
    shape = [self.stored.shape[form.kept.index(axis)] for axis in form.axes]
    of = lambda axes: tuple(map(form.axes.index, axes))
    return matrix_view.MatrixView(
      tuple(shape), of(form.stack), of(form.rows), of(form.cols)
    )

  def can_slice(self, axis: int) -> bool:
    """Whether a loop over an axis of the array goes through its matrices."""
    form = self.form
    original = form.axes[axis]
    if original not in form.stack:
      return False
    in_front = form.kept[0] == original and form.stack[0] == original
    arrays = (self.stored, *self.bases.values())
    return in_front or not any(map(qarray.is_quantized, arrays))

  def slices(self, axis: int) -> tuple[Any, Callable[[Any], "Weight"]]:
    """What a loop over an axis reads.

    Args:
      axis: An axis of the array, see :meth:`can_slice`.

    Returns:
      Arrays with that axis in front, and a function from one element of them
      to the weight in the loop.
    """
    form = self.form
    original = form.axes[axis]
    in_stored, in_stack = map(
      lambda axes: axes.index(original), (form.kept, form.stack)
    )
    front = lambda tree, k: jax.tree.map(
      lambda x: jnp.moveaxis(x, k, 0) if k else x, tree
    )
    arrays = (
      front(self.stored, in_stored),
      *(front(x, in_stack) for x in (self.bases, self.due, self.slot)),
    )
    left = tuple(a for k, a in enumerate(form.axes) if k != axis)
    inner = dataclasses.replace(form, axes=left)

    def weight(element: Any) -> "Weight":
      stored, bases, due, slot = element
      return Weight(stored, bases, due, self.iterations, slot, inner)

    return arrays, weight

  def stored_bases(self) -> dict[str, Any]:
    """Side to basis as the state stores it.

    A loop over layers would have a copy of all of their codes in another
    layout, unless their own is kept.
    """
    bases = jax.lax.stop_gradient(dict(self.bases))
    return jax.tree.map(slices.keep_layout, bases)
