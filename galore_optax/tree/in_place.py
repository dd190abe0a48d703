"""Conditional changes of large arrays, in place on every platform.

XLA copies what a branch of a conditional hands out, on GPUs also where the
branch only hands it on. The carry of a loop is one buffer, so a change that may
or may not be made is a loop of one turn or none here. Such loops have no
reverse mode; derivatives are those of conditionals that say the same.

On a mesh conditionals are used themselves: with collectives in such loops, CPU
processes were seen to run them in different sequences, and to abort.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from galore_optax.tree import sharding


def update_if(condition: jax.Array, f: Callable[[Any], Any], x: Any) -> Any:
  """`f(x)` if a condition holds, else `x`.

  Args:
    condition: Bool scalar.
    f: From `x` to a tree like `x`.
    x: Tree of arrays.

  Returns:
    A tree like `x`.
  """
  condition, x = sharding.vary_together((condition, x))
  f, constants = _close(f, x)

  def loop(condition: jax.Array, x: Any, constants: Sequence) -> Any:
    def turn(carry: tuple) -> tuple:
      waiting, x = carry
      return ~waiting, f(constants, x)

    return jax.lax.while_loop(lambda c: c[0], turn, (condition, x))[1]

  def differentiable(condition: jax.Array, x: Any, constants: Sequence) -> Any:
    change = functools.partial(f, constants)
    return jax.lax.cond(condition, change, lambda x: x, x)

  return _run(loop, differentiable, condition, x, constants)


def update_each(
  chosen: jax.Array, f: Callable[[jax.Array, Any], Any], x: Any
) -> Any:
  """Calls `f(unit, x)` for each unit that is chosen, in their order.

  Args:
    chosen: Whether each unit is chosen, bool (count,).
    f: From the number of a unit, int32 scalar, and `x` to a tree like `x`.
    x: Tree of arrays.

  Returns:
    `x` after all calls.
  """
  count = len(chosen)
  if count == 1:
    return update_if(chosen[0], functools.partial(f, jnp.int32(0)), x)
  chosen, x = sharding.vary_together((chosen, x))
  first = jnp.argmax(chosen).astype(jnp.int32)
  f, constants = _close(f, first, x)

  def loop(chosen: jax.Array, x: Any, constants: Sequence) -> Any:
    def turn(carry: tuple) -> tuple:
      left, x = carry
      unit = jnp.argmax(left).astype(jnp.int32)
      return left & (jnp.arange(count) != unit), f(constants, unit, x)

    return jax.lax.while_loop(lambda c: jnp.any(c[0]), turn, (chosen, x))[1]

  def differentiable(chosen: jax.Array, x: Any, constants: Sequence) -> Any:
    def turn(unit: jax.Array, x: Any) -> Any:
      unit, x = sharding.vary_together((unit, x))
      change = functools.partial(f, constants, unit)
      return jax.lax.cond(chosen[unit], change, lambda x: x, x)

    run = lambda x: jax.lax.fori_loop(0, count, turn, x)
    return jax.lax.cond(jnp.any(chosen), run, lambda x: x, x)

  return _run(loop, differentiable, chosen, x, constants)


def _close(f: Callable, *args: Any) -> tuple[Callable, list]:
  """A function without the arrays it closes over, and these arrays.

  A derivative is traced later than the function, when what it closed over may
  be gone.

  Args:
    f: From trees of arrays to a tree of arrays.
    *args: Its arguments, of which only the types are used.

  Returns:
    A function of the arrays and the arguments, and the arrays.
  """
  closed, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
  structure = jax.tree.structure(shapes)

  def call(constants: Sequence, *args: Any) -> Any:
    run = core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, list(constants)))
    return jax.tree.unflatten(structure, run(*jax.tree.leaves(args)))

  return call, closed.consts


def _run(loop: Callable, differentiable: Callable, *args: Any) -> Any:
  """Calls `loop`, with the derivatives of an equal function; that on a mesh."""
  if any(map(sharding.on_mesh, jax.tree.leaves(args))):
    return differentiable(*args)
  run = jax.custom_jvp(loop)
  run.defjvp(
    lambda primals, tangents: jax.jvp(differentiable, primals, tangents)
  )
  return run(*args)
