"""Small tables, and made-up records of their runs."""

import math

from train.experiments import plan, tables

# Ranges for which the points that a search takes are known, and two variants in
# each of two groups.
METHODS = tables.METHODS._replace(
  rates=tables.SearchRange(8e-3, 1e-3, 6.4e-2),
  multipliers=tables.SearchRange(0.25, 1 / 64, 4.0),
  groups=tuple(group[:2] for group in tables.METHODS.groups[:2]),
)
DIVERGING = 8e-3 * 1e40  # a learning rate
# A table that is trained within seconds: two seeds of AdamW at a fixed point,
# and a search of GaLore whose second point diverges.
TINIEST = tables.QUICK._replace(
  groups=((tables.BASELINE._replace(at=(8e-3, 0.25)), tables.OURS),),
  settings=(
    "model.vocab_size=300",
    "model.d_model=32",
    "model.d_ff=48",
    "model.n_layers=1",
    "model.n_heads=2",
    "data.length=16",
    "data.batch=4",
    "optimizer.rank=8",
    "optimizer.scale=1",
    "train.max_skips=2",
  ),
  rates=tables.SearchRange(8e-3, 8e-3, DIVERGING, 1e40),
  tokens=640,
)


def point_of(run: plan.Run) -> plan.Point:
  return run.rate, run.multiplier


def fake(run: plan.Run, loss: float, **fields) -> plan.Record:
  """A record as of a real run; its test loss ranks in reverse."""
  return {
    "key": run.key,
    "entry": run.variant.name,
    "status": "done",
    "validation_loss": loss,
    "test_loss": 10 - loss + 0.1 * run.seed,
    "seed": run.seed,
    "tokens": run.tokens,
    "steps": 10,
    "text": run.text,
    "bytes": {"optimizer": 2**20, "weights": 2**20},
    "cpu_seconds_a_step": 0.5,
    "curve": [[1, 5.0], [10, 4.0]],
    "validation_curve": [[0, 5.0], [10, 4.0]],
    "date": "2026-01-01",
    "machine": {"processor": "a chip", "cores": 2},
    "versions": {"jax": "1", "optax": "2"},
    **fields,
  }


def loss_of(run: plan.Run) -> float:
  """Least at rate 4e-3 and multiplier 0.5."""
  far = abs(math.log2(run.rate / 4e-3)) + abs(math.log2(run.multiplier / 0.5))
  return 4 + 0.1 * far


def finished(table: tables.Table) -> tuple[plan.Plan, list[plan.Run]]:
  """A finished plan with made-up losses, and its runs in sequence."""
  found, order = {}, []
  while runs := plan.Plan(table, 1000, "speeches", found).missing():
    order.append(runs[0])
    found[runs[0].key] = fake(runs[0], loss_of(runs[0]))
  return plan.Plan(table, 1000, "speeches", found), order
