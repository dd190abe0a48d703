"""Checksums of a state, to verify that it was restored as it was saved."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from train.parallel import mesh as mesh_lib


def check_sums(state: Any, mesh: jax.sharding.Mesh) -> list[int]:
  """A number for each array of `state`, from its bits and their positions.

  Integer sums wrap around and so do not depend on the sequence of terms: they
  are the same on every mesh. They take one pass over the state, on its devices.
  Arrays in host memory are copied there one at a time, and not by the program:
  TPU compilers do not take every such copy, and might make all at once.

  Args:
    state: a tree of arrays.
    mesh: the devices that hold them.
  """
  whole = NamedSharding(mesh, PartitionSpec())
  here = lambda x: x.sharding.memory_kind != mesh_lib.HOST
  arrays = jax.tree.leaves(state)
  found = iter(jax.device_get(_jitted(whole)([*filter(here, arrays)])))
  return [
    int(next(found) if here(x) else _jitted(whole)([mesh_lib.on_device(x)])[0])
    for x in arrays
  ]


@functools.cache
def _jitted(sharding: NamedSharding) -> Callable:
  def sums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_sum(x) for x in arrays]

  return jax.jit(sums, out_shardings=sharding)


def _sum(x: jax.Array) -> jax.Array:
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  if x.dtype == jnp.int4:
    x = x.astype(jnp.int8)
  width = jnp.dtype(f"uint{x.dtype.itemsize * 8}")
  bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    position = position * jnp.uint32(size) + index
  # The weights are odd, so that changing a single number changes the sum.
  return (bits * (2 * position + 1)).sum(dtype=jnp.uint32)
