"""Time of the optimizer's step on LLaMA-shaped trees, for ours and its peers.

All steps have the same random gradients: the cost of a step does not depend on
them. State and parameters are donated and updated in place, unless the results
come in another sequence than the arguments (`--results swapped`).

Ours makes all steps of a gap, so that every refresh is among them.
`optax.adamw` makes as many, in alternation, and shows what the machine alone
adds to the worst step. The gap is repeated `--passes` times, and the fastest
time of each step counts. Peers make only some of the steps, evenly distributed
over the gap, and are compared with AdamW's times of the same steps.
"""

import argparse
import gc
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

from train.bench import compiled_step, options, torch_peers, trees
from train.common import units
from train.measure import figure, timing
from train.measure import tables as tables_lib
from train.measure.tables import short

ADAMW = "optax.adamw"
# Whether a step returns its results in the sequence of its arguments: name to
# the suffix of the record.
RESULTS = {"in_place": "", "swapped": "-swapped"}
EVERY_STEP = (ADAMW, trees.OURS, trees.OURS_AUTO)  # make all steps of a gap
SYNCHRONOUS = ("contrib.galore", "galore-torch")  # refresh all in one step


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of this benchmark."""
  add = parser.add_argument
  add("--trees", default="60m,130m", help=f"some of {', '.join(trees.SIZES)}")
  add("--layouts", default="unrolled,stacked", help="unrolled, stacked or both")
  add("--results", default="in_place", help="in_place, swapped or both")
  add("--rank", type=int, help="rank (default: the paper's for each size)")
  add("--gap", type=int, default=200, help="update_proj_gap T")
  add(
    "--passes",
    "--laps",  # the name in older records
    type=int,
    default=2,
    help="how often the gap is repeated; the fastest time of each step counts",
  )
  add("--peer-steps", type=int, default=20, help="most steps of a peer")
  add("--peer-seconds", type=float, default=60.0, help="most seconds of a peer")
  add("--torch", action="store_true", help="add galore-torch, PyTorch's AdamW")


QUICK = {
  "trees": "60m",
  "gap": 8,
  "passes": 1,
  "peer_steps": 3,
  "peer_seconds": 10.0,
}


def part_names() -> list[str]:
  """Names of all possible parts, in the sequence of the page."""
  return [
    f"{name}-{layout}{suffix}"
    for name in trees.SIZES
    for layout in options.LAYOUTS
    for suffix in RESULTS.values()
  ]


def parts(flags: argparse.Namespace) -> list[tuple[str, dict[str, str]]]:
  """A part, with a record of its own, for each tree, layout and sequence."""
  return [
    (
      f"{name}-{layout}{RESULTS[sequence]}",
      {"trees": name, "layouts": layout, "results": sequence},
    )
    for name in options.choose("--trees", flags.trees, trees.SIZES)
    for layout in options.choose("--layouts", flags.layouts, options.LAYOUTS)
    for sequence in options.choose("--results", flags.results, RESULTS)
  ]


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """Measures one tree in one layout."""
  if flags.torch:
    torch_peers.require()
  size, layout = trees.SIZES[flags.trees], flags.layouts
  rank = flags.rank or size.rank
  rows = _measure_tree(flags, size, layout == "stacked", rank)
  results = {"tree": flags.trees, "layout": layout, "rank": rank}
  results |= {"gap": flags.gap, "results": flags.results, "rows": rows}
  print(text(results), flush=True)
  gc.collect()
  return results


def _measure_tree(
  flags: argparse.Namespace, size: trees.Size, stacked: bool, rank: int
) -> dict[str, Any]:
  """Figures of each optimizer on one tree, by name."""
  tree = trees.shapes(size, stacked)
  grads = trees.random_like(tree, 1, 1e-3)
  makers = {
    name: make
    for name, make in trees.optimizers(rank, flags.gap).items()
    if name not in trees.NEED_SHARDINGS
  }
  swapped = flags.results == "swapped"
  ours = {
    name: compiled_step.LiveStep(make, tree, grads, swapped=swapped)
    for name, make in makers.items()
  }
  peers = torch_peers.start(grads, rank, flags.gap) if flags.torch else {}
  calls = {name: x.call for name, x in {**ours, **peers}.items()}
  first = {name: timing.seconds(call) for name, call in calls.items()}
  for name, x in ours.items():
    first[name] = _first(x)
  for call in calls.values():
    timing.seconds(call)  # warm-up: nothing is new in the steps after it
  times = _time_gap(flags, calls, first)
  rows = {
    name: _figures(name, first[name], times[name], times[ADAMW], flags.gap)
    for name in calls
  }
  for name, x in ours.items():
    rows[name] |= {
      "trace": x.compiled.trace,
      "compile": x.compiled.compile,
      "temporaries": x.compiled.temporaries,
      "state_bytes": x.state_bytes,
      "hlo_lines": x.compiled.lines,
    }
  for name, peer in peers.items():
    rows[name]["state_bytes"] = peer.state_bytes()
  return rows


def _first(optimizer: compiled_step.LiveStep) -> float:
  """Seconds of a first step: the median of three."""
  times = []
  for _ in range(3):
    optimizer.restart()
    times.append(timing.seconds(optimizer.call))
  return statistics.median(times)


def _time_gap(
  flags: argparse.Namespace,
  calls: dict[str, Callable[[], Any]],
  first: dict[str, float],
) -> dict[str, dict[int, float]]:
  """The fastest time of each step of a gap: name to step to seconds.

  Args:
    flags: The parsed command line.
    calls: A function for each optimizer that makes one step.
    first: Seconds of each one's first step.
  """
  times: dict[str, dict[int, float]] = {name: {} for name in calls}
  steps = {
    name: range(flags.gap)
    if name in EVERY_STEP
    else _peer_steps(flags, first[name], name in SYNCHRONOUS)
    for name in calls
  }
  for step in [*range(flags.gap)] * flags.passes:
    for name, call in calls.items():
      if step in steps[name]:
        seconds = timing.seconds(call)
        times[name][step] = min(seconds, times[name].get(step, seconds))
  return times


def _peer_steps(
  flags: argparse.Namespace, first: float, synchronous: bool
) -> range:
  """The steps of a gap that a peer makes, from the seconds of its first."""
  expected = first / 10 if synchronous else first
  affordable = int(flags.peer_seconds / expected / flags.passes)
  count = min(flags.peer_steps, max(2, affordable))
  return range(0, flags.gap, max(1, flags.gap // count))


def _figures(
  name: str,
  first: float,
  times: dict[int, float],
  adamw: dict[int, float],
  gap: int,
) -> dict[str, Any]:
  """Figures of one optimizer from its first step and those of a gap."""
  steady = statistics.median(times.values())
  adamw_steady = statistics.median([adamw[step] for step in times])
  # Those that refresh everything in one step did so in their first step.
  synchronous = name in SYNCHRONOUS
  mean = sum(times.values()) / len(times)
  return {
    "first": first,
    "steady": steady,
    "steady_of_adamw": steady / adamw_steady,
    "worst": first if synchronous else max(times.values()),
    "amortised": ((gap - 1) * steady + first) / gap if synchronous else mean,
    "amortised_of_adamw": (
      (steady + (first - steady) / gap) / adamw_steady
      if synchronous
      else mean * len(times) / sum(adamw[step] for step in times)
    ),
    "steps": len(times),
    "times": list(times.values()) if name in EVERY_STEP else None,
  }


def ratios(results: dict[str, Any]) -> dict[str, dict[str, float]]:
  """Each optimizer's figures relative to AdamW's or to its own median."""
  rows = results["rows"]
  adamw, contrib = rows[ADAMW], rows["contrib.galore"]
  build = lambda x: x["trace"] + x["compile"]
  by_name = {}
  for name, x in rows.items():
    by_name[name] = {
      "steady / adamw": x["steady_of_adamw"],
      "amortised / adamw": x["amortised_of_adamw"],
      "worst / median": x["worst"] / x["steady"],
      "first / median": x["first"] / x["steady"],
    }
    if name in (trees.OURS, trees.OURS_AUTO):
      by_name[name] |= _refresh_ratios(results, x)
    if "compile" in x:
      by_name[name]["build / contrib"] = build(x) / build(contrib)
    if "state_bytes" in x:
      by_name[name]["state / adamw"] = x["state_bytes"] / adamw["state_bytes"]
  return by_name


def _refresh_ratios(
  results: dict[str, Any], row: dict[str, Any]
) -> dict[str, float]:
  """Times of the steps that refresh a matrix, relative to the other steps."""
  matrices = 7 * trees.SIZES[results["tree"]].layers
  due = {i * results["gap"] // matrices for i in range(matrices)}
  refreshing, idle = [], []
  for step, seconds in enumerate(row["times"], 2):  # two steps came before
    (refreshing if step % results["gap"] in due else idle).append(seconds)
  if not (refreshing and idle):
    return {}
  return {
    "refreshing / idle": statistics.median(refreshing)
    / statistics.median(idle),
    "worst refreshing / median": max(refreshing) / row["steady"],
  }


RATIOS = (
  "steady / adamw",
  "amortised / adamw",
  "worst / median",
  "refreshing / idle",
  "worst refreshing / median",
  "first / median",
  "build / contrib",
  "state / adamw",
)
SECONDS = ("trace", "compile", "first", "steady", "worst", "amortised")


def _cells(
  results: dict[str, Any],
) -> tuple[list[list[str]], list[list[str]]]:
  """Rows of the table of ratios, and of the table of seconds and bytes."""
  by_name = ratios(results)
  relative = [
    [name, *(short(relative.get(x)) for x in RATIOS)]
    for name, relative in by_name.items()
  ]
  absolute = []
  for name, x in results["rows"].items():
    sizes = [
      units.format_mib(x[key], 1) if key in x else "-"
      for key in ("temporaries", "state_bytes")
    ]
    absolute.append([name, *(short(x.get(key)) for key in SECONDS), *sizes])
  return relative, absolute


ABSOLUTE = [*(f"{x} s" for x in SECONDS), "temp. MiB", "state MiB"]


def _title(results: dict[str, Any]) -> str:
  return (
    f"LLaMA-{results['tree'].upper()}, {results['layout']},"
    f" rank {results['rank']}, T = {results['gap']}"
    f"{', results swapped' * (results['results'] == 'swapped')}"
  )


def text(results: dict[str, Any]) -> str:
  """Both tables for the terminal, ratios first."""
  relative, absolute = _cells(results)
  return "\n".join(
    [
      "",
      _title(results),
      tables_lib.text_table(["", *RATIOS], relative),
      "",
      tables_lib.text_table(["", *ABSOLUTE], absolute),
    ]
  )


def tables(results: dict[str, Any]) -> str:
  """Both tables for the page."""
  relative, absolute = _cells(results)
  return "\n\n".join(
    [
      f"**{_title(results)}**",
      tables_lib.markdown_table(["", *RATIOS], relative),
      tables_lib.markdown_table(["", *ABSOLUTE], absolute),
    ]
  )


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
  """Draws the time of every step of a gap, relative to AdamW's median."""
  with figure.axes(path, 1) as (axis,):
    _draw_gap(results, axis)


def _draw_gap(results: dict[str, Any], axis: Any) -> None:
  rows = results["rows"]
  unit = rows[ADAMW]["steady"]
  for name in filter(rows.get, EVERY_STEP):
    steps = [rows[name]["first"], *rows[name]["times"]]
    axis.plot([t / unit for t in steps], lw=1, label=name)
  if results["layout"] == "unrolled":
    spike = rows["contrib.galore"]["worst"] / unit
    axis.plot([0], [spike], "v", color="C3", label="contrib.galore, step 0")
  axis.set_yscale("log")
  axis.set_ylim(bottom=0.5)
  axis.set_yticks([0.5, 1, 2, 4, 8], minor=False)
  axis.yaxis.set_major_formatter("{x:g}")
  axis.yaxis.set_minor_formatter("")
  axis.set_title(_title(results), fontsize=9)
  axis.set_xlabel("step")
  axis.set_ylabel("time / median of AdamW")
  axis.legend(frameon=False, fontsize=8)
