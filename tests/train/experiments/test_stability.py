"""Jumps of the loss, worn bases and rises of the validation loss."""

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax
from tests.train.experiments.fakes import fake
from train.experiments import (
  plan,
  report,
  stability,
  tables,
)


def test_jumps_of_the_loss_and_worn_bases_are_found():
  losses = [(step, 5 - 0.01 * step) for step in range(1, 101)]
  losses[5] = (6, 9.0)  # during the warm-up
  losses[69] = (70, 7.3)
  found = stability.summarize(losses, ())
  assert found["jump"] == [70, pytest.approx(7.3 - 4.405, abs=1e-3)]
  assert "basis_error" not in found and "jump" not in stability.summarize(
    [], ()
  )
  tx = galore_optax.galore(optax.adam(1e-3), rank=4)
  state = tx.init({"w": jnp.zeros((8, 12))})
  assert stability.summarize(losses, state)["basis_error"] < 1e-6
  worn = jax.tree.map(lambda x: 1.5 * x if x.shape == (8, 4) else x, state)
  assert stability.summarize(losses, worn)["basis_error"] == pytest.approx(1.25)


def test_stability_is_compared_with_the_first_row(tmp_path):
  table = tables.LONG._replace(
    groups=(tuple(e._replace(gaps=2) for e in tables.LONG.variants[:2]),),
    seeds=(0,),
  )
  known = plan.Plan(table, 1000, "speeches", {})
  base, ours = (known.run(e, e.at, 0) for e in table.variants)
  flat = [[0, 5.0], [1, 4.0], [2, 3.0], [3, 3.0]]
  bent = [[0, 5.0], [1, 3.9], [2, 3.2], [3, 3.5]]
  more = {"jump": [2, 0.25], "basis_error": 3e-7}
  known.records[base.key] = fake(base, 3.0, validation_curve=flat)
  known.records[ours.key] = fake(ours, 3.5, validation_curve=bent, **more)
  first, second = stability.rows(known)
  assert first == [
    *("AdamW, full rank", "0", "", "", "0 of 3", ""),
    *("+0.0 %", "+0.0 %", "+0.0 %", ""),
  ]
  assert second == [
    *("GaLore, 60 gaps", "0", "0.25 nats", "2", "1 of 3", "0.300 nats"),
    *("-9.5 %", "+22.1 %", "+64.9 %", "3e-07"),
  ]
  section = report.evidence(known, tmp_path)
  assert f"| {' | '.join(stability.HEAD)} |" in section
  assert f"| {' | '.join(second)} |" in section
