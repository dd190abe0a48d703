"""Figures of the tables: perplexity by entry and by rank, loss curves."""

import math
import pathlib
import statistics

from train.experiments.plan import Plan, Record
from train.experiments.tables import OURS, RANKS, Entry
from train.measure import figure


def names(plan: Plan) -> list[tuple[str, str]]:
  """Files and titles of the figures that the runs are enough for."""
  stem = f"{plan.table.name}-{pathlib.Path(plan.text).stem}-{plan.tokens}"
  found = []
  if _chosen(plan):
    title = "loss of the chosen runs" if plan.table.is_long else "perplexity"
    found.append((f"{stem}.png", title))
  if len(_ranks(plan)) > 1:
    found.append((f"{stem}-rank.png", "perplexity by rank"))
  return found


def draw(plan: Plan, folder: pathlib.Path) -> None:
  """Draws them."""
  for name, _ in names(plan):
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith("-rank.png"):
      _draw_ranks(plan, folder / name)
    elif plan.table.is_long:
      _draw_curves(plan, folder / name)
    else:
      _draw_perplexities(plan, folder / name)


def _chosen(plan: Plan) -> list[tuple[Entry, list[Record]]]:
  """The finished runs of each entry at the point chosen for it."""
  found = []
  for entry in filter(plan.complete, plan.table.entries):
    done = [r for r in plan.seeds(entry) if r["status"] == "done"]
    if done:
      found.append((entry, done))
  return found


def _draw_perplexities(plan: Plan, path: pathlib.Path) -> None:
  """A dot a seed, the first row's mean as a line; and means by state."""
  chosen = _chosen(plan)
  values = [[_perplexity(r) for r in records] for _, records in chosen]
  means = [statistics.mean(x) for x in values]
  labels = [entry.label for entry, _ in chosen]
  tall = 1.2 + 0.24 * len(chosen)
  with figure.axes(path, count=2, width=5.6, height=tall) as (seeds, states):
    for i, (found, mean) in enumerate(zip(values, means, strict=True)):
      seeds.plot(found, [i] * len(found), "o", color="0.6", ms=4)
      seeds.plot(mean, i, "|", color="C0", ms=12, mew=2)
    seeds.set_yticks(range(len(labels)), labels, fontsize="small")
    seeds.invert_yaxis()
    sizes = [r[0]["bytes"]["optimizer"] / 2**20 for _, r in chosen]
    spreads = [statistics.stdev(x) if len(x) > 1 else 0.0 for x in values]
    states.errorbar(sizes, means, spreads, fmt="o", color="C0", ms=4, lw=0.7)
    for x, y, (entry, _) in zip(sizes, means, chosen, strict=True):
      if entry == plan.table.entries[0] or _unbeaten(x, y, sizes, means):
        left = x > 0.8 * max(sizes)
        states.annotate(
          entry.name,
          (x, y),
          xytext=(-4 if left else 4, 3),
          textcoords="offset points",
          ha="right" if left else "left",
          fontsize="small",
        )
    states.set_xlabel("optimizer state, MiB")
    states.set_xlim(left=0)
    seeds.set_xlabel("perplexity")
    states.set_ylabel("perplexity")
    for axis in (seeds, states):
      axis.grid(alpha=0.25)
    if chosen[0][0] == plan.table.entries[0]:
      seeds.axvline(means[0], color="C1", lw=1)
      states.axhline(means[0], color="C1", lw=1)


def _unbeaten(
  size: float, mean: float, sizes: list[float], means: list[float]
) -> bool:
  """Whether nothing is as small and better: those have a name in the figure."""
  others = zip(sizes, means, strict=True)
  return not any(x <= size and y < mean for x, y in others)


def _perplexity(record: Record) -> float:
  return math.exp(min(record["test_loss"], 700))


def _draw_curves(plan: Plan, path: pathlib.Path) -> None:
  curves = [(entry, records[0]) for entry, records in _chosen(plan)]
  with figure.axes(path, count=2, width=5.6) as (training, held_out):
    for i, (entry, record) in enumerate(curves):
      style = {"color": f"C{i % 10}", "ls": ("-", "--", ":")[i // 10 % 3]}
      steps, losses = zip(*record["curve"], strict=True)
      training.plot(steps, losses, lw=1.1, label=entry.label, **style)
      steps, losses = zip(*record["validation_curve"], strict=True)
      held_out.plot(steps, losses, marker="o", ms=3, lw=1.1, **style)
    for axis, label in ((training, "training loss"), (held_out, "validation")):
      axis.set_xlabel("step")
      axis.set_ylabel(f"{label} (nats a token)")
      axis.grid(alpha=0.25)
    low = min(min(loss for _, loss in r["curve"]) for _, r in curves)
    training.set_ylim(low - 0.1, min(low + 3, training.get_ylim()[1]))
    training.legend(frameon=False, fontsize="x-small", ncols=2)


def _ranks(plan: Plan) -> list[tuple[int, list[float], int]]:
  """Rank, perplexities of the seeds, bytes of state."""
  by_name = {entry.name: entry for entry in plan.table.entries}
  found = []
  for rank in RANKS:
    entry = by_name.get(f"rank_{rank}") or (OURS if rank == 64 else None)
    if entry is None or plan.table.name != "ablations":
      continue
    if not plan.complete(entry):
      continue
    done = [r for r in plan.seeds(entry) if r["status"] == "done"]
    if done:
      values = [_perplexity(r) for r in done]
      found.append((rank, values, done[0]["bytes"]["optimizer"]))
  return found


def _draw_ranks(plan: Plan, path: pathlib.Path) -> None:
  found = _ranks(plan)
  ranks = [rank for rank, _, _ in found]
  with figure.axes(path, count=2) as (quality, memory):
    for rank, values, _ in found:
      quality.plot([rank] * len(values), values, "o", color="0.6", ms=3)
    means = [sum(values) / len(values) for _, values, _ in found]
    quality.plot(ranks, means, marker="o", color="C0", label="GaLore")
    for entry, records in _chosen(plan):
      if entry.name == "adamw":
        full = statistics.mean(map(_perplexity, records))
        quality.axhline(full, color="C1", label=entry.label)
        size = records[0]["bytes"]["optimizer"] / 2**20
        memory.axhline(size, color="C1")
    quality.legend(frameon=False, fontsize="small")
    quality.set_ylabel("perplexity")
    memory.plot(ranks, [size / 2**20 for *_, size in found], marker="o")
    memory.set_ylabel("optimizer state, MiB")
    memory.set_ylim(bottom=0)
    for axis in (quality, memory):
      axis.set_xscale("log", base=2)
      axis.set_xticks(ranks, [str(rank) for rank in ranks])
      axis.set_xlabel("rank")
      axis.grid(alpha=0.25)
