"""Products with a weight whose gradient arrives projected.

The derivative with respect to a weight's slot is defined as its projected
gradient. So `jax.grad` hands it out like any other gradient, through loops,
checkpoints and batches.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.projected import gradient as gradient_lib
from galore_optax.projected.gradient import Found
from galore_optax.projected.weight import Weight
from galore_optax.tree import sharding, slices


@dataclasses.dataclass(frozen=True)
class Dot:
  """The parameters of `jax.lax.dot_general`, and which operand is the weight.

  Attributes:
    contract: Contracted axes of the other operand and of the weight.
    batch: Batch axes of the other operand and of the weight.
    weight_first: Whether the weight is the left operand.
    options: The other parameters of the operation, sorted by name.
  """

  contract: tuple[tuple[int, ...], tuple[int, ...]]
  batch: tuple[tuple[int, ...], tuple[int, ...]]
  weight_first: bool
  options: tuple[tuple[str, Any], ...]

  def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
    """The product."""
    options = dict(self.options)
    if self.weight_first:
      pairs = self.contract[::-1], self.batch[::-1]
      return jax.lax.dot_general(w, x, pairs, **options)
    return jax.lax.dot_general(x, w, (self.contract, self.batch), **options)

  def fits(self, weight: Weight) -> bool:
    """Whether the weight's gradient is a product of two factors.

    It is if whole rows or whole columns are contracted, and all axes that count
    matrices are batch axes.
    """
    view = weight.view()
    sides = (sorted(view.rows), sorted(view.cols))
    return (
      sorted(self.contract[1]) in sides
      and sorted(self.batch[1]) == sorted(view.batch)
      and not jnp.issubdtype(weight.form.dtype, jnp.complexfloating)
    )

  def factors(
    self, weight: Weight, x: jax.Array, dy: jax.Array
  ) -> gradient_lib.Factored:
    """The gradient of the weight as A (..., T, m) and B (..., T, n)."""
    view = weight.view()
    contracts_rows = sorted(self.contract[1]) == sorted(view.rows)
    inner, outer = view.rows, view.cols
    if not contracts_rows:
      inner, outer = outer, inner
    of_x = dict(zip(self.contract[1], self.contract[0], strict=True))
    of_x |= dict(zip(self.batch[1], self.batch[0], strict=True))
    paired = set(of_x.values())
    free_x = [axis for axis in range(x.ndim) if axis not in paired]
    # The result has batch axes, then those of the left operand, then the right.
    free_w = [axis for axis in range(len(view.shape)) if axis not in of_x]
    first = len(self.batch[0])
    starts = (first, first + len(free_w))
    if not self.weight_first:
      starts = (first + len(free_x), first)
    of_dy = {axis: starts[0] + k for k, axis in enumerate(free_w)}
    of_dy |= {axis: k for k, axis in enumerate(self.batch[1])}
    tokens_dy = [starts[1] + k for k in range(len(free_x))]
    a = _stack_of_rows(x, [of_x[k] for k in view.batch], free_x,
                       [of_x[k] for k in inner])  # fmt: skip
    b = _stack_of_rows(dy, [of_dy[k] for k in view.batch], tokens_dy,
                       [of_dy[k] for k in outer])  # fmt: skip
    rows, cols = (a, b) if contracts_rows else (b, a)
    return gradient_lib.Factored(rows, cols, weight.form.varying)


def _stack_of_rows(
  x: jax.Array,
  batch: Sequence[int],
  tokens: Sequence[int],
  features: Sequence[int],
) -> jax.Array:
  """An array with its axes joined to (..., T, m)."""
  x = x.transpose(*batch, *tokens, *features)
  shape = x.shape
  first, last = len(batch), len(batch) + len(tokens)
  size = math.prod(shape[first:last]), math.prod(shape[last:])
  return x.reshape(*shape[:first], *size)


def dot(rule: Dot, x: jax.Array, weight: Weight) -> jax.Array:
  """The product of an array with a weight.

  Args:
    rule: The product.
    x: The other operand.
    weight: The weight, for which `rule.fits`.

  Returns:
    The product. The derivative with respect to `weight.slot` is the projected
    gradient; the gradient itself is never computed.
  """
  return _dot(rule, x, weight.slot, _without_slot(weight))


def read(weight: Weight) -> jax.Array:
  """The weight as an array, for any other use.

  Args:
    weight: The weight.

  Returns:
    The array. The derivative with respect to `weight.slot` is the projection of
    its gradient, which exists where the array is used and no longer.
  """
  return _read(weight.slot, _without_slot(weight))


def _without_slot(weight: Weight) -> Weight:
  return dataclasses.replace(weight, slot=None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(rule: Dot, x: jax.Array, slot: Found, weight: Weight) -> jax.Array:
  del slot
  return rule(x, weight.array())


def _dot_forward(
  rule: Dot, x: jax.Array, slot: Found, weight: Weight
) -> tuple[jax.Array, tuple]:
  # Of the slot only the type is used.
  return _dot(rule, x, slot, weight), (x, slot, weight)


def _dot_backward(rule: Dot, kept: tuple, dy: jax.Array) -> tuple:
  x, slot, weight = kept
  of_x = jax.linear_transpose(lambda x: rule(x, weight.array()), x)

  def find(weight: Weight, x: jax.Array, dy: jax.Array) -> Found:
    rows, cols, axes = rule.factors(weight, x, dy)
    return _find_and_project(
      weight,
      (rows, cols),
      lambda g: gradient_lib.Factored(g[0], g[1], axes),
    )

  return of_x(dy)[0], sharding.run_auto(find, slot, weight, x, dy), None


_dot.defvjp(_dot_forward, _dot_backward)


@jax.custom_vjp
def _read(slot: Found, weight: Weight) -> jax.Array:
  del slot
  return weight.array()


def _read_forward(
  slot: Found, weight: Weight
) -> tuple[jax.Array, tuple[Found, Weight]]:
  return _read(slot, weight), (slot, weight)


def _read_backward(kept: tuple[Found, Weight], g: jax.Array) -> tuple:
  slot, weight = kept
  if weight.form.varying:
    g = jax.lax.psum(g, weight.form.varying)

  def find(weight: Weight, g: jax.Array) -> Found:
    g = weight.view().as_stack(g)
    return _find_and_project(weight, (g,), lambda g: gradient_lib.Formed(*g))

  return sharding.run_auto(find, slot, weight, g), None


_read.defvjp(_read_forward, _read_backward)


def _find_and_project(weight: Weight, arrays: tuple, make: Any) -> Found:
  """What is found of each matrix of a weight, one matrix after another.

  Args:
    weight: The weight.
    arrays: Arrays (..., a, b) of all matrices.
    make: From these arrays of one matrix to its gradient.
  """
  form = weight.form
  iterations = weight.iterations if form.iterations is None else form.iterations

  def of_matrix(arrays: tuple, bases: dict, due: jax.Array) -> Found:
    return gradient_lib.find_and_project(
      make(arrays), bases, due, iterations, form.axis_name
    ).astype(form.gradient_dtype, form.basis_dtype)

  args = (arrays, weight.stored_bases(), weight.due)
  stack = len(form.stack)
  if not stack:
    return of_matrix(*args)
  return slices.map_stack(of_matrix, stack, *args)
