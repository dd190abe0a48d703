"""Tracing and compiling the optimizer's step, next to its peers.

Each is traced and compiled anew in every round; rounds of the optimizers are
in turn.
"""

import argparse
from typing import Any

from train.bench import compiled_step, options, trees
from train.measure import timing
from train.measure.timing import short

NAMES = ("optax.adamw", "contrib.galore", trees.OURS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of this benchmark."""
  add = parser.add_argument
  add("--trees", default="60m", help=f"of {', '.join(trees.SIZES)}")
  add("--layouts", default="unrolled,stacked", help="unrolled, stacked, both")
  add("--gap", type=int, default=200, help="update_proj_gap T")
  add("--rounds", type=int, default=5)


QUICK = {"rounds": 1}


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """Median seconds of tracing and compiling, and the programs' sizes."""
  found = []
  layouts = options.choose("--layouts", flags.layouts, options.LAYOUTS)
  for name in options.choose("--trees", flags.trees, trees.SIZES):
    size = trees.SIZES[name]
    for layout in layouts:
      tree = trees.shapes(size, layout == "stacked")
      rows = _rounds(tree, trees.optimizers(size.rank, flags.gap), flags.rounds)
      found.append({"tree": name, "layout": layout, "rows": rows})
  results = {"trees": found}
  print(text(results))
  return results


def _rounds(tree: dict, optimizers: dict, count: int) -> dict[str, Any]:
  made: dict[str, list[compiled_step.Compiled]] = {name: [] for name in NAMES}
  compiled_step.compile_step(optimizers[NAMES[0]], {"w": (8, 8)})  # warms up
  for _ in range(count):
    for name in NAMES:
      made[name].append(compiled_step.compile_step(optimizers[name], tree))
  return {
    name: {
      "trace": timing.median([x.trace for x in programs]),
      "compile": timing.median([x.compile for x in programs]),
      "build": timing.median([x.trace + x.compile for x in programs]),
      "temporaries": programs[0].temporaries,
      "hlo_lines": len(programs[0].program.as_text().splitlines()),
    }
    for name, programs in made.items()
  }


HEAD = [
  "",
  "build / contrib",
  "build / adamw",
  "trace s",
  "compile s",
  "temp. MiB",
  "HLO lines",
]


def _rows(results: dict[str, Any]) -> list[list[str]]:
  rows = []
  for entry in results["trees"]:
    found = entry["rows"]
    for name, x in found.items():
      rows.append(
        [
          f"{entry['tree'].upper()} {entry['layout']}, {name}",
          short(x["build"] / found["contrib.galore"]["build"]),
          short(x["build"] / found["optax.adamw"]["build"]),
          short(x["trace"]),
          short(x["compile"]),
          timing.mib(x["temporaries"]),
          str(x["hlo_lines"]),
        ]
      )
  return rows


def text(results: dict[str, Any]) -> str:
  """The table for the terminal."""
  return timing.text_table(HEAD, _rows(results))


def tables(results: dict[str, Any]) -> str:
  """The table for the page."""
  return timing.markdown_table(HEAD, _rows(results))


draw = None
