"""What GaLore costs: measured times beside those of the cost model.

Each part is measured while one of depth, width and rank grows. The model's
times follow from this machine's peak rates of matrix products and memory, which
are measured in the same run. GaLore's whole training step is measured beside
AdamW's.
"""

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax.subspace import find as find_lib
from galore_optax.subspace import projection
from train.bench import model
from train.common.errors import UserError
from train.config import presets, schema
from train.measure import figure, timing, trial
from train.measure import tables as tables_lib
from train.measure.tables import short

BASE = model.Site()
SWEEPS = {
  "depth": [dataclasses.replace(BASE, layers=k) for k in (1, 2, 4, 8)],
  "width": [
    model.Site(256, 688, 64),
    BASE,
    model.Site(1024, 2736, 256),
    model.Site(2048, 5461, 512),
  ],
  "rank": [dataclasses.replace(BASE, r=k) for k in (32, 64, 128, 256)],
}
PARTS = ("project", "lift", "inner", "refresh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of this benchmark."""
  add = parser.add_argument
  add("--preset", default="sotu_small", help="preset of the training step")
  add(
    "--set",
    action="append",
    default=[],
    dest="settings",
    metavar="FIELD=VALUE",
    help="change a field of the preset; may be repeated",
  )
  add(
    "--steps",
    type=int,
    default=100,
    help="training steps of each optimizer; 0 leaves them out",
  )
  add(
    "--largest",
    type=int,
    default=2048,
    help="short side of the largest matrix to measure",
  )


QUICK = {"steps": 12, "largest": 512}


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """Peak rates of the machine, times of the parts and of a training step."""
  if flags.largest < BASE.m:
    raise UserError(f"--largest is {flags.largest}; use at least {BASE.m}")
  results: dict[str, Any] = {"limits": peak_rates(), "sweeps": {}}
  for name, sites in SWEEPS.items():
    chosen = [site for site in sites if site.m <= flags.largest]
    results["sweeps"][name] = [_point(site) for site in chosen]
  results["limits_after"] = peak_rates()
  results["overhead"] = model.overheads()
  if flags.steps:
    results["pretraining"] = pretraining(flags)
  print(text(results))
  return results


def peak_rates() -> dict[str, float]:
  """The most FLOPs and bytes per second that this machine reaches."""
  best_flops = 0.0
  for size in (1024, 2048):
    a = jax.random.normal(jax.random.key(0), (size, size))
    run = functools.partial(jax.jit(_product), a, a)
    times = timing.interleave({"": run}, timing.Budget(5, 3, 5.0))[""]
    best_flops = max(best_flops, 2.0 * size**3 / min(times))
  size = 2**26
  live = [jnp.ones(size), jnp.ones(size)]
  add = jax.jit(lambda x, y: x + 0.5 * y, donate_argnums=0)

  def stream() -> Any:
    live[0] = add(live[0], live[1])
    return live[0]

  times = timing.interleave({"": stream}, timing.Budget(7, 3, 5.0))[""]
  return {"flops": best_flops, "bytes": 3.0 * model.FLOAT * size / min(times)}


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision="highest")


def _point(site: model.Site) -> dict[str, Any]:
  """Seconds of each part, and the FLOPs that the compiler counts for it."""
  runs, counted = _runs(site)
  times = timing.interleave(runs, timing.Budget(9, 3, 4.0))
  point: dict[str, Any] = {"site": dataclasses.asdict(site), "parts": {}}
  for part in PARTS:
    flops, moved = getattr(site, "project" if part == "lift" else part)()
    point["parts"][part] = {
      "seconds": statistics.median(times[part]),
      "flops": flops,
      "bytes": moved,
      "counted_flops": counted.get(part),
    }
  return point


def _runs(site: model.Site) -> tuple[dict[str, Callable], dict[str, float]]:
  """A compiled function for each part, and the FLOPs the compiler counts."""
  m, n, r, layers = site.m, site.n, site.r, site.layers
  g = jax.random.normal(jax.random.key(0), (layers, m, n))
  start = find_lib.start_basis(jax.random.key(1), m, r)
  bases = jnp.broadcast_to(start, (layers, m, r)) + 0.0
  low = jax.random.normal(jax.random.key(2), (layers, r, n))
  adam = optax.scale_by_adam()

  def find(g: jax.Array, bases: jax.Array) -> jax.Array:
    one = lambda pair: find_lib.find_basis(
      pair[0], pair[1], "left", "subspace", jnp.int32(model.ITERATIONS)
    )
    return jax.lax.map(one, (g, bases))

  programs = {
    "project": _compile(
      lambda g, p: projection.project(g, {"left": p}), g, bases
    ),
    "lift": _compile(lambda x, p: projection.lift(x, {"left": p}), low, bases),
    "refresh": _compile(find, g, bases),
  }
  arguments = {
    "project": (g, bases),
    "lift": (low, bases),
    "refresh": (g, bases),
  }
  runs: dict[str, Callable] = {
    name: functools.partial(program, *arguments[name])
    for name, program in programs.items()
  }
  runs["inner"] = _repeated(adam, low)
  counted = {}
  for name in ("project", "lift"):  # the compiler counts loop bodies once
    counted[name] = float(programs[name].cost_analysis().get("flops", 0.0))
  return runs, counted


def _compile(f: Callable, *args: Any) -> Any:
  return jax.jit(f).lower(*args).compile()


def _repeated(adam: optax.GradientTransformation, low: jax.Array) -> Callable:
  """Adam's step on one projected gradient, its state updated in place."""
  step = jax.jit(adam.update, donate_argnums=1)
  live = [jax.jit(adam.init)(low)]

  def run() -> Any:
    updates, live[0] = step(low, live[0])
    return updates

  return run


def pretraining(flags: argparse.Namespace) -> dict[str, Any]:
  """Times GaLore's and AdamW's training steps on a batch, in alternation."""
  names = ("adamw", "galore")
  with contextlib.ExitStack() as stack:
    runs = {name: _training_step(flags, name, stack) for name in names}
    budget = timing.Budget(flags.steps, flags.steps, 0.0)
    times = timing.interleave(runs, budget)
  config = _config(flags, "galore")
  return {
    "preset": flags.preset,
    "rank": config.optimizer.rank,
    "gap": config.optimizer.update_proj_gap,
    "tokens": config.data.batch * config.data.length,
    "steps": flags.steps,
    "median": {name: statistics.median(x) for name, x in times.items()},
    "mean": {name: sum(x) / len(x) for name, x in times.items()},
  }


def _config(flags: argparse.Namespace, optimizer: Any) -> schema.Config:
  config = presets.make(flags.preset, optimizer)
  return schema.override(config, flags.settings)


def _training_step(
  flags: argparse.Namespace, optimizer: str, stack: contextlib.ExitStack
) -> Callable[[], Any]:
  """A function that repeats the step of `train.pretrain` on one batch."""
  run = stack.enter_context(trial.start(_config(flags, optimizer)))
  compiled, state = run.compile_step(), run.state
  batch = run.job.put(next(run.job.feed))

  def step() -> Any:
    nonlocal state
    with jax.set_mesh(run.setup.mesh):
      state, metrics = compiled(state, batch)
    return state, metrics

  return step


PART_HEAD = ["sweep", "matrix", *(f"{x} ms" for x in PARTS)]
PART_HEAD += [f"{x}, model / measured" for x in PARTS]


def _peak(results: dict[str, Any]) -> dict[str, float]:
  """The machine's peak rates: the higher of those before and after."""
  before, after = results["limits"], results["limits_after"]
  return {key: max(before[key], after[key]) for key in before}


def _part_rows(results: dict[str, Any]) -> list[list[str]]:
  rows, peak = [], _peak(results)
  for sweep, points in results["sweeps"].items():
    for point in points:
      site = model.Site(**point["site"])
      parts = point["parts"]
      count = f"{site.layers} x " if site.layers > 1 else ""
      name = f"{count}{site.m} x {site.n}, r {site.r}"
      times = [short(1e3 * parts[x]["seconds"]) for x in PARTS]
      shares = [
        f"{model.least_seconds(parts[x], peak) / parts[x]['seconds']:.0%}"
        for x in PARTS
      ]
      rows.append([sweep, name, *times, *shares])
  return rows


def _growth_rows(results: dict[str, Any]) -> list[list[str]]:
  """How FLOPs (bytes for `inner`) and times grow over each sweep."""
  rows = []
  for sweep, points in results["sweeps"].items():
    if len(points) < 2:
      continue
    first, last = points[0]["parts"], points[-1]["parts"]
    for part in PARTS:
      key = "bytes" if part == "inner" else "flops"
      predicted = last[part][key] / first[part][key]
      measured = last[part]["seconds"] / first[part]["seconds"]
      rows.append([f"{sweep}: {part}", short(predicted), short(measured)])
  return rows


def _share_rows(results: dict[str, Any]) -> list[list[str]]:
  return [
    [
      f"{x['model'].upper()}, r {x['rank']}",
      *(f"{flops['share']:.2%}" for flops in x["tokens"].values()),
    ]
    for x in results["overhead"]
  ]


GROWTH_HEAD = ["first to last of a sweep", "model x", "measured x"]


def _share_head(results: dict[str, Any]) -> list[str]:
  tokens = results["overhead"][0]["tokens"]
  return ["model", *(f"{int(x):,} tokens" for x in tokens)]


def _sentences(results: dict[str, Any]) -> list[str]:
  """The machine's peak rates, FLOPs counted, and the whole training step."""
  before, after = results["limits"], results["limits_after"]
  lines = [
    f"Peak rates per processor second: {before['flops'] / 1e9:.0f} GFLOP of"
    f" matrix products and {before['bytes'] / 1e9:.1f} GB of memory traffic"
    f" ({after['flops'] / 1e9:.0f} and {after['bytes'] / 1e9:.1f} when measured"
    " again at the end).",
    _counted(results),
  ]
  if x := results.get("pretraining"):
    ratio = x["mean"]["galore"] / x["mean"]["adamw"]
    median = x["median"]["galore"] / x["median"]["adamw"]
    lines.append(
      f"A training step of {x['preset']} ({x['tokens']:,} tokens, rank"
      f" {x['rank']}, T = {x['gap']}, {x['steps']} steps of each, alternating)"
      f" takes {ratio:.3f} times as long with GaLore as with AdamW in the mean,"
      f" and {median:.3f} times in the median."
    )
  return lines


def _counted(results: dict[str, Any]) -> str:
  ratios = [
    part["counted_flops"] / part["flops"]
    for points in results["sweeps"].values()
    for point in points
    for name, part in point["parts"].items()
    if name in ("project", "lift") and part["counted_flops"]
  ]
  return (
    "FLOPs of project and lift that the compiler counts, relative to the cost"
    f" model's: {min(ratios):.3f} to {max(ratios):.3f}."
  )


def _page_tables(results: dict[str, Any], table: Callable) -> str:
  parts = [
    *_sentences(results),
    table(PART_HEAD, _part_rows(results)),
    table(GROWTH_HEAD, _growth_rows(results)),
    table(_share_head(results), _share_rows(results)),
  ]
  return "\n\n".join(parts)


def text(results: dict[str, Any]) -> str:
  """Sentences and tables for the terminal."""
  return _page_tables(results, tables_lib.text_table)


def tables(results: dict[str, Any]) -> str:
  """Sentences and tables for the page."""
  return _page_tables(results, tables_lib.markdown_table)


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
  """Draws times by depth, width and rank, beside the cost model's."""
  sweeps, peak = results["sweeps"], _peak(results)
  keys = {"depth": "layers", "width": "m", "rank": "r"}
  with figure.axes(path, len(sweeps)) as axes:
    for axis, (sweep, points) in zip(axes, sweeps.items(), strict=True):
      xs = [point["site"][keys[sweep]] for point in points]
      for i, part in enumerate(PARTS):
        parts = [point["parts"][part] for point in points]
        least = [1e3 * model.least_seconds(x, peak) for x in parts]
        times = [1e3 * x["seconds"] for x in parts]
        axis.loglog(xs, times, "o-", ms=3, lw=1, color=f"C{i}", label=part)
        axis.loglog(xs, least, ":", lw=1, color=f"C{i}")
      axis.set_xticks(xs, [str(x) for x in xs])
      axis.minorticks_off()
      axis.set_xlabel({"depth": "layers", "width": "m = 4 r"}.get(sweep, sweep))
      axis.set_ylabel("CPU ms (dotted: cost model)")
    axes[0].legend(frameon=False, fontsize=7)
