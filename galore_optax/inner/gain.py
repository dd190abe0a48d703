r"""What an inner optimizer multiplies its direction by at the end.

Most optimizers end in a factor that has nothing to do with gradients: the
learning rate, and the sign of descent. What compares updates with gradients, or
with updates of other steps, must leave it out: in a warm-up it is zero first
and then grows quickly. Here it is found: the inner update is traced, and each
value that depends on gradients is written as a scalar gain times a rest.
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

from galore_optax.inner import separate
from galore_optax.tree import paths


@dataclasses.dataclass(frozen=True)
class Factored:
  """A value that depends on gradients: a gain times a rest.

  Attributes:
    gain: A scalar that depends on counters and hyperparameters only; None
      for 1.
    sign: The gain's: -1 if it came by a minus, as that of descent does, and
      otherwise taken to be 1, as are learning rates and bias corrections.
    known: False where no gain can be told apart, and so no sign.
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
    scalar: What all its entries are equal to; None if that is not known.
    sign: The scalar's, as that of a gain.
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
  """The last factor of an inner optimizer's update cannot be told."""


def of_updates(
  inner: optax.GradientTransformationExtraArgs,
  updates: Any,
  state: Any,
  params: Any,
  low: Mapping[str, Any],
  extra_args: Mapping[str, Any],
) -> dict[str, Any]:
  """The gain of an inner update.

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
    UnknownGainError: If there may be a gain that cannot be told.
  """
  closed, out = jax.make_jaxpr(
    lambda g, s, p: inner.update(g, s, p, **extra_args), return_shape=True
  )(updates, state, params)
  parts: list[_Part] = [
    *(Factored() for _ in jax.tree.leaves(updates)),
    *(
      Factored() if is_moment else _free(x)
      for is_moment, x in zip(
        separate.moments_of(inner, state), jax.tree.leaves(state), strict=True
      )
    ),
    *map(_free, jax.tree.leaves(params)),
  ]
  found = _evaluate(closed.jaxpr, closed.consts, parts)
  new, _ = jax.tree.unflatten(jax.tree.structure(out), found)
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


def _evaluate(
  jaxpr: core.Jaxpr, consts: Sequence[Any], parts: Sequence[_Part]
) -> list[_Part]:
  """The parts of a jaxpr's outputs, given those of its inputs."""
  env: dict[Any, _Part] = dict(zip(jaxpr.invars, parts, strict=True))
  env |= {v: _free(x) for v, x in zip(jaxpr.constvars, consts, strict=True)}

  def read(atom: Any) -> _Part:
    return _free(atom.val) if isinstance(atom, core.Literal) else env[atom]

  for eqn in jaxpr.eqns:
    found = _equation(eqn, [read(atom) for atom in eqn.invars])
    env |= dict(zip(eqn.outvars, found, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _equation(eqn: core.JaxprEqn, parts: list[_Part]) -> list[_Part]:
  """The parts of one operation's outputs."""
  name = eqn.primitive.name
  if name in separate.CALLS:
    return _evaluate(*separate.body(eqn), parts)
  free = [x for x in parts if isinstance(x, Free)]
  if len(free) == len(parts):
    return _bind(eqn, free)
  if name == "cond":
    branches = [
      _evaluate(branch.jaxpr, branch.consts, parts[1:])
      for branch in eqn.params["branches"]
    ]
    outcomes = zip(*branches, strict=True)
    return [_one_of(parts[0], outcome) for outcome in outcomes]
  part = _operation(eqn, parts)
  if not isinstance(part, Factored):
    return [part]
  avals: list[Any] = [var.aval for var in eqn.outvars]
  shapes = [aval.shape for aval in avals]
  return [_shaped(eqn, parts, part, shape) for shape in shapes]


def _shaped(
  eqn: core.JaxprEqn, parts: list[_Part], part: Factored, shape: tuple
) -> Factored:
  """A result, with what is known of its entries."""
  spread = eqn.primitive.name == "broadcast_in_dim"
  uniform = shape == () or (spread and getattr(parts[0], "uniform", False))
  return dataclasses.replace(part, uniform=uniform)


def _operation(eqn: core.JaxprEqn, parts: list[_Part]) -> _Part:
  """One operation of which at least one operand depends on gradients."""
  name = eqn.primitive.name
  factored = [x for x in parts if isinstance(x, Factored)]
  even = name == "integer_pow" and eqn.params["y"] % 2 == 0
  if even or name in _POSITIVE or _is_code(eqn):
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
  return _mixed(factored)


def _is_code(eqn: core.JaxprEqn) -> bool:
  """Whether a result is a number of something, not a size."""
  return not jnp.issubdtype(jnp.result_type(eqn.outvars[0].aval), jnp.inexact)


def _mixed(parts: Sequence[Factored]) -> Factored:
  """A new direction, of which factors on the way to it are a part."""
  if all(x.known and x.sign > 0 for x in parts):
    return Factored()
  return _UNKNOWN


def _product(parts: Sequence[_Part], op: Callable) -> Factored:
  a, b = parts
  if isinstance(a, Factored) and isinstance(b, Factored):
    if op is operator.mul and a.uniform:
      a, b = b, a
    # Clipped by its norm, say; and not divided by a second moment.
    return a if b.uniform and b.gain is None else _mixed([a, b])
  if isinstance(a, Factored) and isinstance(b, Free):
    # What differs from entry to entry belongs to the direction.
    return a if b.scalar is None else _times(a, b, op)
  if isinstance(a, Free) and isinstance(b, Factored):
    if op is operator.truediv:
      return _mixed([b])
    return b if a.scalar is None else _times(b, a, op)
  return _UNKNOWN


def _times(part: Factored, other: Free, op: Callable) -> Factored:
  gain = op(1.0 if part.gain is None else part.gain, other.scalar)
  return Factored(gain, part.sign * other.sign)


def _sum(parts: Sequence[_Part]) -> Factored:
  """A running mean, say, unless gradients are in one summand alone."""
  factored = [x for x in parts if isinstance(x, Factored)]
  return factored[0] if len(factored) == 1 else _mixed(factored)


def _one_of(index: _Part, parts: Sequence[_Part]) -> _Part:
  """A value that is one of several."""
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
    # A magnitude that is given its sign, as codes of 8 bits are.
    return Factored()
  return _mixed(factored)


def _bind(eqn: core.JaxprEqn, parts: Sequence[Free]) -> list[_Part]:
  """Carries an operation on values without gradients out."""
  name = eqn.primitive.name
  found = separate.bind(eqn, [x.value for x in parts])
  if name in ("broadcast_in_dim", "reshape", "copy", "convert_element_type"):
    return [Free(x, parts[0].scalar, parts[0].sign) for x in found]
  signs = {"neg": lambda: -parts[0].sign}
  signs |= dict.fromkeys(("mul", "div"), lambda: parts[0].sign * parts[1].sign)
  sign = signs.get(name, lambda: 1)()
  return [Free(x, None if jnp.ndim(x) else x, sign) for x in found]
