"""The cost of a traced program, from its jaxpr: FLOPs and live bytes.

Tracing needs shapes only, so counting a 7B model takes a second on a laptop.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

# Operations that are views of their operand, or so cheap that the compiler
# repeats them inside the operations that read them.
_VIEWS = frozenset(
  (
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "optimization_barrier",
    "reshape",
    "sharding_constraint",
    "slice",
    "squeeze",
    "stop_gradient",
    "transpose",
  )
)
_FUSED = frozenset(("broadcast_in_dim", "iota"))
# Operations that still read their operands while they write. Unlike the result
# of an elementwise operation, theirs cannot take the memory of an operand.
_NOT_IN_PLACE = frozenset(
  (
    "concatenate",
    "conv_general_dilated",
    "dot_general",
    "gather",
    "ragged_dot_general",
    "sort",
  )
)
_CALLS = frozenset(
  (
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "jit",
    "pjit",
  )
)


def sub_jaxprs(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
  """The jaxprs inside an equation: bodies, branches, callees."""
  found = []
  for value in eqn.params.values():
    for part in value if isinstance(value, tuple | list) else (value,):
      if isinstance(part, core.ClosedJaxpr):
        found.append(part.jaxpr)
      elif isinstance(part, core.Jaxpr):
        found.append(part)
  return found


def count_flops(
  jaxpr: core.Jaxpr, branch: Callable[[list[int]], int] = max
) -> int:
  """FLOPs of the matrix products: 2 for a multiplication and an addition.

  A scan's body counts as often as it runs. A loop of unknown length counts as a
  conditional, with its body once in one branch and nothing in the other: that
  is how GaLore changes what may or may not be due. Elementwise operations do
  not count, as is usual: they are some percent of a large model's work.

  Args:
    jaxpr: the program.
    branch: which branch of a conditional counts: `max` for the most expensive
      one, or `min`.
  """
  total = 0
  for eqn in jaxpr.eqns:
    inner = [count_flops(part, branch) for part in sub_jaxprs(eqn)]
    if eqn.primitive.name == "dot_general":
      total += _product_flops(eqn)
    elif eqn.primitive.name == "ragged_dot_general":
      total += _ragged_flops(eqn)
    elif eqn.primitive.name == "scan":
      total += eqn.params["length"] * sum(inner)
    elif eqn.primitive.name == "cond":
      total += branch(inner)
    elif eqn.primitive.name == "while":
      total += branch([0, sum(inner)])
    else:
      total += sum(inner)
  return total


def _product_flops(eqn: core.JaxprEqn) -> int:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  operand: Any = eqn.invars[0].aval
  result: Any = eqn.outvars[0].aval
  shape = operand.shape
  depth = math.prod(shape[axis] for axis in contracted)
  return 2 * depth * math.prod(result.shape)


def _ragged_flops(eqn: core.JaxprEqn) -> int:
  """FLOPs of a product of runs of rows, each with its own matrix.

  Every row counts once, however many matrices there are. Either the rows are
  kept, and each is multiplied by the matrix of its run. Or they are summed over
  within their run: then the result has a leading axis of runs, along which the
  work is divided.
  """
  numbers = eqn.params["ragged_dot_dimension_numbers"]
  (contracted, _), _ = numbers.dot_dimension_numbers
  operand: Any = eqn.invars[0].aval
  result: Any = eqn.outvars[0].aval
  depth = math.prod(operand.shape[axis] for axis in contracted)
  is_summed = numbers.lhs_ragged_dimensions[0] in contracted
  runs = result.shape[0] if is_summed else 1
  return 2 * depth * math.prod(result.shape) // runs


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
  """An array of a program without calls, known by its identity."""

  size: int  # bytes


@dataclasses.dataclass(frozen=True, eq=False)
class _Operation:
  name: str
  reads: list[_Value]
  writes: list[_Value]
  inner: int  # live bytes inside its own jaxprs


def peak_bytes(jaxpr: core.Jaxpr) -> int:
  """The maximum of live bytes of a program's intermediate arrays.

  Arguments and results are not counted. Operations run in the sequence of the
  trace. Views and broadcasts are free, and an elementwise operation overwrites
  an operand that is not read later. For the loss and gradient of a transformer
  this is close to the buffers that XLA assigns, as a test shows.
  """
  operations, results = _inline(jaxpr, [_Value(0) for _ in jaxpr.invars])
  owners: dict[_Value, _Value] = {}
  for op in operations:
    if op.name in _VIEWS and op.reads:
      owners[op.writes[0]] = owners.get(op.reads[0], op.reads[0])
  own = lambda value: owners.get(value, value)
  last = {own(v): i for i, op in enumerate(operations) for v in op.reads}
  free = {own(v) for v in results}
  sizes: dict[_Value, int] = {}
  alive = most = 0
  for i, op in enumerate(operations):
    for value in op.writes:
      known = value in last and value not in free
      made = known and op.name not in _FUSED
      sizes[value] = value.size if made else 0
    new = sum(sizes[v] for v in op.writes)
    ended = sum(sizes.get(v, 0) for v in {*map(own, op.reads)} if last[v] == i)
    not_in_place = op.inner or op.name in _NOT_IN_PLACE
    most = max(most, alive + _working(op, new) - (0 if not_in_place else ended))
    alive += new - ended
  return most


def _working(op: _Operation, new: int) -> int:
  """Bytes that an operation needs while it runs."""
  # The results of a rematerialised block are already in its own count.
  if op.name in ("checkpoint", "remat", "remat2"):
    return max(op.inner, new)
  return new + op.inner


def _inline(
  jaxpr: core.Jaxpr, arguments: list[_Value]
) -> tuple[list[_Operation], list[_Value]]:
  """The operations of a program with all calls inlined, and its results."""
  known: dict[Any, _Value] = dict(zip(jaxpr.invars, arguments, strict=True))

  def look_up(variables: list) -> Iterator[_Value]:
    for v in variables:
      if isinstance(v, core.Literal):
        yield _Value(0)
      else:
        yield known.setdefault(v, _Value(_nbytes(v.aval)))

  operations = []
  for eqn in jaxpr.eqns:
    reads = list(look_up(eqn.invars))
    parts = sub_jaxprs(eqn)
    if eqn.primitive.name in _CALLS and parts:
      inlined, results = _inline(parts[0], reads)
      operations += inlined
      known |= dict(zip(eqn.outvars, results, strict=True))
      continue
    inner = max(map(peak_bytes, parts), default=0)
    writes = list(look_up(eqn.outvars))
    operations.append(_Operation(eqn.primitive.name, reads, writes, inner))
  return operations, list(look_up(jaxpr.outvars))


def _nbytes(aval: Any) -> int:
  dtype = getattr(aval, "dtype", None)
  if dtype is None or jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
    return 0  # random keys and tokens: a few bytes
  return math.prod(aval.shape) * dtype.itemsize
