"""Finding a basis: what it costs, and how much of a gradient it keeps.

Compares every method with the exact SVD, which is what optax.contrib.galore and
galore-torch compute. The gradients are recorded early and late in a short run
of a small LLaMA, or are synthetic, with singular values i^-alpha. `cold` starts
from a random basis. `warm` starts from the basis of the refresh before, or for
synthetic gradients from a basis whose mean squared cosine to the best one is
0.5.
"""

import argparse
import functools
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_optax import captured_energy
from galore_optax.subspace import find as find_lib
from galore_optax.subspace import projection, refresh_settings
from train.bench import options
from train.common import units
from train.measure import bases, figure, gradients, timing
from train.measure import tables as tables_lib
from train.measure.tables import short

ALPHAS = (0.25, 0.5, 1.0)
ITERATIONS = (1, 2, 3, 4)
SHAPES = (
  (512, 512, 128),
  (512, 1376, 128),
  (1024, 2736, 256),
  (2048, 5461, 512),
)
DEFAULT_ITERATIONS: Any = refresh_settings.DEFAULTS.iterations
FLOOR = 1e-4  # the least loss of energy that the figure shows
SVD = "svd"
RANDOM = "random"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of this benchmark."""
  add = parser.add_argument
  add(
    "--sizes",
    default=_as_text(SHAPES),
    help="m x n x rank of synthetic gradients, with m <= n",
  )
  add("--preset", default="sotu_small", help="preset of the recorded run")
  add(
    "--set",
    action="append",
    default=[],
    dest="settings",
    metavar="FIELD=VALUE",
    help="change a field of the preset; may be repeated",
  )
  for name, steps in (("early", (1, 51)), ("late", (250, 300))):
    add(
      f"--{name}",
      type=int,
      nargs=2,
      default=steps,
      metavar=("OLD", "NEW"),
      help=f"steps of two {name} gradients (default: %(default)s)",
    )
  add(
    "--gradients",
    type=pathlib.Path,
    help=".npz file of recorded gradients: read if it exists, else written",
  )


def _as_text(sizes: tuple[tuple[int, int, int], ...]) -> str:
  return ",".join("x".join(map(str, size)) for size in sizes)


QUICK = {"sizes": _as_text(SHAPES[:2]), "early": (1, 5), "late": (10, 15)}


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """Cost by shape, and captured energy by gradient."""
  costs, quality = [], []
  for m, n, rank in options.sizes("--sizes", flags.sizes):
    synthetic = gradients.Synthetic(m, n)
    stale = synthetic.stale_basis(rank)
    g = synthetic.gradient(0.5)
    costs.append({"shape": [m, n], "rank": rank, **cost(g, stale)})
    for alpha in ALPHAS:
      g, name = synthetic.gradient(alpha), f"i^-{alpha:g}, {m} x {n}"
      relative = energies(g, stale, _best_energy(alpha, m, rank))
      quality.append(_case(name, rank, [relative]))
  when = gradients.Steps(tuple(flags.early), tuple(flags.late))
  recorded = gradients.load_or_record(
    flags.gradients, flags.preset, flags.settings, when
  )
  quality += _recorded(recorded, when)
  results = {
    "default_iterations": DEFAULT_ITERATIONS,
    "costs": costs,
    "quality": quality,
  }
  print(text(results))
  return results


@functools.cache
def _finder(method: str, side: str) -> Any:
  return jax.jit(functools.partial(_find, method=method, side=side))


def _find(
  g: jax.Array, old: jax.Array, iterations: Any, method: str, side: str
) -> jax.Array:
  return find_lib.find_basis(g, old, side, method, iterations)


def find(
  method: str, iterations: int, g: jax.Array, old: jax.Array, side: str
) -> jax.Array:
  """Finds a basis with the method of this name."""
  if method == RANDOM:
    drawn = projection.RandomBasis(jnp.uint32(0), old.shape).draw()
    return jnp.linalg.qr(drawn)[0]
  return _finder(method, side)(g, old, jnp.int32(iterations))


def cost(g: np.ndarray, old: np.ndarray) -> dict[str, Any]:
  """Seconds and temporaries of each method on one matrix."""
  grad, start = jnp.asarray(g), jnp.asarray(old)
  runs = {SVD: functools.partial(find, SVD, 0, grad, start, "left")}
  for k in ITERATIONS:
    runs[f"subspace {k}"] = functools.partial(
      find, "subspace", k, grad, start, "left"
    )
  runs[RANDOM] = jax.jit(projection.RandomBasis(jnp.uint32(0), old.shape).draw)
  budget = timing.Budget(most=9, least=1, limit=6.0)
  times = timing.interleave(runs, budget)
  return {
    "seconds": {name: statistics.median(x) for name, x in times.items()},
    "temporaries": {
      method: _temporaries(method, grad, start) for method in (SVD, "subspace")
    },
  }


def _temporaries(method: str, grad: jax.Array, start: jax.Array) -> int:
  """Bytes besides arguments and result, without those of LAPACK itself."""
  lowered: Any = _finder(method, "left").lower(grad, start, jnp.int32(1))
  return lowered.compile().memory_analysis().temp_size_in_bytes


def _best_energy(alpha: float, m: int, rank: int) -> float:
  """The share of energy that the best basis keeps of i^-alpha."""
  energy = np.arange(1, m + 1) ** (-2 * alpha)
  return float(energy[:rank].sum() / energy.sum())


def energies(
  g: np.ndarray, old: np.ndarray | jax.Array, best: float | None = None
) -> dict[str, float]:
  """Captured energy of each method's basis, relative to the best basis's.

  Args:
    g: A matrix (m, n).
    old: The basis of the short side that a warm start begins with.
    best: Share of energy that the best basis keeps; computed by an exact SVD if
      it is not given.

  Returns:
    Relative energy by method and start, and `orthogonality`, the largest entry
    of |P^T P - I| over all iterated bases.
  """
  side = "left" if g.shape[0] <= g.shape[1] else "right"
  grad, warm = jnp.asarray(g), jnp.asarray(old)
  cold = find_lib.start_basis(jax.random.key(1), *old.shape)
  if best is None:
    best = _energy(grad, find(SVD, 0, grad, warm, side), side)
  energy = {
    RANDOM: _energy(grad, find(RANDOM, 0, grad, warm, side), side) / best,
    "stale": _energy(grad, warm, side) / best,
  }
  worst = 0.0
  for start, basis in (("cold", cold), ("warm", warm)):
    for k in ITERATIONS:
      new = find("subspace", k, grad, basis, side)
      energy[f"{start} {k}"] = _energy(grad, new, side) / best
      worst = max(worst, bases.orthogonality_error(new))
  return energy | {"orthogonality": worst}


_captured_energy = jax.jit(captured_energy)


def _energy(g: jax.Array, basis: jax.Array, side: str) -> float:
  return float(_captured_energy(g, {side: basis}))


def _case(
  name: str, rank: int, energy: list[dict[str, float]]
) -> dict[str, Any]:
  """A row of the table: the median and the least energy of some matrices."""
  keys = [key for key in energy[0] if key != "orthogonality"]
  return {
    "name": name,
    "rank": rank,
    "matrices": len(energy),
    "median": {k: statistics.median(x[k] for x in energy) for k in keys},
    "least": {k: min(x[k] for x in energy) for k in keys},
    "orthogonality": max(x["orthogonality"] for x in energy),
  }


def _recorded(
  recorded: dict[str, np.ndarray], when: gradients.Steps
) -> list[dict[str, Any]]:
  """Energies on a run's gradients, by stage of the run and shape."""
  groups: dict[tuple[str, tuple], list[dict[str, float]]] = {}
  for key, new in recorded.items():
    prefix, _, path = key.partition("/")
    if not prefix.endswith(".new"):
      continue
    name = prefix.removesuffix(".new")
    old = recorded[f"{name}.old/{path}"]
    for g, before in zip(new, old, strict=True):
      rank = min(g.shape) // 4
      side = "left" if g.shape[0] <= g.shape[1] else "right"
      size = min(g.shape)
      zeros = jnp.zeros((size, rank))
      warm = find(SVD, 0, jnp.asarray(before), zeros, side)
      shape = tuple(sorted(g.shape))
      groups.setdefault((name, shape), []).append(energies(g, warm))
  return [
    _case(
      f"{name} (step {getattr(when, name)[1]}), {m} x {n}", min(m, n) // 4, rows
    )
    for (name, (m, n)), rows in groups.items()
  ]


COST_HEAD = ["shape, rank", "method", "SVD / method", "CPU ms", "XLA temp. MiB"]


def _cost_rows(results: dict[str, Any]) -> list[list[str]]:
  rows = []
  for x in results["costs"]:
    m, n = x["shape"]
    for method, seconds in x["seconds"].items():
      temporaries = x["temporaries"].get(method.partition(" ")[0])
      default = method == f"subspace {results['default_iterations']}"
      rows.append(
        [
          f"{m} x {n}, {x['rank']}",
          f"{method}{' (default)' if default else ''}",
          short(x["seconds"][SVD] / seconds),
          short(1e3 * seconds),
          "-" if temporaries is None else units.format_mib(temporaries, 1),
        ]
      )
  return rows


STARTS = [f"{start} {k}" for start in ("cold", "warm") for k in ITERATIONS]
QUALITY_HEAD = [
  "gradient, rank",
  RANDOM,
  "stale",
  *STARTS,
  "orthogonality error",
]


def _quality_rows(results: dict[str, Any]) -> list[list[str]]:
  rows = []
  for x in results["quality"]:
    several = "" if x["matrices"] == 1 else f", least of {x['matrices']}"
    cells = [f"{x['least'][k]:.4f}" for k in (RANDOM, "stale", *STARTS)]
    name = f"{x['name']}, {x['rank']}{several}"
    rows.append([name, *cells, f"{x['orthogonality']:.0e}"])
  return rows


def text(results: dict[str, Any]) -> str:
  """Both tables for the terminal."""
  return "\n\n".join(
    (
      tables_lib.text_table(COST_HEAD, _cost_rows(results)),
      tables_lib.text_table(QUALITY_HEAD, _quality_rows(results)),
    )
  )


def tables(results: dict[str, Any]) -> str:
  """Both tables for the page."""
  return "\n\n".join(
    (
      tables_lib.markdown_table(COST_HEAD, _cost_rows(results)),
      tables_lib.markdown_table(QUALITY_HEAD, _quality_rows(results)),
    )
  )


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
  """Draws lost energy by iterations, and the cost beside the SVD's."""
  # Spectra look alike at every size: only those of the largest are drawn.
  synthetic = [x for x in results["quality"] if x["name"].startswith("i^")]
  recorded = [x for x in results["quality"] if x not in synthetic]
  shown = [*synthetic[-len(ALPHAS) :], *recorded]
  with figure.axes(path, 3) as (cold, warm, costs):
    for axis, start in ((cold, "cold"), (warm, "warm")):
      for x in shown:
        lost = [1 - x["least"][f"{start} {k}"] for k in ITERATIONS]
        style = "o-" if x in recorded else "s--"
        lost = np.maximum(lost, FLOOR)
        axis.plot(ITERATIONS, lost, style, ms=3, lw=1, label=x["name"])
      axis.axhline(0.01, color="0.6", lw=1)
      axis.set_yscale("log")
      axis.set_ylim(0.7 * FLOOR, 5)
      axis.set_xticks(ITERATIONS)
      axis.set_xlabel(f"iterations from a {start} start")
      axis.set_ylabel(f"share of energy lost (floor: {FLOOR:g})", fontsize=8)
    warm.legend(frameon=False, fontsize=6, ncols=2, loc="upper right")
    _draw_costs(results, costs)


def _draw_costs(results: dict[str, Any], axis: Any) -> None:
  names = [f"{x['shape'][0]} x {x['shape'][1]}" for x in results["costs"]]
  for method in (SVD, *(f"subspace {k}" for k in ITERATIONS)):
    seconds = [1e3 * x["seconds"][method] for x in results["costs"]]
    axis.plot(names, seconds, "o-", ms=3, lw=1, label=method)
  axis.set_yscale("log")
  axis.set_ylabel("CPU ms")
  axis.tick_params(axis="x", labelsize=6)
  axis.legend(frameon=False, fontsize=7)
