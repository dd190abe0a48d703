"""Interprets the operations of an inner optimizer, by exchangeable rules.

A traced function is a list of primitive operations, its jaxpr. The interpreter
walks that list, and into the calls and conditionals in it, and computes one
abstract value for each array. What the abstract values are, and how an
operation combines them, is up to the :class:`Rules`: :mod:`.separate` asks
which part of an update depends on the parameters alone, :mod:`.gain` by which
scalar an update is multiplied at the end.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax
import optax
from jax.extend import core

from galore_optax.tree import sharding

Value = TypeVar("Value")

# Calls whose operands are those of the jaxpr they hold.
_CALLS = frozenset((
  "checkpoint", "closed_call", "core_call", "custom_jvp_call",
  "custom_vjp_call", "jit", "pjit", "remat", "remat2",
))  # fmt: skip


class Rules(abc.ABC, Generic[Value]):
  """How operations act on abstract values.

  A value is free if it depends on nothing but counters, hyperparameters and
  constants. Operations on free values are carried out.
  """

  @abc.abstractmethod
  def constant(self, x: Any) -> Value:
    """The abstract value of a constant array."""

  @abc.abstractmethod
  def is_free(self, value: Value) -> bool:
    """Whether a value is free."""

  @abc.abstractmethod
  def carry_out(self, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """The results of an operation on free values."""

  @abc.abstractmethod
  def operation(self, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """The results of an operation with at least one operand that is not free.

    A loop counts as one operation, and its body is not interpreted.
    """

  @abc.abstractmethod
  def selects(self, index: Value) -> bool:
    """Whether :meth:`select` handles a conditional with this branch index.

    Otherwise the conditional is an :meth:`operation` like others.
    """

  @abc.abstractmethod
  def select(self, index: Value, outcomes: Sequence[Value], aval: Any) -> Value:
    """The value of an array that is that of one of several branches.

    Args:
      index: Which branch.
      outcomes: The array's value in each branch.
      aval: Its shape and dtype.
    """


def interpret(
  rules: Rules[Value],
  f: Callable,
  args: tuple,
  values: Sequence[Value],
) -> Any:
  """The abstract values of what a function returns.

  Args:
    rules: The rules.
    f: The function; it is traced, not run.
    args: Its arguments, pytrees of arrays or of their shapes.
    values: The abstract value of each leaf of the arguments.

  Returns:
    The pytree that `f` returns, with an abstract value for each array.
  """
  closed, out = jax.make_jaxpr(f, return_shape=True)(*args)
  results = _evaluate(rules, closed.jaxpr, closed.consts, values)
  return jax.tree.unflatten(jax.tree.structure(out), results)


def _evaluate(
  rules: Rules[Value],
  jaxpr: core.Jaxpr,
  consts: Sequence[Any],
  values: Sequence[Value],
) -> list[Value]:
  """The values of a jaxpr's outputs, given those of its inputs."""
  env: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))
  env |= {
    var: rules.constant(x)
    for var, x in zip(jaxpr.constvars, consts, strict=True)
  }

  def read(atom: Any) -> Value:
    if isinstance(atom, core.Literal):
      return rules.constant(atom.val)
    return env[atom]

  for eqn in jaxpr.eqns:
    results = _evaluate_equation(rules, eqn, [read(x) for x in eqn.invars])
    env |= dict(zip(eqn.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _evaluate_equation(
  rules: Rules[Value], eqn: core.JaxprEqn, values: list[Value]
) -> list[Value]:
  """The values of one operation's results."""
  if eqn.primitive.name in _CALLS:
    return _evaluate(rules, *_called(eqn), values)
  if all(map(rules.is_free, values)):
    return rules.carry_out(eqn, values)
  if eqn.primitive.name == "cond" and rules.selects(values[0]):
    index, *operands = values
    branches = [
      _evaluate(rules, branch.jaxpr, branch.consts, operands)
      for branch in eqn.params["branches"]
    ]
    return [
      rules.select(index, outcomes, var.aval)
      for outcomes, var in zip(
        zip(*branches, strict=True), eqn.outvars, strict=True
      )
    ]
  return rules.operation(eqn, values)


def _called(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence[Any]]:
  """The operations inside a call, and their constants."""
  jaxpr = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
  if isinstance(jaxpr, core.ClosedJaxpr):
    return jaxpr.jaxpr, jaxpr.consts
  return jaxpr, ()


def bind(eqn: core.JaxprEqn, arrays: Sequence[Any]) -> list[Any]:
  """Carries an operation out on arrays.

  It may have been traced for arrays that vary over other axes of `shard_map`.
  """
  if eqn.primitive.name == "pvary":
    return list(arrays)
  arrays = sharding.vary_together(list(arrays))
  out = eqn.primitive.bind(*arrays, **eqn.params)
  return list(out) if eqn.primitive.multiple_results else [out]


def moment_mask(
  inner: optax.GradientTransformationExtraArgs, state: Any
) -> list[bool]:
  """Whether each leaf of an inner state is a moment.

  Args:
    inner: The inner optimizer.
    state: Its state, whose other leaves are counters and hyperparameters.

  Returns:
    A bool for each leaf, as `jax.tree.leaves` lists them.
  """
  return jax.tree.leaves(
    optax.tree.map_params(
      inner.init, lambda _: True, state, transform_non_params=lambda _: False
    )
  )
