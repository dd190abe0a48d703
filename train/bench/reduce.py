"""What data-parallel devices send each other in a training step.

The steps of a LLaMA on eight devices are compiled, not run, and the collectives
are read off the compiled programs. What the block matrices send is the
difference between two models, of which one has two layers more. An all-reduce
counts as a reduce-scatter and an all-gather, as in a ring.
"""

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp

from train.bench import lean
from train.common import units
from train.config import schema
from train.estimate import collectives as collectives_lib
from train.measure import tables as tables_lib
from train.parallel import mesh as mesh_lib
from train.step import setup as setup_lib
from train.step import train_step

DEVICES = 8
LAYERS = (2, 4)

# Name to method, whether gradients are at rank r, and how they are summed.
WAYS = {
  "AdamW": ("adamw", False, "float32"),
  "GaLore, lean": ("galore", True, "float32"),
  "GaLore, lean, `mesh.reduce=int8`": ("galore", True, "int8"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of this benchmark."""
  add = parser.add_argument
  add("--d-model", type=int, default=512, help="width (default: %(default)s)")
  add("--d-ff", type=int, default=1376, help="of the feed-forward layers")
  add("--vocab", type=int, default=4096, help="default: %(default)s")
  add("--rank", type=int, default=128, help="default: %(default)s")


QUICK = {"d_model": 128, "d_ff": 352, "rank": 32}


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """Bytes that a device sends: for a layer, and for all the rest."""
  found = {}
  for name, way in WAYS.items():
    few, many = (_sent(flags, way, layers) for layers in LAYERS)
    found[name] = {
      when: _a_layer_and_the_rest(few[when], many[when]) for when in few
    }
    print(f"compiled {name}", file=sys.stderr)
  results = {"sent": found, "devices": DEVICES, "rank": flags.rank}
  print(text(results))
  return results


def _a_layer_and_the_rest(few: float, many: float) -> dict[str, float]:
  layer = (many - few) / (LAYERS[1] - LAYERS[0])
  return {"layer": layer, "rest": few - LAYERS[0] * layer}


def _sent(
  flags: argparse.Namespace, way: tuple[Any, bool, str], layers: int
) -> dict[str, float]:
  """Bytes that a device sends in every step, and in a refresh."""
  method, is_lean, reduce = way
  sizes = {**vars(flags), "layers": layers, "rows": DEVICES, "length": 32}
  config = lean.configure(
    argparse.Namespace(**sizes, dtype="float32"), method, is_lean
  )
  config = schema.override(config, [f"mesh.reduce={reduce}"])
  mesh = mesh_lib.make_mesh(
    config.mesh, config.data.batch, jax.devices()[:DEVICES]
  )
  with jax.set_mesh(mesh):
    setup = setup_lib.make(config, mesh)
    step: Any = train_step.make_train_step(
      setup.updater, setup.abstract, config.train, reduce=reduce
    )
    state = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      setup.abstract.state,
      setup.abstract.shardings,
    )
    rows = jax.ShapeDtypeStruct(
      (config.data.batch, config.data.length + 1),
      jnp.int32,
      sharding=mesh_lib.batch_sharding(mesh),
    )
    compiled: Any = step.lower(state, rows).compile()
  sent = {"every_step": 0.0, "when_due": 0.0}
  for x in collectives_lib.Module(compiled.as_text()).collectives():
    when = "every_step" if x.always else "when_due"
    sent[when] += x.times * collectives_lib.sent_bytes(x, DEVICES)
  return sent


HEAD = [
  "a device sends, MiB",
  "block matrices of a layer",
  "/ AdamW's",
  "all other leaves",
  "a refresh of a layer",
]


def _rows(results: dict[str, Any]) -> list[list[str]]:
  first = results["sent"]["AdamW"]["every_step"]["layer"]
  return [
    [
      name,
      units.format_mib(x["every_step"]["layer"], 2),
      f"{x['every_step']['layer'] / first:.4f}",
      units.format_mib(x["every_step"]["rest"], 2),
      units.format_mib(x["when_due"]["layer"], 2),
    ]
    for name, x in results["sent"].items()
  ]


def text(results: dict[str, Any]) -> str:
  """The table for the terminal."""
  return tables_lib.text_table(HEAD, _rows(results))


def tables(results: dict[str, Any]) -> str:
  """The table for the page."""
  return tables_lib.markdown_table(HEAD, _rows(results))
