r"""What an inner optimizer's update owes to the parameters alone.

Decoupled weight decay must act on the full weights W, while the inner optimizer
runs on low-rank gradients R. Where its update is separable, :math:`u(R, s, W) =
f(R, s) + h(W)`, both are exact: f runs in the subspace and h on W. Here h is
found: the inner update is traced at full shapes, every intermediate value is
classified by what it depends on, and only the operations of h are carried out.
Nothing is assumed of the optimizer beyond what its own operations say.
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from galore_optax.tree import paths


class Kind(enum.Enum):
  """What a value depends on besides counters and constants."""

  FREE = enum.auto()  # nothing else
  GRADIENT = enum.auto()  # gradients or moments
  PARAMS = enum.auto()  # parameters, and the value is 0 where they are
  SUM = enum.auto()  # a sum of a value of PARAMS and one of the kinds above
  COUPLED = enum.auto()  # anything else


@dataclasses.dataclass(frozen=True)
class Part:
  """A value's kind, and its summand that depends on the parameters.

  `value` is the value itself if it is FREE or of PARAMS, the summand h of a
  SUM, and None otherwise.
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
# Calls whose operands are those of the jaxpr they hold.
CALLS = frozenset((
  "checkpoint", "closed_call", "core_call", "custom_jvp_call",
  "custom_vjp_call", "jit", "pjit", "remat", "remat2",
))  # fmt: skip
# Not linear but 0 at 0, so that f(R, s) + h(0) is f(R, s).
_ZERO_AT_ZERO = frozenset((
  "abs", "integer_pow", "max", "min", "sign", "sqrt", "square",
))  # fmt: skip


class CoupledError(ValueError):
  """The update of an inner optimizer does not separate."""


def of_params(
  inner: optax.GradientTransformationExtraArgs,
  state: Any,
  params: Any,
  low: Mapping[str, Any],
  extra_args: Mapping[str, Any],
) -> dict[str, jax.Array]:
  """The summand h(W) of an inner update, on the full parameters.

  Args:
    inner: The inner optimizer.
    state: Its state, whose counters and hyperparameters h may depend on.
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
  closed, out = jax.make_jaxpr(
    lambda g, s, p: inner.update(g, s, p, **extra_args), return_shape=True
  )(grads, state, params)
  parts = [
    *(_GRADIENT for _ in jax.tree.leaves(grads)),
    *(
      _GRADIENT if is_moment else Part(Kind.FREE, x)
      for is_moment, x in zip(moments, jax.tree.leaves(state), strict=True)
    ),
    *(Part(Kind.PARAMS, x) for x in jax.tree.leaves(params)),
  ]
  parts = _evaluate(closed.jaxpr, closed.consts, parts)
  updates, new_state = jax.tree.unflatten(jax.tree.structure(out), parts)
  found = _summands(updates, low)
  if found:
    _check_state(inner, _initial(inner, params), low)
  _check_state(inner, new_state, low)
  return found


def check_initial(
  inner: optax.GradientTransformationExtraArgs,
  params: Any,
  low: Mapping[str, Any],
) -> None:
  """Sees that the state of an inner optimizer does not begin with parameters.

  Args:
    inner: The inner optimizer.
    params: What it is initialised with.
    low: Mapping whose keys are the paths of the projected leaves.

  Raises:
    CoupledError: If the state that is kept for a projected leaf, or for all,
      depends on the parameters, as that of schedule-free optimizers does.
  """
  _check_state(inner, _initial(inner, params), low)


def _initial(inner: optax.GradientTransformationExtraArgs, params: Any) -> Any:
  """The state that `init` makes, as parts."""
  closed, out = jax.make_jaxpr(inner.init, return_shape=True)(params)
  parts = [Part(Kind.PARAMS, x) for x in jax.tree.leaves(params)]
  parts = _evaluate(closed.jaxpr, closed.consts, parts)
  return jax.tree.unflatten(jax.tree.structure(out), parts)


def _full_size(
  inner: optax.GradientTransformationExtraArgs, state: Any, params: Any
) -> tuple[Any, list[bool]]:
  """The state with abstract moments of the parameters' shapes.

  Also says of each leaf whether it is a moment; counters stay as they are.
  """
  full = jax.eval_shape(inner.init, params)
  moments, live_moments = moments_of(inner, full), moments_of(inner, state)
  # A large leaf's moments may be kept otherwise than those of its projection,
  # such as in codes: only what is no moment corresponds.
  live = jax.tree.leaves(state)
  counters = [
    x for x, is_moment in zip(live, live_moments, strict=True) if not is_moment
  ]
  leaves, treedef = jax.tree.flatten(full)
  rest = iter(counters)
  state = treedef.unflatten(
    x if is_moment else next(rest)
    for x, is_moment in zip(leaves, moments, strict=True)
  )
  return state, moments


def moments_of(
  inner: optax.GradientTransformationExtraArgs, state: Any
) -> list[bool]:
  """Of each leaf of a state, whether it is a moment."""
  return jax.tree.leaves(
    optax.tree.map_params(
      inner.init, lambda _: True, state, transform_non_params=lambda _: False
    )
  )


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


def _summands(updates: Any, low: Mapping[str, Any]) -> dict[str, jax.Array]:
  found = {
    path: part
    for path, part in paths.leaves_by_path(updates).items()
    if path in low
  }
  for path, part in found.items():
    if part.kind is Kind.COUPLED:
      raise CoupledError(
        f"the update of {path!r} mixes gradients and parameters"
      )
  return {p: x.value for p, x in found.items() if x.kind in _OF_PARAMS}


def _evaluate(
  jaxpr: core.Jaxpr, consts: Sequence[Any], parts: Sequence[Part]
) -> list[Part]:
  """The parts of a jaxpr's outputs, given those of its inputs."""
  env = dict(zip(jaxpr.invars, parts, strict=True))
  env |= {
    var: Part(Kind.FREE, x)
    for var, x in zip(jaxpr.constvars, consts, strict=True)
  }

  def read(atom: Any) -> Part:
    if isinstance(atom, core.Literal):
      return Part(Kind.FREE, atom.val)
    return env[atom]

  for eqn in jaxpr.eqns:
    found = _equation(eqn, [read(atom) for atom in eqn.invars])
    env |= dict(zip(eqn.outvars, found, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _equation(eqn: core.JaxprEqn, parts: list[Part]) -> list[Part]:
  """The parts of one operation's outputs."""
  kinds = {part.kind for part in parts}
  if eqn.primitive.name in CALLS:
    return _evaluate(*body(eqn), parts)
  if kinds <= {Kind.FREE}:
    return _bind(eqn, [part.value for part in parts], Kind.FREE)
  if eqn.primitive.name == "cond" and parts[0].kind is Kind.FREE:
    return _cond(eqn, parts)
  if kinds <= {Kind.FREE, Kind.GRADIENT}:
    return [_GRADIENT] * len(eqn.outvars)
  if Kind.COUPLED in kinds:
    return [_COUPLED] * len(eqn.outvars)
  return _of_params(eqn, parts)


def _of_params(eqn: core.JaxprEqn, parts: list[Part]) -> list[Part]:
  """One operation of which at least one operand depends on parameters."""
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
  """An operation linear in its operands but the first `fixed` ones."""
  values = [part.value for part in parts[:fixed]]
  for atom, part in zip(eqn.invars[fixed:], parts[fixed:], strict=True):
    values.append(part.value if part.kind in _OF_PARAMS else _zeros(atom.aval))
  alone = all(part.kind is Kind.PARAMS for part in parts[fixed:])
  return _bind(eqn, values, Kind.PARAMS if alone else Kind.SUM)


def _cond(eqn: core.JaxprEqn, parts: list[Part]) -> list[Part]:
  """A branch on counters: the same branch of every summand."""
  index, operands = parts[0].value, parts[1:]
  branches = [
    _evaluate(branch.jaxpr, branch.consts, operands)
    for branch in eqn.params["branches"]
  ]
  return [
    _select(index, outcomes, var.aval)
    for outcomes, var in zip(
      zip(*branches, strict=True), eqn.outvars, strict=True
    )
  ]


def _select(index: Any, outcomes: Sequence[Part], aval: Any) -> Part:
  """The part of a value that is one of several, by a counter."""
  kind = _join({part.kind for part in outcomes})
  if kind in (Kind.GRADIENT, Kind.COUPLED):
    return Part(kind)
  keep = (Kind.FREE,) if kind is Kind.FREE else _OF_PARAMS
  values = [
    part.value if part.kind in keep else _zeros(aval) for part in outcomes
  ]
  index = jnp.clip(index, 0, len(values) - 1).astype(jnp.int32)
  return Part(kind, jax.lax.select_n(index, *map(jnp.asarray, values)))


def _join(kinds: set[Kind]) -> Kind:
  """The kind of a value that is of one of these kinds."""
  if len(kinds) == 1:
    return next(iter(kinds))
  if Kind.COUPLED in kinds:
    return Kind.COUPLED
  return Kind.SUM if kinds & set(_OF_PARAMS) else Kind.GRADIENT


def _bind(eqn: core.JaxprEqn, values: Sequence[Any], kind: Kind) -> list[Part]:
  return [Part(kind, x) for x in bind(eqn, values)]


def bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
  """Carries an operation out."""
  out = eqn.primitive.bind(*values, **eqn.params)
  return list(out) if eqn.primitive.multiple_results else [out]


def body(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence[Any]]:
  """The operations inside a call."""
  body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
  if isinstance(body, core.ClosedJaxpr):
    return body.jaxpr, body.consts
  return body, ()


def _zeros(aval: Any) -> jax.Array:
  return jnp.zeros(aval.shape, aval.dtype)
