"""How stable runs were: jumps of the loss, rises, bases that have worn."""

import itertools
import math
import statistics
from typing import Any

import galore_optax
from train.experiments.plan import Plan, Record
from train.measure.bases import orthogonality_error

BEFORE = 20  # steps that a loss is compared with
PARTS = (1 / 3, 2 / 3, 1.0)  # of a run
HEAD = (
  "",
  "seed",
  "largest jump of the training loss",
  "at step",
  "evaluations above the previous one",
  "largest such rise",
  *(f"difference to the first row after {part}" for part in ("1/3", "2/3")),
  "at the end",
  "largest orthogonality error at the end",
)


def summarize(losses: list[tuple[int, float]], opt_state: Any) -> Record:
  """Summarizes the stability of a run, for its record.

  Args:
    losses: Step and training loss of each step.
    opt_state: State of the optimizer after the last step.

  Returns:
    `jump`: step and size in nats of the loss that rises the furthest above the
    median of the `BEFORE` previous losses, after the first tenth of the run.
    `basis_error`: the largest entry of |P^T P - I| over all bases. Either is
    left out if the run is too short or has no bases.
  """
  start = max(BEFORE, len(losses) // 10)
  jumps = [
    (losses[i][1] - _median(losses[i - BEFORE : i]), losses[i][0])
    for i in range(start, len(losses))
  ]
  summary: Record = {}
  if jumps:
    size, step = max(jumps)
    summary["jump"] = [step, round(size, 4)]
  errors = [
    orthogonality_error(basis)
    for sides in galore_optax.find_bases(opt_state).values()
    for basis in sides.values()
  ]
  return summary | ({"basis_error": max(errors)} if errors else {})


def _median(losses: list[tuple[int, float]]) -> float:
  return statistics.median(loss for _, loss in losses)


def rows(plan: Plan) -> list[list[str]]:
  """A row for each run at the chosen point of each variant, under `HEAD`."""
  base = {r["seed"]: r for r in plan.chosen_records(plan.table.variants[0])}
  return [
    [variant.label, str(record["seed"]), *_cells(record, base)]
    for variant in plan.table.variants
    for record in plan.chosen_records(variant)
    if record["status"] == "done"
  ]


def _cells(record: Record, base: dict[int, Record]) -> list[str]:
  step, size = record.get("jump", ("", math.nan))
  curve = record["validation_curve"]
  pairs = itertools.pairwise(loss for _, loss in curve)
  rises = [after - before for before, after in pairs if after > before]
  error = record.get("basis_error")
  return [
    f"{size:.2f} nats" if step else "",
    str(step),
    f"{len(rises)} of {len(curve) - 1}",
    f"{max(rises):.3f} nats" if rises else "",
    *_differences(record, base.get(record["seed"])),
    "" if error is None else f"{error:.0e}",
  ]


def _differences(record: Record, base: Record | None) -> list[str]:
  """Differences in validation perplexity after each of `PARTS` of the run."""
  if base is None or base["status"] != "done":
    return [""] * len(PARTS)
  base_losses = dict(map(tuple, base["validation_curve"]))
  differences = [
    loss - base_losses[step]
    for step, loss in record["validation_curve"]
    if step in base_losses
  ]
  indices = [math.ceil(part * len(differences)) - 1 for part in PARTS]
  return [f"{100 * math.expm1(differences[i]):+.1f} %" for i in indices]
