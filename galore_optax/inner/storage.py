"""Stores an inner optimizer's moments in fewer bits than it computes with.

The inner optimizer sees gradients in a wide dtype, at least float32, and so its
arithmetic is wide. Between steps its moments are kept in the dtype that they
would have if it saw gradients in a narrow one. So which arrays are narrow is up
to the inner optimizer: 8-bit codes, counters and moments to which it gives a
dtype of its own stay as they are.

What is stored decides, not what is asked for: a state with float32 moments goes
on with float32 moments.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax.inner import interpreter
from galore_optax.quantization import bfloat16
from galore_optax.tree import paths, sequential, split


def init(
  inner: optax.GradientTransformationExtraArgs, wide: Any, narrow: Any
) -> Any:
  """The inner optimizer's first state, as it is stored.

  Args:
    inner: The inner optimizer.
    wide: What it is to compute with: zeros of projected leaves, and the others.
    narrow: The same in the dtypes of stored moments.

  Returns:
    Its state for `wide`, with moments in the dtypes of that for `narrow`.
  """
  state = inner.init(narrow)
  if _dtypes(wide) == _dtypes(narrow):
    return state
  wanted = jax.eval_shape(inner.init, wide)
  is_moment = interpreter.moment_mask(inner, state)
  leaves, treedef = jax.tree.flatten(state)
  if all(
    kept or x.dtype == like.dtype
    for kept, x, like in zip(
      is_moment, leaves, jax.tree.leaves(wanted), strict=True
    )
  ):
    return state
  # Hyperparameters in a state have the dtype of the parameters.
  wide_leaves = jax.tree.leaves(inner.init(wide))
  return treedef.unflatten(
    x if kept else y
    for kept, x, y in zip(is_moment, leaves, wide_leaves, strict=True)
  )


def widen(
  inner: optax.GradientTransformationExtraArgs, state: Any, low: Any
) -> Any:
  """A stored state as the inner optimizer made it.

  Args:
    inner: The inner optimizer.
    state: Its state, with stored moments.
    low: The gradients that it will be given.

  Returns:
    The state with each array in the dtype that it has for such gradients.
  """
  if not any(_is_narrow(x) for x in jax.tree.leaves(state)):
    return state
  wanted = jax.eval_shape(inner.init, low)
  return jax.tree.map(lambda x, like: _cast(x, like.dtype), state, wanted)


def narrow(
  new: Any,
  old: Any,
  updates: Mapping[str, jax.Array],
  key: jax.Array,
  layer: Any = None,
) -> Any:
  """A new state in the dtypes in which the old one is stored.

  Args:
    new: The inner optimizer's new state, split, see
      :func:`galore_optax.tree.split.split_state`.
    old: The stored state that it replaces, split.
    updates: Path to update. A CPU computes it before it writes moments: both
      need the old moments, of which it would otherwise make a copy.
    key: uint32 scalar that differs from step to step.
    layer: Number of the layer if these are the moments of one layer of a stack.
      They are then rounded as those of the whole stack.

  Returns:
    The new state; what is stored in bfloat16 is rounded at random.
  """
  trees, treedef = jax.tree.flatten(new, is_leaf=split.is_split)
  stored = treedef.flatten_up_to(old)
  return treedef.unflatten(
    round_tree(x, like, bfloat16.leaf_key(key, str(i)), layer, updates)
    if split.is_split(x)
    else _cast(x, jnp.result_type(like))
    for i, (x, like) in enumerate(zip(trees, stored, strict=True))
  )


def round_tree(
  new: split.Split,
  old: split.Split,
  key: jax.Array,
  layer: Any = None,
  updates: Mapping[str, jax.Array] | None = None,
) -> split.Split:
  """As :func:`narrow`, for one tree in the parameters' structure."""
  updates = updates or {}

  def round_leaf(name: str, x: jax.Array, dtype: Any) -> jax.Array:
    if x.dtype == dtype:
      return x
    if name in updates:
      waits = sequential.on_cpu((updates[name], x))
      x = sequential.after(waits, updates[name], x)
    start = 0 if layer is None else layer.astype(jnp.uint32) * x.size
    return bfloat16.store(x, dtype, bfloat16.leaf_key(key, name), start)

  def round_leaves(new: Any, old: Any) -> Any:
    flat, treedef = jax.tree_util.tree_flatten_with_path(new)
    names = paths.paths([keys for keys, _ in flat])
    stored = treedef.flatten_up_to(old)
    return treedef.unflatten(
      round_leaf(name, x, like.dtype)
      for name, (_, x), like in zip(names, flat, stored, strict=True)
    )

  return split.Split(*map(round_leaves, new, old))


def _is_narrow(x: Any) -> bool:
  dtype = jnp.result_type(x)
  return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _cast(x: Any, dtype: Any) -> Any:
  return x if jnp.result_type(x) == dtype else jnp.asarray(x).astype(dtype)


def _dtypes(tree: Any) -> list[Any]:
  return [jnp.result_type(x) for x in jax.tree.leaves(tree)]
