"""One matrix of many: reading and replacing it in leaves and their stacks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def read(
  leaves: Sequence[Any], spread: Sequence[bool], member: jax.Array, i: jax.Array
) -> Any:
  """Matrix i of one of several leaves that are alike.

  Args:
    leaves: Trees of stacks (n, ...), alike but for n.
    spread: Of each leaf, whether its stacks are divided among devices.
    member: Which leaf, int32 scalar.
    i: Which matrix of it, int32 scalar.

  Returns:
    Its matrices (...).
  """

  def of(leaf: Any, spread: bool) -> Any:
    return jax.tree.map(lambda x: (_gather if spread else take)(x, i), leaf)

  branches = [
    functools.partial(of, leaf, divided)
    for leaf, divided in zip(leaves, spread, strict=True)
  ]
  return jax.lax.switch(member, branches)


def write(
  leaves: Sequence[Any],
  spread: Sequence[bool],
  member: jax.Array,
  i: jax.Array,
  new: Any,
) -> list[Any]:
  """The leaves with matrix i of one of them replaced.

  Args:
    leaves: As for :func:`read`.
    spread: Likewise.
    member: Likewise.
    i: Likewise.
    new: The matrices (...) that take its place.

  Returns:
    All leaves.
  """

  def put(leaf: Any, spread: bool) -> Any:
    place = _scatter if spread else _put
    return jax.tree.map(lambda x, y: place(x, y, i), leaf, new)

  if len(leaves) == 1:
    return [put(leaves[0], spread[0])]
  # One branch for each, which updates in place; and counting down instead of
  # comparing with a number makes their kernels equal, so that one is compiled.
  done = []
  for leaf, divided in zip(leaves, spread, strict=True):
    change = functools.partial(put, spread=divided)
    member, leaf = jax.lax.cond(
      member == 0,
      lambda left, leaf, change=change: (left - 1, change(leaf)),
      lambda left, leaf: (left - 1, leaf),
      member,
      leaf,
    )
    done.append(leaf)
  return done


def walk(f: Callable[..., jax.Array], *stacks: Any) -> jax.Array:
  """Calls a function on the matrices of stacks, one after another.

  Args:
    f: From matrices to a matrix.
    *stacks: Trees of stacks (..., m, n) with the same leading axes.

  Returns:
    The stack of its results.
  """
  first = jax.tree.leaves(stacks)[0]
  found = jax.lax.map(lambda xs: f(*xs), jax.tree.map(flat, stacks))
  return found.reshape(*first.shape[:-2], *found.shape[1:])


def flat(stack: jax.Array) -> jax.Array:
  """A stack of matrices with one stack axis."""
  return stack.reshape(-1, *stack.shape[-2:])


def take(stack: jax.Array, i: jax.Array) -> jax.Array:
  """Matrix i of a stack."""
  if len(stack) == 1:
    return stack[0]
  return jax.lax.dynamic_index_in_dim(
    stack, i, keepdims=False, allow_negative_indices=False
  )


def _put(stack: jax.Array, x: jax.Array, i: jax.Array) -> jax.Array:
  """A stack with matrix i replaced."""
  if len(stack) == 1:
    return x[None]
  return jax.lax.dynamic_update_index_in_dim(
    stack, x, i, 0, allow_negative_indices=False
  )


def _gather(stack: jax.Array, i: jax.Array) -> jax.Array:
  """Matrix i of a stack that is divided among devices.

  An index would make the compiler gather the stack; a sum in which all other
  matrices count as zero is reduced where they are.
  """
  wide = jnp.promote_types(stack.dtype, jnp.int32)
  kept = jnp.where(_is(i, stack), stack, jnp.zeros_like(stack))
  return jnp.sum(kept.astype(wide), axis=0, dtype=wide).astype(stack.dtype)


def _scatter(stack: jax.Array, x: jax.Array, i: jax.Array) -> jax.Array:
  """A stack that is divided among devices, with matrix i replaced."""
  return jnp.where(_is(i, stack), x[None], stack)


def _is(i: jax.Array, stack: jax.Array) -> jax.Array:
  """Which matrix of a stack is number i, to broadcast against the stack."""
  number = jax.lax.broadcasted_iota(
    jnp.int32, (len(stack), *(1,) * (stack.ndim - 1)), 0
  )
  return number == i
