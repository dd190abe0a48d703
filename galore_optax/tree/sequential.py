"""Computes the leaves of a tree one after another, where that saves memory."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.tree import sharding


def one_after_another(
  f: Callable[[str, Any], jax.Array], inputs: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """Applies a function to leaves; CPUs start a leaf when the last is done.

  XLA for CPU runs an operation as soon as its operands are there: first the
  products of all leaves, then what uses them, when they have left the cache and
  fill the memory. On CPU each leaf therefore depends on the one before it.
  Later operations on a leaf do not delay the next leaf. Other compilers order
  operations by memory themselves. On a mesh no leaf waits, so that
  communication still overlaps with products.

  Args:
    f: From a path and its input to an array.
    inputs: Path to the input of `f`, a tree of arrays.

  Returns:
    Path to what `f` returned.
  """
  results: dict[str, jax.Array] = {}
  waits, last = on_cpu(inputs), None
  for path, x in inputs.items():
    if last is not None:
      x = jax.tree.map(functools.partial(after, waits, last), x)
    results[path] = last = f(path, x)
  return results


def on_cpu(arrays: Any) -> jax.Array | None:
  """Whether operations are to wait, for :func:`after`; None on a mesh.

  Args:
    arrays: A tree of the arrays that they are about.
  """
  if any(map(sharding.on_mesh, jax.tree.leaves(arrays))):
    return None
  # A constant, False on other platforms: the compiler then drops all of this.
  return jax.lax.platform_dependent(
    cpu=lambda: jnp.bool_(True), default=lambda: jnp.bool_(False)
  )


def after(waits: jax.Array | None, first: jax.Array, x: jax.Array) -> jax.Array:
  """`x` unchanged, but computed from `first`, and so after it.

  An optimization barrier would not do: XLA removes it before it schedules.

  Args:
    waits: What :func:`on_cpu` returned.
    first: Another array.
    x: An array.

  Returns:
    `x`.
  """
  if waits is None or not first.size:
    return x
  corner = jax.lax.slice(first, (0,) * first.ndim, (1,) * first.ndim)
  corner = jax.lax.reshape(corner, ())
  never = waits & jax.lax.lt(corner, jax.lax.full_like(corner, -jnp.inf))
  return jax.lax.select(never, jax.lax.full_like(x, 0), x)
