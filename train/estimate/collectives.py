"""The collectives of a compiled program, read from its optimized HLO.

What devices send each other is not in a jaxpr, because the compiler's
partitioner decides it. The text of the compiled module shows all collectives,
their shapes, and the loops and branches that they are in.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from train.common.units import format_mib

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAMED = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\]")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(([^)]*)\)")
_REFERENCE = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|condition|true_computation|false_computation"
  r"|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: one of `KINDS`.
    dtype: dtype of the largest array that it moves.
    shape: shape of that array on one device, after a gather or before a
      reduction.
    bytes: bytes of all its arrays on one device.
    times: number of runs in a step that runs it.
    always: whether every step runs it. Otherwise it is in a branch, or in a
      loop whose length depends on values.
    source: the operation of the user's program that it belongs to.
  """

  kind: str
  dtype: str
  shape: tuple[int, ...]
  bytes: int
  times: int
  always: bool
  source: str


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  opcode: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]
  operands: tuple[str, ...]
  rest: str

  def called(self) -> list[str]:
    """Names of the computations that it calls."""
    found = []
    for text in _CALLED.findall(self.rest):
      names = text.strip("{}").split(",") if "{" in text else [text]
      found += [name.strip().lstrip("%") for name in names]
    return found

  def attribute(self, name: str) -> str:
    """Name of the computation that is given as an attribute."""
    match = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
    return match[1] if match else ""


class Module:
  """The computations of a compiled module."""

  def __init__(self, text: str):
    """Reads the text of `compiled.as_text()`."""
    self.computations: dict[str, list[_Instruction]] = {}
    self.entry = ""
    current: list[_Instruction] = []
    for line in text.splitlines():
      if head := _HEAD.match(line):
        current = self.computations.setdefault(head[2], [])
        self.entry = head[2] if head[1] else self.entry
      elif named := _NAMED.match(line):
        current.append(_instruction(named[1], named[2]))

  def collectives(self) -> list[Collective]:
    """The collectives of the module, each once, in the sequence of the text.

    Those of a single device are left out.
    """
    found: dict[Any, Collective] = {}
    for computation, x, times, always in self._walk(self.entry, 1, True):
      kind = x.opcode.removesuffix("-start")
      if kind not in KINDS or _is_single_device(x.rest):
        continue
      new = self._collective(computation, x, kind, times, always)
      # An asynchronous collective has several instructions on one channel.
      channel = re.search(r"channel_id=(\d+)", x.rest)
      if channel is None or "shard_map/" in new.source:
        # Those that a program asks for itself are all on the first channel.
        key = computation, x.name
      else:
        key = channel[1]
      found.setdefault(key, new)
    return list(found.values())

  def _walk(
    self, name: str, times: int, always: bool
  ) -> Iterator[tuple[str, _Instruction, int, bool]]:
    """All instructions, with repetitions, and whether every step runs them."""
    for x in self.computations.get(name, ()):
      yield name, x, times, always
      inner = times, always
      if x.opcode == "while":
        count = self._trip_count(x)
        inner = times * (count or 1), always and count is not None
      elif x.opcode == "conditional":
        inner = times, False
      for callee in x.called():
        yield from self._walk(callee, *inner)

  def _trip_count(self, loop: _Instruction) -> int | None:
    """Iterations of a loop: as the compiler noted, or from its bound."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(noted[1])
    test = self.computations.get(loop.attribute("condition"), [])
    # Scans count from zero to a constant.
    bounds = [
      x for x in test if x.opcode == "constant" and x.arrays[0][0] == "s32"
    ]
    compared = [x for x in test if "direction=LT" in x.rest]
    if len(bounds) != 1 or len(compared) != 1 or len(test) > 4:
      return None
    match = re.match(r"\s*constant\((\d+)\)", bounds[0].rest)
    return int(match[1]) if match else None

  def _collective(
    self, computation: str, x: _Instruction, kind: str, times: int, always: bool
  ) -> Collective:
    arrays = x.arrays
    if kind == "reduce-scatter":  # its operands are larger than its result
      types = {y.name: y.arrays for y in self.computations[computation]}
      arrays = tuple(a for name in x.operands for a in types.get(name, ()))
    elif x.opcode.endswith("-start") and kind != "all-reduce":
      arrays = arrays[1:2]  # of operand, result and synchronization
    arrays = arrays or x.arrays
    dtype, shape = max(arrays, key=_bytes)
    source = re.search(r'op_name="([^"]*)"', x.rest)
    return Collective(
      kind,
      dtype,
      shape,
      sum(map(_bytes, arrays)),
      times,
      always,
      source[1] if source else "",
    )


def _instruction(name: str, text: str) -> _Instruction:
  """Parses an instruction: type, opcode, operands, and the rest."""
  end = _end_of_type(text)
  match = _OPCODE.match(text, end)
  opcode, operands = (match[1], match[2]) if match else ("", "")
  return _Instruction(
    name,
    opcode,
    tuple(
      (dtype, tuple(int(n) for n in dims.split(",") if n))
      for dtype, dims in _ARRAY.findall(text[:end])
    ),
    tuple(_REFERENCE.findall(operands)),
    text[end:],
  )


def _end_of_type(text: str) -> int:
  """Where the type ends; for a tuple at its closing parenthesis."""
  if not text.startswith("("):
    return text.find(" ")
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return i + 1
  return len(text)


def _bytes(array: tuple[str, tuple[int, ...]]) -> int:
  dtype, shape = array
  bits = {"pred": 8, "token": 0}.get(dtype)
  if bits is None:
    bits = int(re.findall(r"\d+", dtype)[0])
  return math.prod(shape) * bits // 8


def _is_single_device(rest: str) -> bool:
  """Whether every group of a collective has a single device."""
  if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
    return groups[1] == "1"
  if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
    return "," not in groups[1]
  return False


def sent_bytes(x: Collective, devices: int) -> float:
  """Bytes that each device sends in one run of a collective, in a ring.

  A ring reduces in two rounds, a reduce-scatter and an all-gather; in a round
  each device sends all but one of its parts.
  """
  if x.kind == "collective-permute":
    return x.bytes
  rounds = 2 if x.kind == "all-reduce" else 1
  return rounds * x.bytes * (devices - 1) / devices


def named(
  shape: Sequence[int],
  matrices: Iterable[tuple[int, int]],
  rank: int,
  shards: Iterable[int],
) -> str:
  """Names the array of GaLore that has a given shape, whole or sharded.

  Args:
    shape: last axes of an array on a device.
    matrices: shapes (m, n) of the gradients.
    rank: rank of the bases.
    shards: numbers of parts into which the mesh divides an axis.

  Returns:
    `G` for a gradient, `P or R` for an array with the rank as one side,
    `r x r`, or `other`.
  """
  if len(shape) < 2:
    return "other"
  parts = sorted(set(shards) | {1})
  cut = lambda size: {size // k for k in parts if size % k == 0}
  a, b = shape[-2:]
  ranks, sides = cut(rank), {s for pair in matrices for s in pair}
  if a in ranks and b in ranks:
    return "r x r"
  for m, n in matrices:
    if (a in cut(m) and b in cut(n)) or (a in cut(n) and b in cut(m)):
      return "G"
  long = set().union(*(cut(side) for side in sides)) if sides else set()
  if (b in ranks and a in long) or (a in ranks and b in long):
    return "P or R"
  return "other"


def totals(found: Iterable[Collective]) -> dict[str, dict[str, dict[str, int]]]:
  """Counts and bytes of collectives, by when they run and by kind.

  Returns:
    `every_step` and `when_due` to kind to `count` and `bytes`; a collective
    in a loop counts once an iteration.
  """
  sums: dict[str, dict[str, dict[str, int]]] = {
    "every_step": collections.defaultdict(lambda: {"count": 0, "bytes": 0}),
    "when_due": collections.defaultdict(lambda: {"count": 0, "bytes": 0}),
  }
  for x in found:
    entry = sums["every_step" if x.always else "when_due"][x.kind]
    entry["count"] += x.times
    entry["bytes"] += x.times * x.bytes
  return {when: dict(sorted(kinds.items())) for when, kinds in sums.items()}


def lines(sums: dict[str, dict[str, dict[str, int]]]) -> list[str]:
  """The result of `totals` as lines of text."""
  found = []
  for when, kinds in sums.items():
    for kind, x in kinds.items():
      label = f"{kind}, {when.replace('_', ' ')}"
      found.append(
        f"{label:<36}{x['count']:>5} of {format_mib(x['bytes']):>10} MiB in all"
      )
  return found
