"""The optimizer's step on eight devices: state per device, and collectives.

The step is compiled, not run. Collectives are read off the compiled program,
separately for those of every step and those in the branches of a refresh. The
rank is chosen so that no shard of a basis has the shape of another array.
"""

import argparse
import collections
import dataclasses
import math
import sys
from typing import Any

import jax
import optax

from galore_optax import state_shardings
from train.bench import compiled_step, options, trees
from train.common import units
from train.estimate import collectives as collectives_lib
from train.measure import tables as tables_lib
from train.measure.tables import short

DEVICES = 8
SIZE = trees.Size(dim=512, hidden=1376, layers=2, vocab=4096, rank=96)
STACKED = dataclasses.replace(SIZE, layers=DEVICES)
NAMES = (
  "optax.adamw",
  "contrib.galore",
  trees.OURS,
  trees.OURS_SHARDED,
  trees.OURS_AUTO,
  trees.OURS_AUTO_SHARDED,
)
KINDS = {
  "auto": jax.sharding.AxisType.Auto,
  "explicit": jax.sharding.AxisType.Explicit,
}


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the weights are sharded over a mesh.

  Attributes:
    mesh: Size of each mesh axis, by name.
    model: Mesh axis over which d_model is sharded.
    other: Mesh axis for the heads, the hidden layer and the vocabulary.
    layers: Mesh axis for a stack of layers.
    stacked: Whether layers are stacked.
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
# In these matrices d_model is the last axis.
_MODEL_LAST = ("o", "down", "embed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of this benchmark."""
  add = parser.add_argument
  add(
    "--layouts",
    default=";".join(LAYOUTS),
    help="some of these, separated by semicolons: %(default)s",
  )
  add("--meshes", default=",".join(KINDS), help="auto, explicit or both")
  add(
    "--optimizers",
    default=";".join(NAMES),
    help="some of these, separated by semicolons: %(default)s",
  )


QUICK = {"layouts": "fsdp;tensor", "meshes": "auto"}


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """Compiles each optimizer's step for each layout and kind of mesh."""
  programs = []
  kinds = options.choose("--meshes", flags.meshes, KINDS)
  optimizers = options.choose("--optimizers", flags.optimizers, NAMES, ";")
  for name in options.choose("--layouts", flags.layouts, LAYOUTS, ";"):
    for kind in kinds:
      for optimizer in optimizers:
        program = {"layout": name, "mesh": kind, "optimizer": optimizer}
        program |= compile_on(LAYOUTS[name], kind, optimizer)
        programs.append(program)
        print(f"compiled {name}, {kind}, {optimizer}", file=sys.stderr)
  results = {"programs": programs, "devices": DEVICES, "rank": SIZE.rank}
  print(text(results))
  return results


def shardings(layout: Layout, tree: dict, mesh: jax.sharding.Mesh) -> dict:
  """The sharding of each parameter."""

  def sharding(keys: tuple, shape: tuple[int, ...]) -> jax.NamedSharding:
    name = keys[-1].key
    stack = (layout.layers,) if "layers" in {k.key for k in keys} else ()
    if len(shape) - len(stack) < 2:
      parts = (*stack, *[None] * (len(shape) - len(stack)))
    elif name in _MODEL_LAST:
      parts = (*stack, layout.other, layout.model)
    else:
      parts = (*stack, layout.model, layout.other)
    return jax.NamedSharding(mesh, jax.P(*parts))

  return jax.tree_util.tree_map_with_path(
    sharding, tree, is_leaf=trees.is_shape
  )


def compile_on(layout: Layout, kind: str, optimizer: str) -> dict[str, Any]:
  """Compiles an optimizer's step on a mesh, and describes the program.

  Returns:
    Its figures, or `error` if it cannot be compiled.
  """
  size = STACKED if layout.stacked else SIZE
  tree = trees.shapes(size, layout.stacked)
  mesh = jax.make_mesh(
    tuple(layout.mesh.values()),
    tuple(layout.mesh),
    axis_types=(KINDS[kind],) * len(layout.mesh),
    devices=jax.devices()[:DEVICES],
  )
  of_params = shardings(layout, tree, mesh)
  tx = trees.optimizers(size.rank, 200, of_params)[optimizer]()
  with jax.set_mesh(mesh):
    try:
      state, of_state = _state(tx, tree, of_params, mesh)
      return _figures(tx, tree, of_params, state, of_state, layout)
    except Exception as error:  # a peer's failure is a result, whatever it is
      message = str(error).splitlines()[0]
      return {"error": f"{type(error).__name__}: {message}"[:160]}


def _state(
  tx: optax.GradientTransformation,
  tree: dict,
  of_params: dict,
  mesh: jax.sharding.Mesh,
) -> tuple[Any, Any]:
  """The shapes and the shardings of the optimizer's state.

  The state of an optimizer that `state_shardings` cannot trace is replicated,
  as `jax.jit(tx.init)` leaves it.
  """
  params = trees.abstract(tree)
  state = jax.eval_shape(tx.init, params)
  try:
    return state, state_shardings(tx, params, of_params)
  except Exception:
    replicated = jax.NamedSharding(mesh, jax.P())
    return state, jax.tree.map(lambda _: replicated, state)


def _sharded(shapes: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def _figures(
  tx: optax.GradientTransformation,
  tree: dict,
  of_params: dict,
  state: Any,
  of_state: Any,
  layout: Layout,
) -> dict[str, Any]:
  """Compiles the step; bytes of state and temporaries, and collectives."""
  params = _sharded(trees.abstract(tree), of_params)
  step = jax.jit(
    compiled_step.step_of(tx),
    donate_argnums=(1, 2),
    out_shardings=(of_state, of_params),
  )
  lowered = step.lower(params, _sharded(state, of_state), params)
  compiled: Any = lowered.compile()
  collectives = collectives_lib.Module(compiled.as_text()).collectives()
  leaves = jax.tree.leaves(state)
  per_device = sum(
    x.dtype.itemsize * math.prod(sharding.shard_shape(x.shape))
    for x, sharding in zip(leaves, jax.tree.leaves(of_state), strict=True)
  )
  return {
    "state_bytes": per_device,
    "whole_bytes": sum(x.dtype.itemsize * x.size for x in leaves),
    "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    "collectives": collectives_lib.totals(collectives),
    **_gathered(collectives, layout),
  }


_MOVES = ("all-gather", "all-to-all", "collective-permute")


def _gathered(
  collectives: list[collectives_lib.Collective], layout: Layout
) -> dict[str, dict[str, int]]:
  """Counts of the arrays that devices exchange: by role, and one by one."""
  matrices = [(SIZE.dim, SIZE.dim), (SIZE.dim, SIZE.hidden)]
  shards = [*layout.mesh.values(), DEVICES]
  named: collections.Counter[str] = collections.Counter()
  one_by_one: collections.Counter[str] = collections.Counter()
  for x in collectives:
    if x.kind in _MOVES:
      name = collectives_lib.named(x.shape, matrices, SIZE.rank, shards)
      named[name] += x.times
      when = "every step" if x.always else "when due"
      source = "/".join(x.source.split("/")[-2:])
      one_by_one[f"{x.kind} of {name} {x.shape}, {when}: {source}"] += x.times
  return {"gathered": dict(named), "moved": dict(sorted(one_by_one.items()))}


HEAD = [
  "layout, mesh, optimizer",
  "state MiB per device",
  "x 8 / whole",
  "temp. MiB",
  "every step: moved",
  "reduced",
  "when due: moved",
  "reduced",
  "moved G, P, R",
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
        units.format_mib(x["state_bytes"], 1),
        short(x["state_bytes"] * DEVICES / x["whole_bytes"]),
        units.format_mib(x["temporaries"], 1),
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
    total = sums[kind in _MOVES]
    total[0] += x["count"]
    total[1] += x["bytes"]

  def cell(count: int, size: int) -> str:
    return f"{count}, {units.format_mib(size)}" if count else "0"

  return cell(*sums[True]), cell(*sums[False])


def _names(gathered: dict[str, int]) -> str:
  """How many of them are gradients G, bases P or projected gradients R."""
  named = {k: n for k, n in gathered.items() if k in ("G", "P or R")}
  return ", ".join(f"{n} of {name}" for name, n in sorted(named.items())) or "0"


def text(results: dict[str, Any]) -> str:
  """The table for the terminal."""
  return tables_lib.text_table(HEAD, _rows(results))


def tables(results: dict[str, Any]) -> str:
  """The table for the page."""
  return tables_lib.markdown_table(HEAD, _rows(results))
