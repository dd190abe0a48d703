"""Figures of the tables: loss curves, and perplexity by rank."""

import math
import pathlib

from train.bench import pictures
from train.experiments.plan import Plan, Record
from train.experiments.tables import OURS, RANKS, Entry


def names(plan: Plan) -> list[tuple[str, str]]:
  """Files and titles of the figures that the runs are enough for."""
  stem = f"{plan.table.name}-{pathlib.Path(plan.text).stem}-{plan.tokens}"
  found = []
  if _curves(plan):
    found.append((f"{stem}.png", "training loss of the chosen runs"))
  if len(_ranks(plan)) > 1:
    found.append((f"{stem}-rank.png", "perplexity by rank"))
  return found


def draw(plan: Plan, folder: pathlib.Path) -> None:
  """Draws them."""
  for name, _ in names(plan):
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith("-rank.png"):
      _draw_ranks(plan, folder / name)
    else:
      _draw_curves(plan, folder / name)


def _curves(plan: Plan) -> list[tuple[Entry, Record]]:
  """The first finished run of each entry at the point chosen for it."""
  found = []
  for entry in filter(plan.complete, plan.table.entries):
    done = [r for r in plan.seeds(entry) if r["status"] == "done"]
    if done:
      found.append((entry, done[0]))
  return found


def _draw_curves(plan: Plan, path: pathlib.Path) -> None:
  curves = _curves(plan)
  with pictures.axes(path, count=2, width=5.6) as (training, held_out):
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
      values = [math.exp(min(r["test_loss"], 700)) for r in done]
      found.append((rank, values, done[0]["bytes"]["optimizer"]))
  return found


def _draw_ranks(plan: Plan, path: pathlib.Path) -> None:
  found = _ranks(plan)
  ranks = [rank for rank, _, _ in found]
  with pictures.axes(path, count=2) as (quality, memory):
    for rank, values, _ in found:
      quality.plot([rank] * len(values), values, "o", color="0.6", ms=3)
    means = [sum(values) / len(values) for _, values, _ in found]
    quality.plot(ranks, means, marker="o", color="C0")
    quality.set_ylabel("perplexity")
    memory.plot(ranks, [size / 2**20 for *_, size in found], marker="o")
    memory.set_ylabel("optimizer state, MiB")
    memory.set_ylim(bottom=0)
    for axis in (quality, memory):
      axis.set_xscale("log", base=2)
      axis.set_xlabel("rank")
      axis.grid(alpha=0.25)
