"""What a run takes in memory, part by part."""

import json
import pathlib
from typing import Any

import jax

import galore_optax
from train.common import atomic_files
from train.finetuning.config import Config
from train.methods import leaves
from train.methods import table as methods
from train.step import train_step

FILE = "result.json"


def components(
  placed: train_step.Placed, config: Config, opt_state: Any
) -> dict[str, int]:
  """Bytes of weights, adapters, gradients and optimizer state.

  The gradients are those of what is trained, as they are handed to the
  optimizer. Of the state, that of the block matrices (the ones with factors
  or of low rank) is also given by itself.
  """
  params = placed.state.params
  trained = params if placed.adapters is None else params["adapters"]
  as_read = placed.weights if placed.adapters is None else trained
  parts = {"weights": galore_optax.state_bytes(params)}
  if methods.get(config.optimizer.name).factors:
    factors = {p: x for p, x in trained.items() if p.startswith("layers/")}
    parts["adapters"] = galore_optax.state_bytes(factors)
    parts["weights"] -= parts["adapters"]
  parts["gradients"] = galore_optax.state_bytes(as_read)
  parts["optimizer"] = galore_optax.state_bytes(opt_state)
  parts["optimizer_blocks"] = _blocks(opt_state)
  return parts


def _blocks(opt_state: Any) -> int:
  """Bytes of state that belong to leaves of the blocks' matrices."""
  found = jax.tree_util.tree_leaves_with_path(opt_state)
  return sum(
    x.size * x.dtype.itemsize
    for path, x in found
    if "layers/" in (name := leaves.path_of(path)) and "kernel" in name
  )


def table(parts: dict[str, int]) -> str:
  """The components, one a line."""
  named = {
    "weights": "weights",
    "adapters": "adapters",
    "gradients": "gradients of what is trained",
    "optimizer": "optimizer state",
    "optimizer_blocks": "  of it the blocks' matrices",
  }
  return "\n".join(
    f"{named[name]:<30}{size:>14,} bytes {size / 2**20:>10,.2f} MiB"
    for name, size in parts.items()
  )


def write(out: pathlib.Path, config: Config, found: dict[str, Any]) -> None:
  """Writes what a run came to as one JSON object into its folder."""
  head = {
    "task": config.task.name,
    "optimizer": config.optimizer.name,
    "rank": config.optimizer.rank,
    "learning_rate": config.optimizer.learning_rate,
    "scale": config.optimizer.scale,
    "seed": config.train.seed,
    "steps": config.train.steps,
  }
  atomic_files.write_text(out / FILE, json.dumps(head | found, indent=2) + "\n")
