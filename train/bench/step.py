"""The optimizer's step on LLaMA-shaped trees, next to its peers.

Random gradients, one for all steps: what a step costs does not depend on them.
State and parameters are donated and updated in place, unless results come in
another order than the arguments (`--results swapped`).
Ours makes all steps of a gap: every refresh is among them. `optax.adamw` makes
as many in turn with it, and shows what the machine alone adds to the worst of
them; of each step the fastest of some laps counts. Peers take some of the
steps, spread evenly over the gap, and are compared with AdamW's at the same
time.
"""

import argparse
import gc
import pathlib
from typing import Any

from train.bench import compiled_step, options, torch_peers, trees
from train.measure import figure, timing
from train.measure.timing import short

ADAMW = "optax.adamw"
# In which order a step returns what it is given; names of records.
RESULTS = {"in_place": "", "swapped": "-swapped"}
EVERY = (ADAMW, trees.OURS, trees.OURS_AUTO)  # make all steps of a gap
REFRESHING = ("contrib.galore", "galore-torch")  # all matrices at steps k T


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of this benchmark."""
  add = parser.add_argument
  add("--trees", default="60m,130m", help=f"of {', '.join(trees.SIZES)}")
  add("--layouts", default="unrolled,stacked", help="unrolled, stacked, both")
  add("--results", default="in_place", help="in_place, swapped, both")
  add("--rank", type=int, help="default: the paper's of each size")
  add("--gap", type=int, default=200, help="update_proj_gap T")
  add("--laps", type=int, default=2, help="the faster of as many counts")
  add("--peer-steps", type=int, default=20, help="of each peer at most")
  add("--peer-seconds", type=float, default=60.0, help="of each peer at most")
  add("--torch", action="store_true", help="galore-torch and torch's AdamW too")


QUICK = {
  "trees": "60m",
  "gap": 8,
  "laps": 1,
  "peer_steps": 3,
  "peer_seconds": 10.0,
}


def part_names() -> list[str]:
  """All parts that there can be, in the order of the page."""
  return [
    f"{name}-{layout}{suffix}"
    for name in trees.SIZES
    for layout in options.LAYOUTS
    for suffix in RESULTS.values()
  ]


def parts(flags: argparse.Namespace) -> list[tuple[str, dict[str, str]]]:
  """Each tree, layout and order: they take long, and each has a record."""
  return [
    (
      f"{name}-{layout}{RESULTS[order]}",
      {"trees": name, "layouts": layout, "results": order},
    )
    for name in options.choose("--trees", flags.trees, trees.SIZES)
    for layout in options.choose("--layouts", flags.layouts, options.LAYOUTS)
    for order in options.choose("--results", flags.results, RESULTS)
  ]


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """The figures of one tree and layout."""
  if flags.torch:
    torch_peers.require()
  size, layout = trees.SIZES[flags.trees], flags.layouts
  rank = flags.rank or size.rank
  rows = _measure_tree(flags, size, layout == "stacked", rank)
  entry = {"tree": flags.trees, "layout": layout, "rank": rank}
  entry |= {"gap": flags.gap, "results": flags.results, "rows": rows}
  print(text(entry), flush=True)
  gc.collect()
  return entry


def _measure_tree(
  flags: argparse.Namespace, size: trees.Size, stacked: bool, rank: int
) -> dict[str, Any]:
  """Optimizer to its figures, on one tree."""
  tree = trees.shapes(size, stacked)
  grads = trees.random_like(tree, 1, 1e-3)
  chosen = trees.optimizers(rank, flags.gap)
  for name in trees.TOLD:  # of a mesh, and there is none
    chosen.pop(name, None)
  swapped = flags.results == "swapped"
  made = {
    name: compiled_step.start(make, tree, grads, swapped=swapped)
    for name, make in chosen.items()
  }
  peers = torch_peers.start(grads, rank, flags.gap) if flags.torch else {}
  calls = {name: x.call for name, x in {**made, **peers}.items()}
  first = {name: timing.seconds(call) for name, call in calls.items()}
  for name, x in made.items():
    first[name] = _first(x)
  for call in calls.values():
    timing.seconds(call)  # the first in which nothing is new
  times: dict[str, dict[int, float]] = {name: {} for name in calls}
  turns = {
    name: range(flags.gap)
    if name in EVERY
    else _turns(flags, first[name], name in REFRESHING)
    for name in calls
  }
  for step in [*range(flags.gap)] * flags.laps:
    for name, call in calls.items():
      if step in turns[name]:
        took = timing.seconds(call)
        times[name][step] = min(took, times[name].get(step, took))
  rows = {
    name: _figures(name, first[name], times[name], times[ADAMW], flags.gap)
    for name in calls
  }
  for name, x in made.items():
    rows[name] |= {
      "trace": x.trace,
      "compile": x.compile,
      "temporaries": x.temporaries,
      "state_bytes": x.state_bytes,
      "hlo_lines": x.lines,
    }
  for name, peer in peers.items():
    rows[name]["state_bytes"] = peer.state_bytes()
  return rows


def _first(optimizer: compiled_step.Runner) -> float:
  """Seconds of a first step: the middle of three."""
  found = []
  for _ in range(3):
    optimizer.restart()
    found.append(timing.seconds(optimizer.call))
  return timing.median(found)


def _turns(flags: argparse.Namespace, first: float, refreshes: bool) -> range:
  """The steps that a peer takes part in; of its first one tells the time."""
  usual = first / 10 if refreshes else first
  most = int(flags.peer_seconds / usual / flags.laps)
  count = min(flags.peer_steps, max(2, most))
  return range(0, flags.gap, max(1, flags.gap // count))


def _figures(
  name: str,
  first: float,
  times: dict[int, float],
  adamw: dict[int, float],
  gap: int,
) -> dict[str, Any]:
  """Figures of one optimizer from its first step and those after it."""
  steady = timing.median(list(times.values()))
  beside = timing.median([adamw[step] for step in times])
  # Those that refresh everything at once did so in their first step.
  at_once = name in REFRESHING
  mean = sum(times.values()) / len(times)
  return {
    "first": first,
    "steady": steady,
    "steady_of_adamw": steady / beside,
    "worst": first if at_once else max(times.values()),
    "amortised": ((gap - 1) * steady + first) / gap if at_once else mean,
    "amortised_of_adamw": (
      (steady + (first - steady) / gap) / beside
      if at_once
      else mean * len(times) / sum(adamw[step] for step in times)
    ),
    "steps": len(times),
    "times": list(times.values()) if name in EVERY else None,
  }


def ratios(entry: dict[str, Any]) -> dict[str, dict[str, float]]:
  """What is to be read: each optimizer's figures over AdamW's and its own."""
  rows = entry["rows"]
  adamw, contrib = rows[ADAMW], rows["contrib.galore"]
  building = lambda x: x["trace"] + x["compile"]
  found = {}
  for name, x in rows.items():
    found[name] = {
      "steady / adamw": x["steady_of_adamw"],
      "amortised / adamw": x["amortised_of_adamw"],
      "worst / median": x["worst"] / x["steady"],
      "first / median": x["first"] / x["steady"],
    }
    if name in (trees.OURS, trees.OURS_AUTO):
      found[name] |= _of_refreshes(entry, x)
    if "compile" in x:
      found[name]["build / contrib"] = building(x) / building(contrib)
    if "state_bytes" in x:
      found[name]["state / adamw"] = x["state_bytes"] / adamw["state_bytes"]
  return found


def _of_refreshes(
  entry: dict[str, Any], found: dict[str, Any]
) -> dict[str, float]:
  """Steps in which a matrix is refreshed, beside the others."""
  matrices = 7 * trees.SIZES[entry["tree"]].layers
  due = {i * entry["gap"] // matrices for i in range(matrices)}
  by_kind = {True: [], False: []}
  for step, x in enumerate(found["times"], 2):  # two were made before
    by_kind[step % entry["gap"] in due].append(x)
  if not all(by_kind.values()):
    return {}
  return {
    "refreshing / idle": timing.median(by_kind[True])
    / timing.median(by_kind[False]),
    "worst of these / median": max(by_kind[True]) / found["steady"],
  }


RATIOS = (
  "steady / adamw",
  "amortised / adamw",
  "worst / median",
  "refreshing / idle",
  "worst of these / median",
  "first / median",
  "build / contrib",
  "state / adamw",
)
SECONDS = ("trace", "compile", "first", "steady", "worst", "amortised")


def _cells(entry: dict[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
  """Rows of the table of ratios, and of that of figures."""
  by_name = ratios(entry)
  relative = [
    [name, *(short(found.get(x)) for x in RATIOS)]
    for name, found in by_name.items()
  ]
  absolute = []
  for name, x in entry["rows"].items():
    sizes = [
      timing.mib(x[key]) if key in x else "-"
      for key in ("temporaries", "state_bytes")
    ]
    absolute.append([name, *(short(x.get(key)) for key in SECONDS), *sizes])
  return relative, absolute


ABSOLUTE = [*(f"{x} s" for x in SECONDS), "temp. MiB", "state MiB"]


def _title(entry: dict[str, Any]) -> str:
  return (
    f"LLaMA-{entry['tree'].upper()}, {entry['layout']},"
    f" rank {entry['rank']}, T = {entry['gap']}"
    f"{', results swapped' * (entry['results'] == 'swapped')}"
  )


def text(entry: dict[str, Any]) -> str:
  """What one tree gave, for the terminal: ratios first."""
  relative, absolute = _cells(entry)
  return "\n".join(
    [
      "",
      _title(entry),
      timing.text_table(["", *RATIOS], relative),
      "",
      timing.text_table(["", *ABSOLUTE], absolute),
    ]
  )


def tables(results: dict[str, Any]) -> str:
  """The same for the page."""
  relative, absolute = _cells(results)
  return "\n\n".join(
    [
      f"**{_title(results)}**",
      timing.markdown_table(["", *RATIOS], relative),
      timing.markdown_table(["", *ABSOLUTE], absolute),
    ]
  )


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
  """Every step of a gap over the median of AdamW's, ours and AdamW's own."""
  with figure.axes(path, 1) as (axis,):
    _draw_gap(results, axis)


def _draw_gap(entry: dict[str, Any], axis: Any) -> None:
  rows = entry["rows"]
  unit = rows[ADAMW]["steady"]
  for name in filter(rows.get, EVERY):
    steps = [rows[name]["first"], *rows[name]["times"]]
    axis.plot([t / unit for t in steps], lw=1, label=name)
  if entry["layout"] == "unrolled":
    spike = rows["contrib.galore"]["worst"] / unit
    axis.plot([0], [spike], "v", color="C3", label="contrib.galore, step 0")
  axis.set_yscale("log")
  axis.set_ylim(bottom=0.5)
  axis.set_yticks([0.5, 1, 2, 4, 8], minor=False)
  axis.yaxis.set_major_formatter("{x:g}")
  axis.yaxis.set_minor_formatter("")
  axis.set_title(_title(entry), fontsize=9)
  axis.set_xlabel("step")
  axis.set_ylabel("time / AdamW's median")
  axis.legend(frameon=False, fontsize=8)
