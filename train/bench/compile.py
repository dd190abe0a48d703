"""Time to trace and compile the optimizer's step, for ours and its peers.

Every round traces and compiles each of the optimizers again, one after the
other.
"""

import argparse
import statistics
from typing import Any

from train.bench import compiled_step, options, trees
from train.common import units
from train.measure import tables as tables_lib
from train.measure.tables import short

NAMES = ("optax.adamw", "contrib.galore", trees.OURS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of this benchmark."""
  add = parser.add_argument
  add("--trees", default="60m", help=f"some of {', '.join(trees.SIZES)}")
  add("--layouts", default="unrolled,stacked", help="unrolled, stacked or both")
  add("--gap", type=int, default=200, help="update_proj_gap T")
  add("--rounds", type=int, default=5, help="how often each is compiled")


QUICK = {"rounds": 1}


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """Median seconds of tracing and compiling, and the programs' sizes."""
  programs = []
  layouts = options.choose("--layouts", flags.layouts, options.LAYOUTS)
  for name in options.choose("--trees", flags.trees, trees.SIZES):
    size = trees.SIZES[name]
    for layout in layouts:
      tree = trees.shapes(size, layout == "stacked")
      rows = _rounds(tree, trees.optimizers(size.rank, flags.gap), flags.rounds)
      programs.append({"tree": name, "layout": layout, "rows": rows})
  results = {"trees": programs}
  print(text(results))
  return results


def _rounds(tree: dict, optimizers: dict, count: int) -> dict[str, Any]:
  rounds: dict[str, list[compiled_step.Compiled]] = {name: [] for name in NAMES}
  compiled_step.compile_step(optimizers[NAMES[0]], {"w": (8, 8)})  # warm-up
  for _ in range(count):
    for name in NAMES:
      rounds[name].append(compiled_step.compile_step(optimizers[name], tree))
  return {
    name: {
      "trace": statistics.median([x.trace for x in programs]),
      "compile": statistics.median([x.compile for x in programs]),
      "build": statistics.median([x.trace + x.compile for x in programs]),
      "temporaries": programs[0].temporaries,
      "hlo_lines": programs[0].lines,
    }
    for name, programs in rounds.items()
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
  for result in results["trees"]:
    by_name = result["rows"]
    for name, x in by_name.items():
      rows.append(
        [
          f"{result['tree'].upper()} {result['layout']}, {name}",
          short(x["build"] / by_name["contrib.galore"]["build"]),
          short(x["build"] / by_name["optax.adamw"]["build"]),
          short(x["trace"]),
          short(x["compile"]),
          units.format_mib(x["temporaries"], 1),
          str(x["hlo_lines"]),
        ]
      )
  return rows


def text(results: dict[str, Any]) -> str:
  """The table for the terminal."""
  return tables_lib.text_table(HEAD, _rows(results))


def tables(results: dict[str, Any]) -> str:
  """The table for the page."""
  return tables_lib.markdown_table(HEAD, _rows(results))
