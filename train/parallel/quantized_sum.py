"""Sums over devices of which each sends eight-bit codes.

A ring adds float32 arrays up in two rounds, a reduce-scatter and an all-gather.
Here both rounds send int8 codes and a scale for each block of them. So a device
sends about a quarter of the bytes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.quantization import rounding

BLOCK = 256  # elements that share a scale: scales are 1.6% of the codes' bytes


def psum_int8(tree: Any, along: Any, axis_name: str, key: jax.Array) -> Any:
  """The sum of a tree's arrays over a mesh axis, sent as eight-bit codes.

  Each device adds up one part of every array, from the codes of all devices,
  and sends the codes of that part's sum to all of them. Codes are rounded at
  random without bias: the expectation is the sum. All devices get the same
  bits. Where an element of a block is not finite on any device, the sums of
  that block are not finite either.

  Args:
    tree: floating arrays, on each device its own. In `jax.shard_map` with
      `check_vma=False`.
    along: for each array the axis that its blocks run along, -1 or -2. Elements
      of a block should be of similar size: the largest one decides its steps.
    axis_name: the mesh axis. If it has a single device, nothing is rounded.
    key: random key, the same on all devices.

  Returns:
    The sums, in the dtypes of the arrays.
  """
  if jax.lax.axis_size(axis_name) == 1:
    return tree
  arrays, structure = jax.tree.flatten(tree)
  own = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
  keys = jax.random.split(own, len(arrays))
  axes = structure.flatten_up_to(along)
  sums = [
    _sum(x, axis, axis_name, k)
    for x, axis, k in zip(arrays, axes, keys, strict=True)
  ]
  return jax.tree.unflatten(structure, sums)


def _sum(x: jax.Array, along: int, axis_name: str, key: jax.Array) -> jax.Array:
  """The sum of one array."""
  first, second = jax.random.split(key)
  blocks = _split(x, along, jax.lax.axis_size(axis_name))
  mine = jax.lax.all_to_all(_quantize(blocks, first), axis_name, 0, 0)
  total = _dequantize(*mine).sum(0)
  sums = jax.lax.all_gather(_quantize(total, second), axis_name)
  return _join(_dequantize(*sums), x, along)


def _quantize(blocks: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """int8 codes (..., BLOCK) and float32 scales (...) of blocks (..., BLOCK).

  The scale of a block with an element that is not finite is not finite either.
  """
  scale = jnp.max(jnp.abs(blocks), -1) / 127
  x = blocks / rounding.safe_divisor(scale)[..., None]
  codes = rounding.round_to_integers(jnp.clip(x, -127, 127), key)
  return codes.astype(jnp.int8), scale


def _dequantize(codes: jax.Array, scale: jax.Array) -> jax.Array:
  """The blocks of codes and scales."""
  return codes.astype(jnp.float32) * scale[..., None]


def _split(x: jax.Array, along: int, count: int) -> jax.Array:
  """An array in blocks along an axis, (count, k, BLOCK).

  Zeros fill up the last blocks.
  """
  flat = _with_axis_last(x, along).astype(jnp.float32).reshape(-1)
  flat = jnp.pad(flat, (0, -flat.size % (count * BLOCK)))
  return flat.reshape(count, -1, BLOCK)


def _join(blocks: jax.Array, like: jax.Array, along: int) -> jax.Array:
  """The array that `_split` divided into blocks."""
  shape = jax.eval_shape(lambda x: _with_axis_last(x, along), like).shape
  x = blocks.reshape(-1)[: like.size].reshape(shape)
  return _with_axis_last(x, along).astype(like.dtype)


def _with_axis_last(x: jax.Array, axis: int) -> jax.Array:
  """The array with one of its last two axes last; its own inverse."""
  return x if axis == -1 else x.swapaxes(-1, -2)
