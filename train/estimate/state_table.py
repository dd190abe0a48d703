"""Bytes of optimizer state of the published sizes.

`python -m train.estimate.state_table` prints the table.

They are counted exactly, from the shapes of all arrays including scales and
counters; nothing is allocated. The rows of the paper are its own estimates for
bfloat16, without weights (GaLore, arXiv 2403.03507, Table 6b).
"""

import argparse
import dataclasses
import json
import sys
from typing import Any

import jax

import galore_optax
from train.common.units import format_gb
from train.config import presets
from train.models import llama
from train.step import adapters, optimizer

PRESETS = ("llama_60m", "llama_130m", "llama_350m", "llama_1b", "llama_7b")

# Name of a row to the optimizer and its options.
BF16 = {"basis_dtype": "bfloat16"}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
  "adamw": ("adamw", {}),
  "adamw_8bit": ("adamw_8bit", {}),
  "adafactor, momentum": ("adafactor", {}),
  "optax.contrib.galore": ("contrib_galore", {}),
  "galore": ("galore", {}),
  "galore, float32 moments": ("galore", {"state_dtype": "float32"}),
  "galore, all bfloat16": ("galore", BF16),
  "galore, auto, bfloat16": ("galore", BF16 | {"proj_type": "auto"}),
  "galore, residual": ("galore", {"residual": "normalized"}),
  "galore_8bit": ("galore_8bit", {"basis_dtype": "bfloat16"}),
  "galore_8bit, auto, int8": (
    "galore_8bit",
    {"basis_dtype": "int8", "proj_type": "auto"},
  ),
  "q_galore": ("q_galore", {}),
  "q_galore, auto": ("q_galore", {"proj_type": "auto"}),
  "q_apollo_mini": ("q_apollo_mini", {}),
  "lora": ("lora", {}),
}

# In GB, as printed: full-rank Adam, GaLore, LoRA. There are none for 7B.
PAPER = {
  "llama_60m": (0.23, 0.13, 0.17),
  "llama_130m": (0.51, 0.28, 0.37),
  "llama_350m": (1.37, 0.54, 0.72),
  "llama_1b": (5.20, 1.78, 2.38),
}


def table() -> dict[str, dict[str, int]]:
  """Bytes by row and preset."""
  found: dict[str, dict[str, int]] = {name: {} for name in ROWS}
  for preset in PRESETS:
    config = presets.make(preset, "galore")
    shapes = jax.eval_shape(lambda c=config: llama.init(c.model, 0))
    for name, (method, options) in ROWS.items():
      changes: dict[str, Any] = {"name": method, **options}
      chosen = dataclasses.replace(config.optimizer, **changes)
      tx = optimizer.make_optimizer(chosen, steps=100)
      factors = adapters.make(chosen)
      tx = tx if factors is None else factors.over_weights(tx)
      state = jax.eval_shape(tx.init, shapes)
      found[name][preset] = galore_optax.state_bytes(state)
  return found


def render(found: dict[str, dict[str, int]]) -> str:
  """The table in GB (1e9 bytes), as in the papers."""
  width = max(map(len, found)) + 2
  head = "".join(f"{p.removeprefix('llama_'):>10}" for p in PRESETS)
  lines = [f"{'GB of state':<{width}}{head}"]
  for name, row in found.items():
    cells = "".join(f"{format_gb(row[p]):>10}" for p in PRESETS)
    lines.append(f"{name:<{width}}{cells}")
  rows = ("paper: full rank", "paper: GaLore", "paper: LoRA")
  for i, name in enumerate(rows):
    cells = [
      f"{PAPER[p][i]:>10.2f}" if p in PAPER else f"{'-':>10}" for p in PRESETS
    ]
    lines.append(f"{name:<{width}}{''.join(cells)}")
  return "\n".join(lines)


def main() -> int:
  """Prints the table, or the bytes with `--json`."""
  parser = argparse.ArgumentParser(prog="python -m train.estimate.state_table")
  parser.add_argument("--json", action="store_true")
  flags = parser.parse_args()
  found = table()
  print(json.dumps(found) if flags.json else render(found))
  return 0


if __name__ == "__main__":
  sys.exit(main())
