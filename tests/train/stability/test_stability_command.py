"""The long runs: their faults, rates and loss scale, and the command."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from train.experiments import results
from train.run import program_cache
from train.stability import __main__ as command
from train.stability import report, runs, scenarios

FAULTY = scenarios.SCENARIOS["nans"]


def test_faults_hit_their_share_of_the_steps():
  spikes = scenarios.factors(scenarios.SCENARIOS["spikes"], 20_000)
  nans = scenarios.factors(FAULTY, 20_000)
  assert 150 < (spikes == scenarios.SPIKE).sum() < 250
  assert 70 < np.isnan(nans).sum() < 130
  assert set(spikes) == {1.0, scenarios.SPIKE}
  assert (scenarios.factors(scenarios.SCENARIOS["float32"], 9) == 1).all()


def test_the_learning_rate_restarts():
  rates = scenarios.rates(scenarios.SCENARIOS["restarts"], 20_000, 0.01)
  rises = np.flatnonzero(np.diff(rates) > 0.005) + 1
  assert rises.tolist() == list(range(2000, 20_000, 2000))
  assert rates.max() <= np.float32(0.01)


def test_the_loss_scale_halves_and_doubles():
  scale = scenarios.LossScale.start()
  for _ in range(scenarios.LossScale.EVERY):
    scale = scale.after(jnp.bool_(True))
  assert scale.scale == 2**16
  assert scale.after(jnp.bool_(False)).scale == 2**15


def fake(method, scenario, loss, error):
  """A record of two measurements."""
  return {
    "key": f"{method}-{scenario}-8",
    "method": method,
    "scenario": scenario,
    "steps": 8,
    "rate": 0.01,
    "seed": 0,
    "step": [4, 8],
    "loss": [3.0, loss],
    "basis_error": [error, error],
    "largest": [0.5, 0.5],
    "finite": loss is not None,
    "faulty": 1,
  }


def test_the_table_compares_with_adamw(tmp_path, capsys):
  results.append(
    tmp_path / report.FILE,
    fake("adamw", "nans", 2.0, None),
    fake("galore", "nans", 1.0, 1e-6),
    fake("adamw", "unguarded", None, None),
  )
  report.write(tmp_path, None, 8)
  rows = [x.split(" | ") for x in capsys.readouterr().out.splitlines()[2:]]
  assert rows[0][1:4] == ["AdamW", "0.01", "2.0000"]
  assert rows[1][3:7] == ["1.0000", "0.50", "1e-06", "yes"]
  assert rows[2][3:7] == ["not finite", "", "", "no"]
  assert (tmp_path / report.FIGURE).stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_a_run_with_faults_stays_finite(guarded):
  scenario = FAULTY._replace(guarded=guarded)
  made = runs.make("galore", scenario, 1000, 3e-3)
  assert made["faulty"] == np.isnan(scenarios.factors(scenario, 1000)).sum() > 0
  assert made["finite"]
  assert max(made["basis_error"]) < 1e-5
  assert made["loss"][-1] < made["loss"][0] / 2


@pytest.mark.slow
def test_without_a_guard_adamw_is_lost():
  scenario = FAULTY._replace(guarded=False)
  made = runs.make("adamw", scenario, 1000, 3e-3)
  assert not made["finite"] and made["loss"][-1] is None


@pytest.mark.slow
def test_the_command_makes_what_is_missing(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(program_cache, "enable", lambda: None)
  monkeypatch.setattr(scenarios, "RATES", (0.01,))  # each is compiled anew
  monkeypatch.setattr(
    scenarios, "METHODS", {"adamw": scenarios.METHODS["adamw"]}
  )
  names = ["float16", "bfloat16"]
  arguments = [*names, "--steps", "5", "--results", str(tmp_path)]
  assert command.main(arguments) == 0
  made = (tmp_path / report.FILE).read_text()
  tuning, half, last = map(json.loads, made.splitlines())
  assert (tuning["rate"], tuning["seed"]) == (0.01, 1)
  assert [half["scenario"], last["scenario"]] == names
  assert half["scale"] == 2**15
  assert half["rate"] == last["rate"] == 0.01
  assert command.main(arguments) == 0
  assert (tmp_path / report.FILE).read_text() == made
  assert "AdamW" in capsys.readouterr().out
