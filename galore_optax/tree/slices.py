"""Reads and replaces one matrix of a stack, or one layer of a tree of stacks.

Everything that works on one matrix at a time goes through this module.

* `take` and `put` index the stack. They are the default.
* Where a stack is sharded along the axis that counts its matrices, a traced
  index would make the compiler gather the whole stack on every device. There,
  a matrix is read as a masked sum, which each device computes over its own
  matrices, and replaced by a masked selection. Both read the whole stack, so
  they are used only where the `sharded` argument asks for them.
* `take_layer` and `put_layer` work on whole trees inside loops over layers, and
  keep every stack in its layout.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import layout

from galore_optax.tree import in_place, sharding

Space = jax.memory.Space


def flat(stack: jax.Array, ndim: int) -> jax.Array:
  """A stack with all its stack axes joined to one.

  Args:
    stack: Array (..., m, n), or of tensors.
    ndim: Number of its axes that count matrices or tensors, possibly 0.

  Returns:
    Array (k, m, n), or of tensors.
  """
  return stack.reshape(-1, *stack.shape[ndim:])


def map_matrices(f: Callable[..., jax.Array], *stacks: Any) -> jax.Array:
  """Applies a function to the matrices of stacks, one matrix at a time.

  Args:
    f: From matrices (m, n) to a matrix.
    *stacks: Trees of stacks (..., m, n) with the same leading axes.

  Returns:
    The stack of its results.
  """
  return map_stack(f, jax.tree.leaves(stacks)[0].ndim - 2, *stacks)


def map_stack(f: Callable[..., Any], ndim: int, *trees: Any) -> Any:
  """Applies a function to the parts of stacks, one part at a time.

  Args:
    f: From trees of arrays to a tree of arrays.
    ndim: Number of leading axes that count the parts.
    *trees: Trees of arrays with the same leading axes.

  Returns:
    The tree of results, stacked.
  """
  lead = jax.tree.leaves(trees)[0].shape[:ndim]
  joined = jax.tree.map(lambda x: x.reshape(-1, *x.shape[ndim:]), trees)
  results = jax.lax.map(lambda xs: f(*xs), joined)
  return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), results)


def take(stack: jax.Array, index: jax.Array) -> jax.Array:
  """Matrix `index` of a stack.

  Args:
    stack: Array (n, ...).
    index: Number of the matrix, an int32 scalar from 0 to n - 1.

  Returns:
    Array (...).
  """
  if len(stack) == 1:
    return stack[0]
  return jax.lax.dynamic_index_in_dim(
    stack, index, keepdims=False, allow_negative_indices=False
  )


def put(stack: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
  """A stack with matrix `index` replaced.

  Args:
    stack: Array (n, ...).
    new: Array (...).
    index: As for :func:`take`.

  Returns:
    Array (n, ...).
  """
  if len(stack) == 1:
    return new[None]
  return jax.lax.dynamic_update_index_in_dim(
    stack, new, index, 0, allow_negative_indices=False
  )


def put_many(stack: jax.Array, new: jax.Array, indices: jax.Array) -> jax.Array:
  """A stack with several matrices replaced.

  Args:
    stack: Array (n, ...).
    new: Array (k, ...).
    indices: Position in the stack of each new matrix, int32 (k,). A matrix
      whose position is outside of 0 ... n - 1 is dropped.

  Returns:
    Array (n, ...).
  """
  inside = (indices >= 0) & (indices < len(stack))
  if len(stack) == 1:
    only = jax.lax.dynamic_index_in_dim(new, jnp.argmax(inside))
    return jnp.where(inside.any(), only, stack)
  indices = jnp.clip(indices, 0, len(stack) - 1)

  def put_one(k: jax.Array, stack: jax.Array) -> jax.Array:
    value = jnp.where(inside[k], new[k], take(stack, indices[k]))
    return put(stack, value, indices[k])

  return jax.lax.fori_loop(0, len(new), put_one, stack)


def take_from(
  leaves: Sequence[Any],
  sharded: Sequence[bool],
  member: jax.Array,
  index: jax.Array,
) -> Any:
  """Matrix `index` of one of several leaves.

  Args:
    leaves: Trees of stacks (n, ...), which differ in nothing but n.
    sharded: Of each leaf, whether devices divide the axis that counts its
      matrices.
    member: Which leaf, int32 scalar.
    index: Which matrix of it, int32 scalar.

  Returns:
    The tree of the matrices (...).
  """

  def of(leaf: Any, sharded: bool) -> Any:
    read = _take_sharded if sharded else take
    return jax.tree.map(lambda x: read(x, index), leaf)

  branches = [
    functools.partial(of, leaf, is_sharded)
    for leaf, is_sharded in zip(leaves, sharded, strict=True)
  ]
  return jax.lax.switch(member, branches)


def put_into(
  leaves: Sequence[Any],
  sharded: Sequence[bool],
  member: jax.Array,
  index: jax.Array,
  new: Any,
) -> list[Any]:
  """Several leaves, with matrix `index` of one of them replaced.

  Args:
    leaves: As for :func:`take_from`.
    sharded: As for :func:`take_from`.
    member: As for :func:`take_from`.
    index: As for :func:`take_from`.
    new: The tree of the new matrices (...).

  Returns:
    All leaves.
  """

  def replace(leaf: Any, sharded: bool) -> Any:
    write = _put_sharded if sharded else put
    return jax.tree.map(lambda x, y: write(x, y, index), leaf, new)

  if len(leaves) == 1:
    return [replace(leaves[0], sharded[0])]
  # The number of the leaf is counted down instead of compared: the kernels are
  # then equal, and XLA compiles one.
  done = []
  for leaf, is_sharded in zip(leaves, sharded, strict=True):
    change = functools.partial(replace, sharded=is_sharded)
    done.append(in_place.update_if(member == 0, change, leaf))
    member = jax.lax.optimization_barrier(member - 1)
  return done


def _take_sharded(stack: jax.Array, index: jax.Array) -> jax.Array:
  """Matrix `index` of a stack whose matrices are on different devices.

  The sum counts all other matrices as zero: each device adds up its own
  matrices, and what devices send each other is one matrix.
  """
  wide = jnp.promote_types(stack.dtype, jnp.int32)
  masked = jnp.where(_is(index, stack), stack, jnp.zeros_like(stack))
  return jnp.sum(masked.astype(wide), axis=0, dtype=wide).astype(stack.dtype)


def _put_sharded(
  stack: jax.Array, new: jax.Array, index: jax.Array
) -> jax.Array:
  """A stack whose matrices are on different devices, with one replaced."""
  return jnp.where(_is(index, stack), new[None], stack)


def _is(index: jax.Array, stack: jax.Array) -> jax.Array:
  """Mask that is true at matrix `index`, to broadcast against the stack."""
  number = jax.lax.broadcasted_iota(
    jnp.int32, (len(stack), *(1,) * (stack.ndim - 1)), 0
  )
  return number == index


def keep_layout(stack: jax.Array) -> jax.Array:
  """Keeps an array in row-major layout: a stack, or one element of it.

  Operations on one layer may prefer another layout. Compilers then choose that
  for the whole loop, and copy all layers on the way in and out. On a mesh the
  layout is left to them: the partitioner gathers an array that has such a
  constraint. Arrays in host memory are not touched.

  Args:
    stack: Array.

  Returns:
    The same array.
  """
  if sharding.on_mesh(stack) or is_key(stack):
    return stack
  return layout.with_layout_constraint(
    stack, layout.Layout(tuple(range(stack.ndim)))
  )


def take_layer(tree: Any, index: Any) -> Any:
  """One layer of a tree whose leaves stack layers along their first axis.

  Args:
    tree: Tree of arrays (layers, ...). They may be in host memory.
    index: Number of the layer.

  Returns:
    Tree of arrays (...) in device memory.
  """
  return jax.tree.map(
    lambda x: _move(take(keep_layout(x), index), Space.Device), tree
  )


def put_layer(tree: Any, new: Any, index: jax.Array) -> Any:
  """A tree with one layer replaced, in place inside of a loop.

  Args:
    tree: As for :func:`take_layer`.
    new: Tree of arrays (...) in device memory.
    index: As for :func:`take_layer`.

  Returns:
    Tree of arrays (layers, ...), each in the memory where it was.
  """

  def replace(stack: jax.Array, new: jax.Array) -> jax.Array:
    new = _move(new, _space(stack))
    return keep_layout(put(keep_layout(stack), new, index))

  return jax.tree.map(replace, tree, new)


def _move(x: jax.Array, space: Space) -> jax.Array:
  """An array in a memory space; itself if it is there."""
  return x if _space(x) == space else jax.device_put(x, space)


def _space(x: jax.Array) -> Space:
  return jax.typeof(x).memory_space


def is_key(x: Any) -> bool:
  """Whether an array holds typed random keys."""
  return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
