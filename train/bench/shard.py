"""The optimizer's step on eight devices: bytes on each, and what they send.

The step is compiled, not run. Collectives are read off the compiled program:
those of every step, and those that stand in the branches of a refresh. The
rank is such that no shard of a basis has the shape of another array's.
"""

import argparse
import collections
import dataclasses
import sys
from typing import Any

import jax
import optax

from galore_optax import state_shardings
from train.bench import compiled_step, options, trees
from train.estimate import collectives as collectives_lib
from train.measure import timing

DEVICES = 8
SIZE = trees.Size(dim=512, hidden=1376, layers=2, vocab=4096, rank=96)
STACKED = dataclasses.replace(SIZE, layers=DEVICES)
NAMES = (
  "optax.adamw",
  "contrib.galore",
  trees.OURS,
  trees.OURS_TOLD,
  trees.OURS_AUTO,
  trees.OURS_AUTO_TOLD,
)
KINDS = {
  "auto": jax.sharding.AxisType.Auto,
  "explicit": jax.sharding.AxisType.Explicit,
}


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the weights lie on a mesh.

  Attributes:
    mesh: axis to size.
    model: axis that splits d_model.
    other: axis that splits the heads, the hidden layer and the vocabulary.
    layers: axis that splits a stack of layers.
    stacked: whether layers are stacked.
  """

  mesh: dict[str, int]
  model: str | None = None
  other: str | None = None
  layers: str | None = None
  stacked: bool = False


LAYOUTS = {
  "fsdp": Layout({"fsdp": 8}, model="fsdp"),
  "tensor": Layout({"tensor": 8}, other="tensor"),
  "fsdp x tensor": Layout({"fsdp": 4, "tensor": 2}, "fsdp", "tensor"),
  "fsdp, stacked": Layout({"fsdp": 8}, model="fsdp", stacked=True),
  "layers, stacked": Layout({"layers": 8}, layers="layers", stacked=True),
}
# Output projections have d_model last, like the embedding.
_MODEL_LAST = ("o", "down", "embed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of this benchmark."""
  add = parser.add_argument
  add("--layouts", default=";".join(LAYOUTS), help="separated by semicolons")
  add("--meshes", default=",".join(KINDS), help="auto, explicit, both")
  add("--optimizers", default=";".join(NAMES), help="separated by semicolons")


QUICK = {"layouts": "fsdp;tensor", "meshes": "auto"}


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """Compiles each optimizer's step for each layout and kind of mesh."""
  found = []
  kinds = options.choose("--meshes", flags.meshes, KINDS)
  optimizers = options.choose("--optimizers", flags.optimizers, NAMES, ";")
  for name in options.choose("--layouts", flags.layouts, LAYOUTS, ";"):
    for kind in kinds:
      for optimizer in optimizers:
        entry = {"layout": name, "mesh": kind, "optimizer": optimizer}
        entry |= compile_on(LAYOUTS[name], kind, optimizer)
        found.append(entry)
        print(f"compiled {name}, {kind}, {optimizer}", file=sys.stderr)
  results = {"programs": found, "devices": DEVICES, "rank": SIZE.rank}
  print(text(results))
  return results


def shardings(layout: Layout, tree: dict, mesh: jax.sharding.Mesh) -> dict:
  """`NamedSharding` for each parameter."""

  def spread(keys: tuple, shape: tuple[int, ...]) -> jax.NamedSharding:
    name = keys[-1].key
    stack = (layout.layers,) if "layers" in {k.key for k in keys} else ()
    if len(shape) - len(stack) < 2:
      parts = (*stack, *[None] * (len(shape) - len(stack)))
    elif name in _MODEL_LAST:
      parts = (*stack, layout.other, layout.model)
    else:
      parts = (*stack, layout.model, layout.other)
    return jax.NamedSharding(mesh, jax.P(*parts))

  return jax.tree_util.tree_map_with_path(spread, tree, is_leaf=trees.is_shape)


def compile_on(layout: Layout, kind: str, optimizer: str) -> dict[str, Any]:
  """The figures of one optimizer's step on one mesh."""
  size = STACKED if layout.stacked else SIZE
  tree = trees.shapes(size, layout.stacked)
  mesh = jax.make_mesh(
    tuple(layout.mesh.values()),
    tuple(layout.mesh),
    axis_types=(KINDS[kind],) * len(layout.mesh),
    devices=jax.devices()[:DEVICES],
  )
  where = shardings(layout, tree, mesh)
  tx = trees.optimizers(size.rank, 200, where)[optimizer]()
  with jax.set_mesh(mesh):
    try:
      state, state_where = _state(tx, tree, where, mesh)
      return _figures(tx, tree, where, state, state_where, layout)
    except Exception as error:  # whatever a peer raises is what was found
      said = str(error).splitlines()[0]
      return {"error": f"{type(error).__name__}: {said}"[:160]}


def _state(
  tx: optax.GradientTransformation,
  tree: dict,
  where: dict,
  mesh: jax.sharding.Mesh,
) -> tuple[Any, Any]:
  """The state's shapes and where it lies.

  `state_shardings` takes any optimizer; of one that it cannot trace every
  device holds the whole state, as `jax.jit(tx.init)` leaves it.
  """
  params = trees.abstract(tree)
  state = jax.eval_shape(tx.init, params)
  try:
    return state, state_shardings(tx, params, where)
  except Exception:
    whole = jax.NamedSharding(mesh, jax.P())
    return state, jax.tree.map(lambda _: whole, state)


def _placed(shapes: Any, where: Any) -> Any:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    where,
  )


def _figures(
  tx: optax.GradientTransformation,
  tree: dict,
  where: dict,
  state: Any,
  state_where: Any,
  layout: Layout,
) -> dict[str, Any]:
  params = _placed(trees.abstract(tree), where)
  step = jax.jit(
    compiled_step.step_of(tx),
    donate_argnums=(1, 2),
    out_shardings=(state_where, where),
  )
  lowered = step.lower(params, _placed(state, state_where), params)
  compiled: Any = lowered.compile()
  collectives = collectives_lib.Module(compiled.as_text()).collectives()
  leaves = jax.tree.leaves(state)
  places = jax.tree.leaves(state_where)
  local = sum(
    x.dtype.itemsize * _size(s.shard_shape(x.shape))
    for x, s in zip(leaves, places, strict=True)
  )
  return {
    "state_bytes": local,
    "whole_bytes": sum(x.dtype.itemsize * x.size for x in leaves),
    "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    "collectives": collectives_lib.totals(collectives),
    **_gathered(collectives, layout),
  }


def _size(shape: tuple[int, ...]) -> int:
  total = 1
  for n in shape:
    total *= n
  return total


_MOVES = ("all-gather", "all-to-all", "collective-permute")


def _gathered(
  found: list[collectives_lib.Collective], layout: Layout
) -> dict[str, dict[str, int]]:
  """What is made whole or moved: by what it is, and one by one."""
  matrices = [(SIZE.dim, SIZE.dim), (SIZE.dim, SIZE.hidden)]
  shards = [*layout.mesh.values(), DEVICES]
  named: collections.Counter[str] = collections.Counter()
  one_by_one: collections.Counter[str] = collections.Counter()
  for x in found:
    if x.kind in _MOVES:
      name = collectives_lib.named(x.shape, matrices, SIZE.rank, shards)
      named[name] += x.times
      when = "every step" if x.always else "when due"
      source = "/".join(x.source.split("/")[-2:])
      one_by_one[f"{x.kind} of {name} {x.shape}, {when}: {source}"] += x.times
  return {"gathered": dict(named), "moved": dict(sorted(one_by_one.items()))}


HEAD = [
  "layout, mesh, optimizer",
  "state MiB a device",
  "x 8 / whole",
  "temp. MiB",
  "every step: moved",
  "reduced",
  "when due: moved",
  "reduced",
  "gathers of G, P, R",
]


def _rows(results: dict[str, Any]) -> list[list[str]]:
  rows = []
  for x in results["programs"]:
    name = f"{x['layout']}, {x['mesh']}, {x['optimizer']}"
    if "error" in x:
      rows.append([name, f"fails: {x['error']}", *["-"] * (len(HEAD) - 2)])
      continue
    rows.append(
      [
        name,
        timing.mib(x["state_bytes"]),
        timing.short(x["state_bytes"] * DEVICES / x["whole_bytes"]),
        timing.mib(x["temporaries"]),
        *_traffic(x["collectives"]["every_step"]),
        *_traffic(x["collectives"]["when_due"]),
        _names(x["gathered"]),
      ]
    )
  return rows


def _traffic(kinds: dict[str, dict[str, int]]) -> tuple[str, str]:
  """Count and MiB of what is moved, and of what is reduced."""
  sums = collections.defaultdict(lambda: [0, 0])
  for kind, x in kinds.items():
    entry = sums[kind in _MOVES]
    entry[0] += x["count"]
    entry[1] += x["bytes"]
  cell = lambda pair: f"{pair[0]}, {pair[1] / 2**20:.2f}" if pair[0] else "0"
  return cell(sums[True]), cell(sums[False])


def _names(gathered: dict[str, int]) -> str:
  """How many of them are whole gradients, bases or projected gradients."""
  named = {k: n for k, n in gathered.items() if k in ("G", "P or R")}
  return ", ".join(f"{n} of {name}" for name, n in sorted(named.items())) or "0"


def text(results: dict[str, Any]) -> str:
  """The table for the terminal."""
  return timing.text_table(HEAD, _rows(results))


def tables(results: dict[str, Any]) -> str:
  """The table for the page."""
  return timing.markdown_table(HEAD, _rows(results))
