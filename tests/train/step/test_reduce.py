"""Lean steps whose sums over devices are sent in eight bits."""

import jax
import numpy as np
import optax
import pytest

from galore_optax import find_bases
from galore_optax.tree import paths
from tests.train.conftest import make_trainer
from train.common.errors import UserError
from train.config import presets, schema
from train.step import train_step

LEAN = schema.TrainConfig(lean=True)


@pytest.fixture(scope="module")
def trainer():
  """Eight devices. Clipping would see other norms."""
  return make_trainer("galore", 8, train=LEAN, clip=0.0, reduce="int8")


def _steps(trainer, state, rows, count):
  with jax.set_mesh(trainer.mesh):
    for _ in range(count):
      state, metrics = trainer.train_step(state, trainer.put(rows))
  return state, metrics


def _moments(state):
  """Path to first moment; after one step a tenth of the gradient."""
  mu = optax.tree.get(state.opt_state, "mu")
  return paths.leaves_by_path((mu.low, mu.full))


def test_a_step_is_the_usual_one_within_the_rounding(trainer, rows):
  usual = make_trainer("galore", 1, train=LEAN, clip=0.0)
  steps = jax.device_get(
    [_steps(t, t.init(), rows, 1) for t in (trainer, usual)]
  )
  states, metrics = zip(*steps, strict=True)
  np.testing.assert_allclose(metrics[0]["loss"], metrics[1]["loss"], rtol=1e-6)
  np.testing.assert_allclose(
    metrics[0]["grad_norm"], metrics[1]["grad_norm"], rtol=0.01
  )
  assert metrics[0]["tokens"] == metrics[1]["tokens"]
  # Bases are found from sums in float32.
  bases = [find_bases(x.opt_state) for x in states]
  for a, b in zip(*map(jax.tree.leaves, bases), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)
  int8, exact = map(_moments, states)
  assert len(int8) == len(exact) == 12
  for path, x in exact.items():
    error = np.linalg.norm(int8[path] - x) / np.linalg.norm(x)
    assert 1e-4 < error < 0.05, path


def test_devices_stay_alike_and_a_run_repeats_itself(trainer, rows):
  """To the bit; the second half of a run goes on from the host's copy."""
  straight, metrics = _steps(trainer, trainer.init(), rows, 6)
  assert metrics["loss"] < 4.6  # of 5.7
  for x in jax.tree.leaves(straight):
    for shard in x.addressable_shards:
      np.testing.assert_array_equal(shard.data, x.addressable_shards[0].data)
  half = jax.device_get(_steps(trainer, trainer.init(), rows, 3)[0])
  half = jax.device_put(half, trainer.abstract.shardings)
  again, _ = _steps(trainer, half, rows, 3)
  jax.tree.map(np.testing.assert_array_equal, straight, again)


def test_a_gradient_that_is_not_finite_on_one_device_changes_nothing(
  trainer, rows
):
  state = trainer.init()
  rows = rows.at[3, 5].set(60)  # a token of no other row
  table = state.params["embed"]["embedding"]
  state.params["embed"]["embedding"] = table.at[60].set(np.inf)
  kept = jax.device_get(state)
  new, metrics = _steps(trainer, state, rows, 1)
  assert metrics["skipped"] == 1
  for a, b in zip(
    *map(jax.tree.leaves, ((new.params, new.opt_state), kept[3:])), strict=True
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["train", "optimizer"])
def test_parts_of_a_batch(by, rows):
  """Two rows a device, one after the other."""
  twice = np.repeat(rows, 2, axis=0)
  usual = make_trainer("galore", 8, train=LEAN, clip=0.0)
  parts = 2 if by == "train" else 1
  train = schema.TrainConfig(lean=True, accumulate=parts)
  trainer = make_trainer(
    "galore", 8, train=train, clip=0.0, reduce="int8", accumulate=3 - parts
  )
  trainer.train_step = train_step.make_train_step(
    trainer.tx, trainer.abstract, train, 3 - parts, reduce="int8"
  )
  np.testing.assert_allclose(
    trainer.losses(twice, 7), usual.losses(rows, 7), rtol=0.02
  )


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (["train.lean=false"], "train.lean is false; give --lean"),
    (["train.layerwise=true"], "leave train.layerwise false"),
    (["mesh.fsdp=2"], "mesh.fsdp is 2; set mesh.fsdp=1"),
    (["mesh.tensor=4"], "mesh.tensor is 4; set mesh.tensor=1"),
    (
      ["model.n_experts=4", "model.family=mixtral"],
      "model.n_experts is 4, .* leave mesh.reduce",
    ),
  ],
)
def test_refuses_what_it_cannot_add_up(settings, message):
  config = presets.lean(presets.make("sotu_small", "galore"))
  config = schema.override(config, ["mesh.reduce=int8", "mesh.data=8"])
  assert config.mesh.reduce == "int8"
  with pytest.raises(UserError, match=f"mesh.reduce=int8 .*{message}"):
    schema.override(config, settings)


def test_settings_of_several_groups_are_checked_together():
  config = presets.make("sotu_small", "galore")
  settings = ["mesh.reduce=int8", "optimizer.residual=none", "train.lean=true"]
  assert schema.override(config, settings).mesh.reduce == "int8"
