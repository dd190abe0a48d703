"""Runs by one program: against the training script, side by side, resumed."""

import contextlib
import functools
import itertools
import json
import math

import jax
import numpy as np
import pytest

from tests.train import conftest
from tests.train.experiments.fakes import DIVERGING, TINIEST
from train import pretrain
from train.experiments import (
  lanes,
  plan,
  tables,
  texts,
  training,
  training_loop,
)
from train.methods import registry
from train.run import checkpoint, metrics

ADAMW, GALORE = TINIEST.variants
NEVER = lambda: False


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """A tiny text in its parts, with a cache of its own."""
  folder = tmp_path_factory.mktemp("text")
  (folder / "speech.txt").write_text(conftest.speech(120), encoding="utf-8")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    yield texts.prepare(str(folder / "speech.txt"), folder / "cache")


def runs_of(variant, *points):
  known = plan.Plan(TINIEST, 640, "speech", {})
  return [known.run(variant, point[:2], point[2]) for point in points]


def measured(record):
  return [loss for _, loss in record["curve"]] + [record["test_loss"]]


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
  """Records of single runs of AdamW, by rate, multiplier and seed."""
  out = tmp_path_factory.mktemp("alone")
  points = [(8e-3, 0.25, 0), (4e-3, 1.0, 0), (8e-3, 0.25, 1)]
  return {
    point: training.train([run], text, out / run.key, NEVER)[0]
    for point, run in zip(points, runs_of(ADAMW, *points), strict=True)
  }


def test_a_run_is_that_of_the_training_script(text, alone, undrawn, tmp_path):
  run = runs_of(GALORE, (8e-3, 0.25, 1))[0]
  (record,) = training.train([run], text, tmp_path / "lane", NEVER)
  arguments = ["--preset", tables.PRESET, "--optimizer", "galore"]
  for setting in training.settings(run, text):
    arguments += ["--set", setting]
  arguments += ["--set", "mesh.data=1", "--out", str(tmp_path / "run")]
  make = training.mesh_lib.make_mesh
  one = lambda config, batch, *_, **__: make(config, batch, jax.devices()[:1])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(training.mesh_lib, "make_mesh", one)
    assert pretrain.main(arguments) == 0
  log = metrics.read(tmp_path / "run" / metrics.FILE)
  losses = [line["loss"] for line in log if "loss" in line]
  np.testing.assert_allclose(measured(record)[:-1], losses, atol=1e-4)
  scores = [line["held_out_loss"] for line in log if "held_out_loss" in line]
  found = [loss for _, loss in record["validation_curve"]]
  np.testing.assert_allclose(found, scores, atol=1e-4)


def test_runs_of_other_numbers_do_not_compile_again(text, alone):
  config = training.program_of(runs_of(ADAMW, (1.0, 1.0, 5))[0], text)
  mesh = training.mesh_lib.make_mesh(config.mesh, 4, jax.devices()[:1])
  program = training._program(config, 1, mesh)
  assert program.advance._cache_size() == 1
  assert len({record["test_loss"] for record in alone.values()}) == 3


def test_lanes_side_by_side_are_the_runs_alone(text, alone, tmp_path):
  records = training.train(
    runs_of(ADAMW, *alone), text, tmp_path, NEVER, other=text.validation
  )
  for record, single in zip(records, alone.values(), strict=True):
    assert record["key"] == single["key"] and record["lanes"] == 3
    np.testing.assert_allclose(measured(record), measured(single), atol=1e-4)
    assert record["bytes"] == single["bytes"]
    assert math.isfinite(record["other_loss"])


def test_a_lane_that_diverges_leaves_the_others_alone(text, alone, tmp_path):
  runs = runs_of(ADAMW, (8e-3, 0.25, 0), (DIVERGING, 0.25, 0))
  good, bad = training.train(runs, text, tmp_path, NEVER)
  single = alone[8e-3, 0.25, 0]
  np.testing.assert_allclose(measured(good), measured(single), atol=1e-4)
  assert bad["status"] == "diverged" and "validation_loss" not in bad


@pytest.mark.parametrize("count", [1, 2])
def test_lanes_go_on_where_they_were_stopped(count, text, alone, tmp_path):
  points = list(alone)[:count]
  asked = itertools.count(1)
  stop = lambda: next(asked) == 4
  train = functools.partial(training.train, runs_of(ADAMW, *points), text)
  assert train(tmp_path, stop) is None
  assert checkpoint.steps_in(tmp_path) == [3]
  records = train(tmp_path, NEVER)
  for point, record in zip(points, records, strict=True):
    np.testing.assert_allclose(
      measured(record), measured(alone[point]), atol=1e-4
    )


@pytest.mark.parametrize("how", ["damaged", "of other runs"])
def test_what_cannot_be_resumed_starts_over(how, text, alone, tmp_path):
  first, second = runs_of(ADAMW, *list(alone)[:2])
  asked = itertools.count(1)
  assert (
    training.train([first], text, tmp_path, lambda: next(asked) == 4) is None
  )
  folder = tmp_path / checkpoint.FOLDER / "3"
  if how == "damaged":
    for path in (folder / "state").rglob("*"):
      if path.is_file():
        path.write_bytes(b"torn")
  run = first if how == "damaged" else second
  (record,) = training.train([run], text, tmp_path, NEVER)
  assert len(record["curve"]) == 10
  single = alone[(run.rate, run.multiplier, run.seed)]
  np.testing.assert_allclose(measured(record), measured(single), atol=1e-4)


def test_a_run_without_a_finite_loss_at_its_end_diverged(text, alone):
  """Its steps were finite, but not the loss on a text."""
  history = training_loop.History([[4.0]], [(10, [4.0])], [0])
  run = type("Run", (), {"history": history})
  config = training.program_of(runs_of(ADAMW, (1.0, 1.0, 0))[0], text)
  found = training._outcome(config, run, 0, {"test_loss": math.nan})
  assert found["status"] == "diverged" and "validation_loss" not in found


def test_programs_differ_in_what_is_not_a_number(text):
  points = (8e-3, 0.25, 0), (4e-3, 0.5, 1)
  first, second = (
    training.program_of(run, text) for run in runs_of(GALORE, *points)
  )
  assert first == second
  other = GALORE._replace(settings=("optimizer.rank=4",))
  assert training.program_of(runs_of(other, points[0])[0], text) != first
  decayed = GALORE._replace(settings=("optimizer.b2=0.95",))
  assert training.program_of(runs_of(decayed, points[0])[0], text) == first
  values = lanes.numbers(
    [training.config_of(run, text) for run in runs_of(decayed, *points)]
  )
  assert json.dumps(values["b2"].tolist()).startswith("[0.94999")
  assert values["seed"].tolist() == [0, 1]


@pytest.mark.parametrize(
  "name",
  [
    name
    if name in ("galore", "golore", "contrib_galore")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in registry.METHODS
  ],
)
def test_every_method_takes_its_numbers_as_arrays(name, text):
  variant = tables.BASELINE._replace(optimizer=name)
  run = runs_of(variant, (8e-3, 0.25, 0))[0]
  config = training.program_of(run, text)
  mesh = training.mesh_lib.make_mesh(config.mesh, 4, jax.devices()[:1])
  with jax.set_mesh(mesh):
    program = lanes.make(config, 1, mesh)
    values = lanes.numbers([training.config_of(run, text)])
    state = jax.eval_shape(program.start, values)
    rows = np.zeros((1, 4, 17), np.int32)
    after, _ = jax.eval_shape(program.advance, state, values, rows)
  kinds = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  assert kinds(after) == kinds(state)


def test_losses_that_are_not_finite_are_restored(text, tmp_path):
  """A lane may have diverged when the others are stopped."""
  runs = runs_of(ADAMW, (8e-3, 0.25, 0), (DIVERGING, 0.25, 0))
  asked = itertools.count(1)
  assert training.train(runs, text, tmp_path, lambda: next(asked) == 6) is None
  configs = [training.config_of(run, text) for run in runs]
  config = lanes.common(configs[0])
  mesh = training.mesh_lib.make_mesh(config.mesh, 4, jax.devices()[:1])
  corpus = training._corpus(config.data, config.model.vocab_size)
  with jax.set_mesh(mesh):
    program = training._program(config, 2, mesh)
    with contextlib.closing(
      training_loop.Training(program, configs, corpus, tmp_path)
    ) as resumed:
      assert resumed.history.step == 5
      assert not math.isfinite(resumed.history.losses[-1][1])
