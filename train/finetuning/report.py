"""The memory that a run takes, part by part, and its result file."""

import json
import pathlib
from typing import Any

import jax

import galore_optax
from train.common import atomic_files
from train.finetuning.config import Config
from train.methods import leaves, registry
from train.step import state as state_lib

FILE = "result.json"


def component_bytes(
  abstract: state_lib.AbstractState, config: Config, opt_state: Any
) -> dict[str, int]:
  """Bytes of weights, adapters, gradients and optimizer state.

  The gradients are those that the optimizer gets: of the trained weights
  only. `optimizer_blocks` is the part of the optimizer state that belongs to
  the matrices of the blocks, which have factors or a state of low rank.
  """
  params = abstract.state.params
  trained = params if abstract.adapters is None else params["adapters"]
  differentiated = abstract.weights if abstract.adapters is None else trained
  parts = {"weights": galore_optax.state_bytes(params)}
  if registry.get(config.optimizer.name).factors:
    factors = {p: x for p, x in trained.items() if p.startswith("layers/")}
    parts["adapters"] = galore_optax.state_bytes(factors)
    parts["weights"] -= parts["adapters"]
  parts["gradients"] = galore_optax.state_bytes(differentiated)
  parts["optimizer"] = galore_optax.state_bytes(opt_state)
  parts["optimizer_blocks"] = _blocks(opt_state)
  return parts


def _blocks(opt_state: Any) -> int:
  """Bytes of the optimizer state of the blocks' matrices."""
  state_leaves = jax.tree_util.tree_leaves_with_path(opt_state)
  return sum(
    x.size * x.dtype.itemsize
    for path, x in state_leaves
    if "layers/" in (name := leaves.path_of(path)) and "kernel" in name
  )


def table(parts: dict[str, int]) -> str:
  """The bytes of the components, each in a line."""
  named = {
    "weights": "weights",
    "adapters": "adapters",
    "gradients": "gradients of trained weights",
    "optimizer": "optimizer state",
    "optimizer_blocks": "  of which the blocks' matrices",
  }
  return "\n".join(
    f"{named[name]:<32}{size:>14,} bytes {size / 2**20:>10,.2f} MiB"
    for name, size in parts.items()
  )


def write(out: pathlib.Path, config: Config, result: dict[str, Any]) -> None:
  """Writes a run's settings and result as one JSON object into its folder."""
  head = {
    "task": config.task.name,
    "optimizer": config.optimizer.name,
    "rank": config.optimizer.rank,
    "learning_rate": config.optimizer.learning_rate,
    "scale": config.optimizer.scale,
    "seed": config.train.seed,
    "steps": config.train.steps,
  }
  atomic_files.write_text(
    out / FILE, json.dumps(head | result, indent=2) + "\n"
  )
