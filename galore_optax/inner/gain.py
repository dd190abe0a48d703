r"""Finds the scalar that an inner optimizer multiplies its direction by.

Most optimizers end in a factor that has nothing to do with gradients: the
learning rate, and the sign of descent. A comparison of an update with its
gradient, or with updates of other steps, must leave the factor out: during a
warm-up it is zero at first and then grows quickly. To find it, the inner update
is traced, and each value that depends on gradients is written as a scalar, its
gain, times a rest.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from galore_optax.inner import interpreter
from galore_optax.tree import paths


@dataclasses.dataclass(frozen=True)
class Factored:
  """A value that depends on gradients: a gain times a rest.

  Attributes:
    gain: A scalar that depends on counters and hyperparameters only; None
      for 1.
    sign: Sign of the gain: -1 if it contains a negation, such as that of
      descent. Otherwise 1, as learning rates and bias corrections are taken to
      be positive.
    known: Whether the gain and its sign are known.
    uniform: Whether all entries are known to be equal.
  """

  gain: Any = None
  sign: int = 1
  known: bool = True
  uniform: bool = False


@dataclasses.dataclass(frozen=True)
class Free:
  """A value that does not depend on gradients.

  Attributes:
    value: The value.
    scalar: The number that all its entries are equal to; None if not known.
    sign: Sign of the scalar, as for a gain.
  """

  value: Any
  scalar: Any = None
  sign: int = 1


_Part = Factored | Free

_UNKNOWN = Factored(known=False)

# The gain of their operand is that of their result.
_LINEAR = frozenset((
  "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "expand_dims",
  "optimization_barrier", "pvary", "real", "reduce_precision", "reduce_sum",
  "reshape", "rev", "sharding_constraint", "slice", "squeeze", "transpose",
))  # fmt: skip
# Results of one sign whatever the sign of their operand.
_POSITIVE = frozenset((
  "abs", "exp", "logistic", "rsqrt", "sqrt", "square",
))  # fmt: skip


class UnknownGainError(ValueError):
  """The gain of an inner optimizer's update is not known."""


def find_gains(
  inner: optax.GradientTransformationExtraArgs,
  updates: Any,
  state: Any,
  params: Any,
  low: Mapping[str, Any],
  extra_args: Mapping[str, Any],
) -> dict[str, Any]:
  """The gains of an inner update.

  Args:
    inner: The inner optimizer.
    updates: The gradients that it is given.
    state: Its state.
    params: The parameters that it is given, or None.
    low: Mapping whose keys are the paths of the projected leaves.
    extra_args: Extra arguments of its update.

  Returns:
    Path to gain, a scalar or None for 1, for the projected leaves.

  Raises:
    UnknownGainError: If a leaf may have a gain that is not known.
  """
  parts: list[_Part] = [
    *(Factored() for _ in jax.tree.leaves(updates)),
    *(
      Factored() if is_moment else _free(x)
      for is_moment, x in zip(
        interpreter.moment_mask(inner, state),
        jax.tree.leaves(state),
        strict=True,
      )
    ),
    *map(_free, jax.tree.leaves(params)),
  ]
  new, _ = interpreter.interpret(
    _Rules(),
    lambda g, s, p: inner.update(g, s, p, **extra_args),
    (updates, state, params),
    parts,
  )
  gains = {}
  for path, part in paths.leaves_by_path(new).items():
    if path in low:
      if isinstance(part, Factored) and not part.known:
        raise UnknownGainError(path)
      gains[path] = part.gain if isinstance(part, Factored) else None
  return gains


def _free(x: Any) -> Free:
  if jnp.ndim(x):
    return Free(x)
  plain = isinstance(x, int | float | np.number | np.ndarray)
  return Free(x, x, -1 if plain and x < 0 else 1)


class _Rules(interpreter.Rules[_Part]):
  """Writes each value that depends on gradients as a gain times a rest."""

  def constant(self, x: Any) -> _Part:
    return _free(x)

  def is_free(self, value: _Part) -> bool:
    return isinstance(value, Free)

  def carry_out(self, eqn: core.JaxprEqn, values: list[_Part]) -> list[_Part]:
    return _bind(eqn, [x for x in values if isinstance(x, Free)])

  def operation(self, eqn: core.JaxprEqn, values: list[_Part]) -> list[_Part]:
    part = _operation(eqn, values)
    if not isinstance(part, Factored):
      return [part]
    avals: list[Any] = [var.aval for var in eqn.outvars]
    return [_shaped(eqn, values, part, aval.shape) for aval in avals]

  def selects(self, index: _Part) -> bool:
    del index
    return True

  def select(self, index: _Part, outcomes: Sequence[_Part], aval: Any) -> _Part:
    del aval
    return _one_of(index, outcomes)


def _shaped(
  eqn: core.JaxprEqn, parts: list[_Part], part: Factored, shape: tuple
) -> Factored:
  """A result, marked as uniform if all its entries are known to be equal."""
  is_broadcast = eqn.primitive.name == "broadcast_in_dim"
  uniform = shape == () or (
    is_broadcast and getattr(parts[0], "uniform", False)
  )
  return dataclasses.replace(part, uniform=uniform)


def _operation(eqn: core.JaxprEqn, parts: list[_Part]) -> _Part:
  """The result of an operation with an operand that depends on gradients."""
  name = eqn.primitive.name
  factored = [x for x in parts if isinstance(x, Factored)]
  even = name == "integer_pow" and eqn.params["y"] % 2 == 0
  if even or name in _POSITIVE or _is_discrete(eqn):
    return Factored()
  if name == "mul" and eqn.invars[0] is eqn.invars[1]:
    return Factored()
  if not all(x.known for x in factored):
    return _UNKNOWN
  if name in _LINEAR:
    return factored[0]
  if name == "neg":
    return _times(factored[0], _free(-1.0), operator.mul)
  if name in ("mul", "div"):
    return _product(parts, operator.mul if name == "mul" else operator.truediv)
  if name == "sub" and isinstance(parts[0], Free):
    return _times(factored[0], _free(-1.0), operator.mul)
  if name in ("add", "add_any", "sub"):
    return _sum(parts)
  if name == "select_n":
    return _one_of(parts[0], parts[1:])
  return _direction(factored)


def _is_discrete(eqn: core.JaxprEqn) -> bool:
  """Whether a result is an index, a code or a truth value."""
  return not jnp.issubdtype(jnp.result_type(eqn.outvars[0].aval), jnp.inexact)


def _direction(parts: Sequence[Factored]) -> Factored:
  """A new direction, which absorbs the gains of what it is made of."""
  if all(x.known and x.sign > 0 for x in parts):
    return Factored()
  return _UNKNOWN


def _product(parts: Sequence[_Part], op: Callable) -> Factored:
  a, b = parts
  if isinstance(a, Factored) and isinstance(b, Factored):
    if op is operator.mul and a.uniform:
      a, b = b, a
    # A uniform factor without a gain clips a direction by its norm, say. It is
    # no division by a second moment, which makes a new direction.
    return a if b.uniform and b.gain is None else _direction([a, b])
  if isinstance(a, Factored) and isinstance(b, Free):
    # A factor that differs from entry to entry belongs to the direction.
    return a if b.scalar is None else _times(a, b, op)
  if isinstance(a, Free) and isinstance(b, Factored):
    if op is operator.truediv:
      return _direction([b])
    return b if a.scalar is None else _times(b, a, op)
  return _UNKNOWN


def _times(part: Factored, other: Free, op: Callable) -> Factored:
  """A value multiplied (or divided) by a scalar, which joins its gain."""
  gain = op(1.0 if part.gain is None else part.gain, other.scalar)
  return Factored(gain, part.sign * other.sign)


def _sum(parts: Sequence[_Part]) -> Factored:
  """A sum: a new direction if several terms depend on gradients.

  A running mean is an example. One such term alone keeps its gain.
  """
  factored = [x for x in parts if isinstance(x, Factored)]
  return factored[0] if len(factored) == 1 else _direction(factored)


def _one_of(index: _Part, parts: Sequence[_Part]) -> _Part:
  """The value of an array that is one of several."""
  free = [x.value for x in parts if isinstance(x, Free)]
  if isinstance(index, Free) and len(free) == len(parts):
    which = jnp.clip(index.value, 0, len(free) - 1).astype(jnp.int32)
    return _free(jax.lax.select_n(which, *map(jnp.asarray, free)))
  factored = [x for x in parts if isinstance(x, Factored)]
  if not factored:
    return Factored()
  if not all(x.known for x in factored):
    return _UNKNOWN
  first = factored[0].gain
  if all(x.gain is first for x in factored):
    return Factored(first, factored[0].sign)
  if isinstance(index, Factored) and len({x.sign for x in factored}) == 2:
    # A magnitude is given its sign, for instance in reading 8-bit codes.
    return Factored()
  return _direction(factored)


def _bind(eqn: core.JaxprEqn, parts: Sequence[Free]) -> list[_Part]:
  """Carries out an operation on values that do not depend on gradients."""
  name = eqn.primitive.name
  results = interpreter.bind(eqn, [x.value for x in parts])
  if name in ("broadcast_in_dim", "reshape", "copy", "convert_element_type"):
    return [Free(x, parts[0].scalar, parts[0].sign) for x in results]
  signs = {"neg": lambda: -parts[0].sign}
  signs |= dict.fromkeys(("mul", "div"), lambda: parts[0].sign * parts[1].sign)
  sign = signs.get(name, lambda: 1)()
  return [Free(x, None if jnp.ndim(x) else x, sign) for x in results]
