"""Figures of the tables: perplexities by variant and by rank, loss curves."""

import math
import pathlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from train.common import units
from train.experiments.plan import Plan, Record, perplexity
from train.experiments.table import Variant
from train.experiments.tables import OURS, RANKS
from train.measure import figure


def names(plan: Plan) -> list[tuple[str, str]]:
  """Files and titles of the figures for which there are enough runs."""
  stem = f"{plan.table.name}-{pathlib.Path(plan.text).stem}-{plan.tokens}"
  files = []
  if _chosen(plan):
    title = "loss of the chosen runs" if plan.table.is_long else "perplexity"
    files.append((f"{stem}.png", title))
  if _chosen(plan) and plan.table.other:
    files.append((f"{stem}-curves.png", "training loss by tokens"))
  if len(_ranks(plan)) > 1:
    files.append((f"{stem}-rank.png", "perplexity by rank"))
  return files


def draw(plan: Plan, folder: pathlib.Path, times: Mapping[str, float]) -> None:
  """Draws the figures that `names` lists.

  Args:
    plan: The table.
    folder: Where to write them.
    times: Step times of variants relative to the first one's, as far as they
      were measured.
  """
  for name, _ in names(plan):
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith("-rank.png"):
      _draw_ranks(plan, folder / name)
    elif name.endswith("-curves.png"):
      _draw_tokens(plan, folder / name)
    elif plan.table.is_long:
      _draw_curves(plan, folder / name)
    else:
      _draw_perplexities(plan, folder / name, times)


def _done(plan: Plan, variant: Variant) -> list[Record]:
  """The runs at a variant's final point, without those that diverged."""
  if not plan.complete(variant):
    return []
  return [r for r in plan.chosen_records(variant) if r["status"] == "done"]


def _chosen(plan: Plan) -> list[tuple[Variant, list[Record]]]:
  """Each finished variant with the runs at its chosen point."""
  pairs = ((variant, _done(plan, variant)) for variant in plan.table.variants)
  return [(variant, records) for variant, records in pairs if records]


def _perplexity(record: Record) -> float:
  return perplexity(record["test_loss"])


def _state_mib(record: Record) -> float:
  return record["bytes"]["optimizer"] / units.MIB


def _draw_perplexities(
  plan: Plan, path: pathlib.Path, times: Mapping[str, float]
) -> None:
  """Draws perplexities by variant and seed, by state size, and by step time."""
  chosen = _chosen(plan)
  height = max(2.6, 1.2 + 0.24 * len(chosen))  # room for the axes' names
  timed = [(v, records) for v, records in chosen if v.name in times]
  count = 3 if timed and plan.table.other else 2
  width = 5.6 if count == 2 else 4.6
  with figure.axes(path, count=count, width=width, height=height) as axes:
    _draw_seeds(plan, chosen, axes[0])
    state = lambda variant, records: _state_mib(records[0])
    _draw_costs(plan, chosen, axes[1], state, "optimizer state, MiB")
    axes[1].set_xlim(left=0)
    if count == 3:
      step = lambda variant, records: times[variant.name]
      first = plan.table.variants[0].label
      _draw_costs(plan, timed, axes[2], step, f"step time / {first}'s")


def _draw_seeds(plan: Plan, chosen: list, axis: Any) -> None:
  for i, (_, records) in enumerate(chosen):
    values = list(map(_perplexity, records))
    axis.plot(values, [i] * len(values), "o", color="0.6", ms=4)
    axis.plot(statistics.mean(values), i, "|", color="C0", ms=12, mew=2)
  labels = [variant.label for variant, _ in chosen]
  axis.set_yticks(range(len(labels)), labels, fontsize="small")
  axis.invert_yaxis()
  axis.set_xlabel("test perplexity (dots: seeds, bar: mean)")
  axis.grid(alpha=0.25)
  if chosen[0][0] == plan.table.variants[0]:
    first = statistics.mean(map(_perplexity, chosen[0][1]))
    axis.axvline(first, color="C1", lw=1)


def _draw_costs(
  plan: Plan,
  chosen: list,
  axis: Any,
  cost: Callable[[Variant, list[Record]], float],
  label: str,
) -> None:
  """Draws mean perplexities by what a variant costs."""
  values = [list(map(_perplexity, records)) for _, records in chosen]
  means = list(map(statistics.mean, values))
  stds = [statistics.stdev(x) if len(x) > 1 else 0.0 for x in values]
  sizes = [cost(variant, records) for variant, records in chosen]
  axis.errorbar(sizes, means, stds, fmt="o", color="C0", ms=4, lw=0.7)
  width, height = (max(x) - min(x) for x in (sizes, means))
  named: list[tuple[float, float]] = []
  for size, mean, (variant, _) in zip(sizes, means, chosen, strict=True):
    first = variant == plan.table.variants[0]
    if first or _is_best_of_its_size(size, mean, sizes, means):
      left = size > 0.2 * min(sizes) + 0.8 * max(sizes)
      taken = sum(
        abs(size - x) < 0.3 * width and abs(mean - y) < 0.02 * height
        for x, y in named
      )
      named.append((size, mean))
      axis.annotate(
        variant.name,
        (size, mean),
        xytext=(-4 if left else 4, 3 if first else -10 * (1 + taken)),
        textcoords="offset points",
        ha="right" if left else "left",
        fontsize="small",
      )
    if first:
      axis.axhline(mean, color="C1", lw=1)
  axis.margins(x=0.08, y=0.12)  # room for names
  axis.locator_params("x", nbins=6)
  axis.set_xlabel(label)
  axis.set_ylabel("test perplexity (mean ± std)")
  axis.grid(alpha=0.25)


def _is_best_of_its_size(
  size: float, mean: float, sizes: list[float], means: list[float]
) -> bool:
  """Whether no variant with as little state has a lower perplexity."""
  others = zip(sizes, means, strict=True)
  return not any(x <= size and y < mean for x, y in others)


def _draw_curves(plan: Plan, path: pathlib.Path) -> None:
  """Draws training and validation losses of the first seed's runs."""
  curves = [(variant, records[0]) for variant, records in _chosen(plan)]
  with figure.axes(path, count=2, width=5.6) as (training, validation):
    for i, (variant, record) in enumerate(curves):
      style = {"color": f"C{i % 10}", "ls": ("-", "--", ":")[i // 10 % 3]}
      steps, losses = zip(*record["curve"], strict=True)
      training.plot(steps, losses, lw=1.1, label=variant.label, **style)
      steps, losses = zip(*record["validation_curve"], strict=True)
      validation.plot(steps, losses, marker="o", ms=3, lw=1.1, **style)
    for axis, name in ((training, "training"), (validation, "validation")):
      axis.set_xlabel("step")
      axis.set_ylabel(f"{name} loss (nats per token)")
      axis.grid(alpha=0.25)
    low = min(min(loss for _, loss in r["curve"]) for _, r in curves)
    training.set_ylim(low - 0.1, min(low + 3, training.get_ylim()[1]))
    training.legend(frameon=False, fontsize="x-small", ncols=2)


def _draw_tokens(plan: Plan, path: pathlib.Path) -> None:
  """Draws mean training losses of all seeds by tokens, smoothed."""
  with figure.axes(path, width=7.0, height=4.0) as (axis,):
    ends = []
    for i, (variant, records) in enumerate(_chosen(plan)):
      tokens, losses = _mean_curve(records)
      style = {"color": f"C{i % 10}", "ls": ("-", "--", ":")[i // 10 % 3]}
      axis.plot(tokens, losses, lw=1.1, label=variant.label, **style)
      ends.append(losses[-1])
    axis.set_ylim(min(ends) - 0.05, min(ends) + 1.2)
    axis.set_xlabel("tokens, millions")
    axis.set_ylabel("training loss (nats per token)")
    axis.legend(frameon=False, fontsize="small")
    axis.grid(alpha=0.25)


def _mean_curve(records: list[Record]) -> tuple[np.ndarray, np.ndarray]:
  """Millions of tokens, and the seeds' mean loss over a fiftieth of the run."""
  steps = np.array([step for step, _ in records[0]["curve"]])
  losses = np.mean([[loss for _, loss in r["curve"]] for r in records], axis=0)
  width = max(1, len(losses) // 50)
  window = np.ones(width) / width
  tokens = steps * records[0]["tokens"] / records[0]["steps"] / 1e6
  return tokens[width - 1 :], np.convolve(losses, window, "valid")


def _ranks(plan: Plan) -> list[tuple[int, list[Record]]]:
  """Each rank of the ablations with its runs at the chosen point."""
  if plan.table.name != "ablations":
    return []
  by_name = {variant.name: variant for variant in plan.table.variants}
  found = []
  for rank in RANKS:
    variant = by_name.get(f"rank_{rank}") or (OURS if rank == 64 else None)
    records = _done(plan, variant) if variant else []
    if records:
      found.append((rank, records))
  return found


def _draw_ranks(plan: Plan, path: pathlib.Path) -> None:
  """Draws perplexity and state by rank, beside those of full rank."""
  by_rank = _ranks(plan)
  ranks = [rank for rank, _ in by_rank]
  with figure.axes(path, count=2) as (quality, memory):
    means = []
    for rank, records in by_rank:
      values = list(map(_perplexity, records))
      quality.plot([rank] * len(values), values, "o", color="0.6", ms=3)
      means.append(math.fsum(values) / len(values))
    quality.plot(ranks, means, marker="o", color="C0", label="GaLore")
    sizes = [_state_mib(records[0]) for _, records in by_rank]
    memory.plot(ranks, sizes, marker="o")
    for variant, records in _chosen(plan):
      if variant.name == "adamw":
        full_rank = statistics.mean(map(_perplexity, records))
        quality.axhline(full_rank, color="C1", label=variant.label)
        memory.axhline(_state_mib(records[0]), color="C1")
    quality.legend(frameon=False, fontsize="small")
    quality.set_ylabel("test perplexity")
    memory.set_ylabel("optimizer state, MiB")
    memory.set_ylim(bottom=0)
    for axis in (quality, memory):
      axis.set_xscale("log", base=2)
      axis.set_xticks(ranks, [str(rank) for rank in ranks])
      axis.set_xlabel("rank")
      axis.grid(alpha=0.25)
