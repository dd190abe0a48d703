"""Initial bases: those that matrices have before their first refresh."""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.quantization import qarray
from galore_optax.subspace import find, projection
from galore_optax.tree import plan, sharding

CODES = ("int4", "int8")


def basis(
  site: plan.Site, side: str, like: Any, seed: Any, dtype: Any
) -> jax.Array | qarray.QArray:
  """Initial orthonormal bases of a leaf, in the state's format.

  Args:
    site: The leaf; all its matrices start with the same basis.
    side: `left` or `right`; of a tensor `axis0` and so on.
    like: The leaf's array, whose mesh and sharding the bases follow.
    seed: Seed of all bases; leaves and sides get different ones.
    dtype: A float dtype, or one of `CODES`.

  Returns:
    Bases (..., m, r) for `left`, (..., n, r) for `right`; codes are transposed.
  """
  key, shape = _key(site, side, seed), site.basis_shape(side)
  spec = functools.partial(site.basis_spec, side)
  if dtype not in CODES:
    return sharding.shard_like(
      _broadcast(key, shape, jnp.dtype(dtype)), like, spec
    )
  return sharding.shard_quantized_like(
    _codes(key, shape, dtype),
    like,
    lambda parts: (*spec(parts)[:-2], None, spec(parts)[-2]),
  )


def random_basis(
  site: plan.Site, side: str, like: Any, seed: Any
) -> projection.RandomBasis:
  """A random projection of which only a seed is stored; see :func:`basis`."""
  bits = jax.random.bits(_key(site, side, seed), (), jnp.uint32)
  return projection.RandomBasis(
    sharding.shard_like(bits, like, lambda _: ()), site.basis_shape(side)
  )


def _key(site: plan.Site, side: str, seed: Any) -> jax.Array:
  name = zlib.crc32(f"{site.path}/{side}".encode())
  return jax.random.fold_in(jax.random.key(seed), name)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _broadcast(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  one = find.start_basis(key, *shape[-2:])
  return jnp.broadcast_to(one, shape).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _codes(key: jax.Array, shape: tuple[int, ...], kind: str) -> qarray.QArray:
  one = _broadcast(key, shape, jnp.float32)
  return qarray.quantize(jnp.swapaxes(one, -1, -2), kind)
