"""Runs a traced function with projected weights in place of arrays.

A traced function is a list of primitive operations, its jaxpr. The list is
carried out again. Operations that only pass a weight on (a loop over layers, a
checkpoint, a cast, a transposition) pass on the projected weight; the product
that uses it becomes :func:`galore_optax.projected.product.dot`. Any other use,
and any second one, reads the weight as an array, which is right for every
operation, and then forms the gradient of what the operation used.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from galore_optax.projected import product
from galore_optax.projected.weight import Weight

# Calls that are carried out in place.
_INLINE = frozenset(("jit", "pjit", "closed_call", "core_call"))


def run(closed: core.ClosedJaxpr, values: Sequence[Any]) -> list[jax.Array]:
  """Carries a jaxpr out.

  Args:
    closed: The jaxpr and its constants.
    values: An array or a :class:`Weight` for each of its inputs.

  Returns:
    Its outputs.
  """
  # Some libraries return a layer's weights from it, although nothing uses them.
  used = [True] * len(closed.jaxpr.outvars)
  jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, used, instantiate=True)
  return _run(jaxpr, closed.consts, values)


def _run(
  jaxpr: core.Jaxpr, consts: Sequence[Any], values: Sequence[Any]
) -> list[jax.Array]:
  uses = Counter(
    atom
    for atoms in (jaxpr.outvars, *(eqn.invars for eqn in jaxpr.eqns))
    for atom in atoms
    if not isinstance(atom, core.Literal)
  )
  env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
  last = _last_uses(jaxpr)

  def write(var: Any, value: Any) -> None:
    # The gradient of a weight with two uses is a sum, of which a product sees
    # one term. The array collects them all.
    is_shared = isinstance(value, Weight) and uses[var] > 1
    env[var] = product.read(value) if is_shared else value

  def value_of(atom: Any) -> Any:
    return atom.val if isinstance(atom, core.Literal) else env[atom]

  for var, value in zip(jaxpr.invars, values, strict=True):
    write(var, value)
  for eqn, done in zip(jaxpr.eqns, last, strict=True):
    results = _carry_out(eqn, [value_of(atom) for atom in eqn.invars])
    for var, value in zip(eqn.outvars, results, strict=True):
      write(var, value)
    for var in done:
      env.pop(var, None)
  return [_as_array(value_of(atom)) for atom in jaxpr.outvars]


def _last_uses(jaxpr: core.Jaxpr) -> list[list[Any]]:
  """The variables that each equation is the last to use."""
  seen = {atom for atom in jaxpr.outvars if not isinstance(atom, core.Literal)}
  last = []
  for eqn in reversed(jaxpr.eqns):
    used = {x for x in eqn.invars if not isinstance(x, core.Literal)}
    last.append([var for var in used if var not in seen])
    seen |= used
  return last[::-1]


def _carry_out(eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
  """The results of an operation; they may be weights."""
  if not any(isinstance(x, Weight) for x in values):
    return _bind(eqn, values)
  rule = _RULES.get(eqn.primitive.name)
  if eqn.primitive.name in _INLINE:
    rule = _inline
  results = rule(eqn, values) if rule else None
  return _bind(eqn, [*map(_as_array, values)]) if results is None else results


def _as_array(value: Any) -> Any:
  return product.read(value) if isinstance(value, Weight) else value


def _bind(eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
  """Carries an operation out on arrays."""
  params = eqn.primitive.get_bind_params(eqn.params)
  with eqn.ctx.manager:
    results = eqn.primitive.bind(*values, **params)
  return list(results) if eqn.primitive.multiple_results else [results]


def _inline(eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
  """A call: its operations."""
  inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
  return _run(*_opened(inner), values)


def _opened(jaxpr: Any) -> tuple[core.Jaxpr, Sequence[Any]]:
  """A jaxpr and its constants; which of the two kinds a call holds varies."""
  if isinstance(jaxpr, core.ClosedJaxpr):
    return jaxpr.jaxpr, jaxpr.consts
  return jaxpr, ()


def _checkpoint(eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
  """A checkpoint: the same around its operations."""
  checkpointed: Callable = jax.checkpoint(
    lambda values: _run(*_opened(eqn.params["jaxpr"]), values),
    prevent_cse=eqn.params["prevent_cse"],
    policy=eqn.params["policy"],
  )
  return checkpointed(values)


def _scan(eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
  """A loop: the same loop, which slices projected weights too."""
  params = eqn.params
  inner, constants = _opened(params["jaxpr"])
  consts, carries = _scan_counts(params)
  first = consts + carries
  # What all steps of the loop share collects its gradient over all of them.
  shared = [*map(_as_array, values[:first])]
  slices, makes = [], []
  for value in values[first:]:
    arrays, make = value, lambda x: x
    if isinstance(value, Weight):
      if value.can_slice(0):
        arrays, make = value.slices(0)
      else:
        arrays = product.read(value)
    slices.append(arrays)
    makes.append(make)

  def body(carry: list, elements: list) -> tuple[list, list]:
    sliced = [make(x) for make, x in zip(makes, elements, strict=True)]
    out = _run(inner, constants, [*shared[:consts], *carry, *sliced])
    return out[: len(carry)], out[len(carry) :]

  carry, stacked = jax.lax.scan(
    body,
    shared[consts:],
    slices,
    length=params["length"],
    reverse=params["reverse"],
    unroll=params["unroll"],
  )
  return [*carry, *stacked]


def _scan_counts(params: Any) -> tuple[int, int]:
  """Numbers of a loop's operands that all steps share, and that it carries."""
  if "num_consts" in params:
    return params["num_consts"], params["num_carry"]
  shared, carried, _ = params["ft_in"].unpack()  # from JAX 0.12 on
  return len(shared), len(carried)


def _dot_general(eqn: core.JaxprEqn, values: list[Any]) -> list[Any] | None:
  """A product: without the gradient of the weight, if it can be."""
  x, weight = values
  if isinstance(x, Weight) and isinstance(weight, Weight):
    return None
  weight_first = isinstance(x, Weight)
  contract, batch = eqn.params["dimension_numbers"]
  if weight_first:
    x, weight = weight, x
    contract, batch = contract[::-1], batch[::-1]
  options = dict(eqn.params)
  del options["dimension_numbers"]
  rule = product.Dot(
    (tuple(contract[0]), tuple(contract[1])),
    (tuple(batch[0]), tuple(batch[1])),
    weight_first,
    tuple(sorted(options.items())),
  )
  if not rule.fits(weight):
    return None
  with eqn.ctx.manager:
    return [product.dot(rule, x, weight)]


def _convert(eqn: core.JaxprEqn, values: list[Any]) -> list[Any] | None:
  """A cast to another float dtype."""
  dtype = eqn.params["new_dtype"]
  if not jax.numpy.issubdtype(dtype, jax.numpy.floating):
    return None
  return [values[0].with_form(dtype=dtype)]


def _transpose(eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
  """A permutation of the axes."""
  axes = values[0].form.axes
  permuted = tuple(axes[k] for k in eqn.params["permutation"])
  return [values[0].with_form(axes=permuted)]


def _vary(eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
  """In `jax.shard_map`: the same on all devices, to be used by each alone."""
  axes = values[0].form.varying
  return [values[0].with_form(varying=(*axes, *eqn.params["axes"]))]


_RULES: dict[str, Callable] = {
  "checkpoint": _checkpoint,
  "remat2": _checkpoint,
  "scan": _scan,
  "dot_general": _dot_general,
  "convert_element_type": _convert,
  "transpose": _transpose,
  "pvary": _vary,
}
