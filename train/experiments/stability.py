"""How runs went, not only where they ended: jumps, rises, worn bases."""

import itertools
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp

import galore_optax
from train.experiments.plan import Plan, Record

BEFORE = 20  # steps that a loss is compared with
PARTS = (1 / 3, 2 / 3, 1.0)  # of a run
HEAD = (
  "",
  "seed",
  "largest jump of the training loss",
  "at step",
  "evaluations above the one before",
  "largest such rise",
  *(f"against the first row after {part}" for part in ("1/3", "2/3")),
  "at the end",
  "worst basis at the end",
)


def look(losses: list[tuple[int, float]], opt_state: Any) -> Record:
  """What a record keeps of it.

  Args:
    losses: step and training loss of each step.
    opt_state: the optimizer's, after the last.

  Returns:
    `jump`: step and nats of the loss that is the furthest above the median of
    the `BEFORE` steps before it, after the first tenth of the run. And
    `basis_error`, the largest entry of |P^T P - I| of all bases, if there are
    any.
  """
  start = max(BEFORE, len(losses) // 10)
  jumps = [
    (losses[i][1] - _median(losses[i - BEFORE : i]), losses[i][0])
    for i in range(start, len(losses))
  ]
  found: Record = {}
  if jumps:
    size, step = max(jumps)
    found["jump"] = [step, round(size, 4)]
  errors = [
    float(jnp.max(jnp.abs(_gram(basis) - jnp.eye(basis.shape[-1]))))
    for sides in galore_optax.find_bases(opt_state).values()
    for basis in sides.values()
  ]
  return found | ({"basis_error": max(errors)} if errors else {})


def _median(losses: list[tuple[int, float]]) -> float:
  return statistics.median(loss for _, loss in losses)


def _gram(basis: jax.Array) -> jax.Array:
  basis = basis.astype(jnp.float32)
  return jnp.einsum("...mr,...ms->...rs", basis, basis, precision="highest")


def rows(plan: Plan) -> list[list[str]]:
  """A row a run at the chosen point of each entry, under `HEAD`."""
  base = {r["seed"]: r for r in plan.seeds(plan.table.entries[0])}
  return [
    [entry.label, str(record["seed"]), *_cells(record, base)]
    for entry in plan.table.entries
    for record in plan.seeds(entry)
    if record["status"] == "done"
  ]


def _cells(record: Record, base: dict[int, Record]) -> list[str]:
  step, size = record.get("jump", ("", math.nan))
  curve = record["validation_curve"]
  pairs = itertools.pairwise(loss for _, loss in curve)
  rises = [now - last for last, now in pairs if now > last]
  error = record.get("basis_error")
  return [
    f"{size:.2f} nats" if step else "",
    str(step),
    f"{len(rises)} of {len(curve) - 1}",
    f"{max(rises):.3f} nats" if rises else "",
    *_leads(record, base.get(record["seed"])),
    "" if error is None else f"{error:.0e}",
  ]


def _leads(record: Record, base: Record | None) -> list[str]:
  """How much lower or higher in perplexity on the validation text."""
  if base is None or base["status"] != "done":
    return [""] * len(PARTS)
  theirs = dict(map(tuple, base["validation_curve"]))
  shared = [
    (step, loss - theirs[step])
    for step, loss in record["validation_curve"]
    if step in theirs
  ]
  at = [shared[math.ceil(part * len(shared)) - 1][1] for part in PARTS]
  return [f"{100 * math.expm1(x):+.1f} %" for x in at]
