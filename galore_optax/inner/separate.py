r"""Splits an inner optimizer's update into a gradient and a parameter term.

Decoupled weight decay must act on the full weights W, while the inner optimizer
runs on low-rank gradients R. Where its update is a sum :math:`u(R, s, W) = f(R,
s) + h(W)`, both terms are exact: f runs in the subspace and h, the parameter
term, on W. To find h, the inner update is traced at full shapes, every
intermediate value is classified by what it depends on, and only the operations
of h are carried out. Nothing is assumed about the optimizer other than what its
own operations say.
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from galore_optax.inner import interpreter
from galore_optax.tree import paths


class Kind(enum.Enum):
  """What a value depends on, apart from counters and constants."""

  FREE = enum.auto()  # nothing else
  GRADIENT = enum.auto()  # gradients or moments
  PARAMS = enum.auto()  # parameters, and the value is 0 if they are
  SUM = enum.auto()  # a sum of a value of PARAMS and one of the kinds above
  COUPLED = enum.auto()  # anything else


@dataclasses.dataclass(frozen=True)
class Part:
  """A value's kind, and its term that depends on the parameters.

  `value` is the value itself if it is FREE or of PARAMS, the term h of a SUM,
  and None otherwise.
  """

  kind: Kind
  value: Any = None


_GRADIENT = Part(Kind.GRADIENT)
_COUPLED = Part(Kind.COUPLED)
_OF_PARAMS = (Kind.PARAMS, Kind.SUM)

# Linear in all their operands together.
_LINEAR = frozenset((
  "add", "add_any", "broadcast_in_dim", "concatenate", "convert_element_type",
  "copy", "copy_p", "expand_dims", "neg", "optimization_barrier", "pvary",
  "real", "reduce_precision", "reduce_sum", "reshape", "rev",
  "sharding_constraint", "slice", "squeeze", "sub", "transpose",
))  # fmt: skip
# Not linear but 0 at 0, so that f(R, s) + h(0) is f(R, s).
_ZERO_AT_ZERO = frozenset((
  "abs", "integer_pow", "max", "min", "sign", "sqrt", "square",
))  # fmt: skip


class CoupledError(ValueError):
  """The update of an inner optimizer is not a sum of the two terms."""


def param_term(
  inner: optax.GradientTransformationExtraArgs,
  state: Any,
  params: Any,
  low: Mapping[str, Any],
  extra_args: Mapping[str, Any],
) -> dict[str, jax.Array]:
  """The parameter term h(W) of an inner update, at full size.

  Args:
    inner: The inner optimizer.
    state: Its state, on whose counters and hyperparameters h may depend.
    params: The full parameters W.
    low: Mapping whose keys are the paths of the projected leaves.
    extra_args: Extra arguments of the update.

  Returns:
    Path to h(W), of the leaf's shape, for the projected leaves whose update
    depends on the parameters.

  Raises:
    CoupledError: If the update of a projected leaf, or the state that is kept
      for it, depends on the parameters in another way.
  """
  state, moments = _full_size(inner, state, params)
  grads = jax.tree.map(_abstract, params)
  parts = [
    *(_GRADIENT for _ in jax.tree.leaves(grads)),
    *(
      _GRADIENT if is_moment else Part(Kind.FREE, x)
      for is_moment, x in zip(moments, jax.tree.leaves(state), strict=True)
    ),
    *(Part(Kind.PARAMS, x) for x in jax.tree.leaves(params)),
  ]
  updates, new_state = interpreter.interpret(
    _Rules(),
    lambda g, s, p: inner.update(g, s, p, **extra_args),
    (grads, state, params),
    parts,
  )
  terms = _terms_of_params(updates, low)
  if terms:
    _check_state(inner, _initial_parts(inner, params), low)
  _check_state(inner, new_state, low)
  return terms


def check_initial_state(
  inner: optax.GradientTransformationExtraArgs,
  params: Any,
  low: Mapping[str, Any],
) -> None:
  """Raises if the initial state of an inner optimizer depends on parameters.

  Args:
    inner: The inner optimizer.
    params: What it is initialized with.
    low: Mapping whose keys are the paths of the projected leaves.

  Raises:
    CoupledError: If the state that is kept for a projected leaf, or for all,
      depends on the parameters, as that of schedule-free optimizers does.
  """
  _check_state(inner, _initial_parts(inner, params), low)


def _initial_parts(
  inner: optax.GradientTransformationExtraArgs, params: Any
) -> Any:
  """The state that `init` makes, with a part for each array."""
  parts = [Part(Kind.PARAMS, x) for x in jax.tree.leaves(params)]
  return interpreter.interpret(_Rules(), inner.init, (params,), parts)


def _full_size(
  inner: optax.GradientTransformationExtraArgs, state: Any, params: Any
) -> tuple[Any, list[bool]]:
  """The state with abstract moments of the parameters' shapes.

  Counters stay as they are. Also returns whether each leaf is a moment.
  """
  full = jax.eval_shape(inner.init, params)
  moments = interpreter.moment_mask(inner, full)
  low_moments = interpreter.moment_mask(inner, state)
  # The two states need not have the same moments: those of a large leaf may be
  # kept as codes, and those of its projection not. Only the rest corresponds.
  counters = iter(
    [
      x
      for x, is_moment in zip(jax.tree.leaves(state), low_moments, strict=True)
      if not is_moment
    ]
  )
  leaves, treedef = jax.tree.flatten(full)
  state = treedef.unflatten(
    x if is_moment else next(counters)
    for x, is_moment in zip(leaves, moments, strict=True)
  )
  return state, moments


def _abstract(x: jax.typing.ArrayLike) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def _check_state(
  inner: optax.GradientTransformationExtraArgs,
  state: Any,
  low: Mapping[str, Any],
) -> None:
  """Raises if state that is shared or kept for `low` depends on parameters."""

  def check(name: str, part: Part) -> None:
    if part.kind in (*_OF_PARAMS, Kind.COUPLED):
      raise CoupledError(f"the state kept for {name} depends on the parameters")

  def check_tree(tree: Any) -> Any:
    for path, parts in paths.leaves_by_path(tree).items():
      if path in low:
        for part in jax.tree.leaves(parts):
          check(repr(path), part)
    return tree

  optax.tree.map_params(
    inner.init,
    check_tree,
    state,
    is_leaf=lambda _: True,
    transform_non_params=lambda part: check("all leaves", part),
  )


def _terms_of_params(
  updates: Any, low: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """Path to the parameter term of each projected leaf's update."""
  parts = {
    path: part
    for path, part in paths.leaves_by_path(updates).items()
    if path in low
  }
  for path, part in parts.items():
    if part.kind is Kind.COUPLED:
      raise CoupledError(
        f"the update of {path!r} mixes gradients and parameters"
      )
  return {p: x.value for p, x in parts.items() if x.kind in _OF_PARAMS}


class _Rules(interpreter.Rules[Part]):
  """Classifies values by what they depend on, and computes their h."""

  def constant(self, x: Any) -> Part:
    return Part(Kind.FREE, x)

  def is_free(self, value: Part) -> bool:
    return value.kind is Kind.FREE

  def carry_out(self, eqn: core.JaxprEqn, values: list[Part]) -> list[Part]:
    return _bind(eqn, [part.value for part in values], Kind.FREE)

  def operation(self, eqn: core.JaxprEqn, values: list[Part]) -> list[Part]:
    kinds = {part.kind for part in values}
    if kinds <= {Kind.FREE, Kind.GRADIENT}:
      return [_GRADIENT] * len(eqn.outvars)
    if Kind.COUPLED in kinds:
      return [_COUPLED] * len(eqn.outvars)
    return _of_params(eqn, values)

  def selects(self, index: Part) -> bool:
    return index.kind is Kind.FREE

  def select(self, index: Part, outcomes: Sequence[Part], aval: Any) -> Part:
    """Takes the same branch of both terms, by a counter."""
    kind = _join({part.kind for part in outcomes})
    if kind in (Kind.GRADIENT, Kind.COUPLED):
      return Part(kind)
    keep = (Kind.FREE,) if kind is Kind.FREE else _OF_PARAMS
    values = [
      part.value if part.kind in keep else _zeros(aval) for part in outcomes
    ]
    which = jnp.clip(index.value, 0, len(values) - 1).astype(jnp.int32)
    return Part(kind, jax.lax.select_n(which, *map(jnp.asarray, values)))


def _of_params(eqn: core.JaxprEqn, parts: list[Part]) -> list[Part]:
  """The results of an operation with an operand that depends on parameters."""
  name = eqn.primitive.name
  values = [part.value for part in parts]
  first, *rest = (part.kind for part in parts)
  if name in ("mul", "div") and rest == [Kind.FREE]:
    return _bind(eqn, values, first)
  if name == "mul" and first is Kind.FREE:
    return _bind(eqn, values, rest[0])
  if name in _LINEAR:
    return _linear(eqn, parts)
  if name == "select_n" and first is Kind.FREE:
    return _linear(eqn, parts, fixed=1)
  zero_at_zero = name in _ZERO_AT_ZERO and eqn.params.get("y", 1) > 0
  if zero_at_zero and {first, *rest} == {Kind.PARAMS}:
    return _bind(eqn, values, Kind.PARAMS)
  return [_COUPLED] * len(eqn.outvars)


def _linear(
  eqn: core.JaxprEqn, parts: list[Part], fixed: int = 0
) -> list[Part]:
  """An operation that is linear in all operands after the first `fixed`."""
  values = [part.value for part in parts[:fixed]]
  for atom, part in zip(eqn.invars[fixed:], parts[fixed:], strict=True):
    values.append(part.value if part.kind in _OF_PARAMS else _zeros(atom.aval))
  alone = all(part.kind is Kind.PARAMS for part in parts[fixed:])
  return _bind(eqn, values, Kind.PARAMS if alone else Kind.SUM)


def _join(kinds: set[Kind]) -> Kind:
  """The kind of a value that may be of any of these kinds."""
  if len(kinds) == 1:
    return next(iter(kinds))
  if Kind.COUPLED in kinds:
    return Kind.COUPLED
  return Kind.SUM if kinds & set(_OF_PARAMS) else Kind.GRADIENT


def _bind(eqn: core.JaxprEqn, values: Sequence[Any], kind: Kind) -> list[Part]:
  return [Part(kind, x) for x in interpreter.bind(eqn, values)]


def _zeros(aval: Any) -> jax.Array:
  return jnp.zeros(aval.shape, aval.dtype)
