"""In which order the leaves of a tree are computed."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.tree import sharding


def in_turn(
  f: Callable[[str, Any], jax.Array], given: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """Calls a function on leaves, of which CPUs compute one after the other.

  XLA for CPU runs first what is ready first: the products of all leaves, and
  then what is made of them, when they have left the cache and fill the memory.
  So each leaf waits there for the one before it, which what is done with that
  does not. Other compilers order by memory themselves; and on a mesh, to wait
  would keep what devices send each other from running beside products.

  Args:
    f: From a path and what is given for it to an array.
    given: Path to arrays.

  Returns:
    Path to what `f` returned.
  """
  found: dict[str, jax.Array] = {}
  waits = None
  if not any(map(sharding.on_mesh, jax.tree.leaves(given))):
    # Elsewhere it is a constant, which leaves nothing of the rest.
    waits = jax.lax.platform_dependent(
      cpu=lambda: jnp.bool_(True), default=lambda: jnp.bool_(False)
    )
  last = None
  for path, x in given.items():
    if waits is not None and last is not None:
      x = jax.tree.map(functools.partial(_after, waits, last), x)
    found[path] = last = f(path, x)
  return found


def _after(waits: jax.Array, first: jax.Array, x: jax.Array) -> jax.Array:
  """`x` as it is, but computed from `first`; barriers are dropped too early."""
  corner = jax.lax.slice(first, (0,) * first.ndim, (1,) * first.ndim)
  corner = jax.lax.reshape(corner, ())
  never = waits & jax.lax.lt(corner, jax.lax.full_like(corner, -jnp.inf))
  return jax.lax.select(never, jax.lax.full_like(x, 0), x)
