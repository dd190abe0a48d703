"""Training steps with gradients at rank r: the weights of the usual step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.conftest import EXPERTS, QWEN, TINY, make_trainer
from train.common.errors import UserError
from train.config import presets, schema
from train.step import backward, train_step

_STEPS = 7  # the bases are refreshed at every third


def _trained(
  rows,
  *,
  lean,
  accumulate=1,
  name="galore",
  devices=1,
  model=TINY,
  **fields,
):
  """Losses of a few steps, and what made them."""
  train = schema.TrainConfig(lean=lean, accumulate=accumulate)
  if name == "q_galore":
    model = schema.ModelConfig(**vars(TINY) | {"weights": "int8"})
  # Clipping would see other norms.
  trainer = make_trainer(
    name, devices, train=train, model=model, clip=0.0, **fields
  )
  return trainer.losses(rows, _STEPS), trainer


@pytest.mark.parametrize(
  ("name", "devices", "fields"),
  [
    ("galore", 1, {}),
    ("galore", 8, {"fsdp": 2}),
    pytest.param("galore", 8, {"tensor": 4}, marks=pytest.mark.slow),
    pytest.param("galore", 1, {"proj_type": "full"}, marks=pytest.mark.slow),
    pytest.param("galore_8bit", 1, {}, marks=pytest.mark.slow),
    pytest.param("galore_lion", 1, {}, marks=pytest.mark.slow),
    pytest.param("sumo", 1, {}, marks=pytest.mark.slow),
    pytest.param("q_galore", 1, {}, marks=pytest.mark.slow),
    # With biases, norms of heads, and layers that differ.
    pytest.param("galore", 1, {"model": QWEN}, marks=pytest.mark.slow),
    pytest.param("galore", 1, {"model": EXPERTS}, marks=pytest.mark.slow),
    pytest.param(
      "galore", 8, {"model": EXPERTS, "tensor": 2}, marks=pytest.mark.slow
    ),
  ],
)
def test_lean_steps_are_usual_steps(name, devices, fields, rows):
  usual, _ = _trained(rows, lean=False, name=name, devices=devices, **fields)
  lean, _ = _trained(rows, lean=True, name=name, devices=devices, **fields)
  # Weights in eight bits are rounded at random, by equal draws.
  np.testing.assert_allclose(lean, usual, rtol=1e-3 if "q" in name else 2e-5)
  assert lean[-1] < lean[0] - 0.2


def test_parts_of_a_batch_refresh_once(rows):
  """As where GaLore itself adds up: by the first part's gradient."""
  lean = schema.TrainConfig(lean=True)
  in_parts, _ = _trained(rows, lean=True, accumulate=2)
  added_up = make_trainer("galore", 1, train=lean, clip=0.0, accumulate=2)
  added_up.train_step = train_step.make_train_step(
    added_up.tx, added_up.abstract, lean, low_rank_parts=2
  )
  np.testing.assert_allclose(in_parts, added_up.losses(rows, _STEPS), rtol=2e-5)
  assert in_parts[-1] < in_parts[0] - 0.2


def test_a_gradient_that_is_not_finite_changes_nothing(rows):
  trainer = make_trainer(
    "galore", 1, train=schema.TrainConfig(lean=True), clip=0.0
  )
  state = trainer.init()
  broken = state._replace(
    params=jax.tree.map(lambda x: x.at[..., 0].set(np.inf), state.params)
  )
  kept = jax.device_get(broken)
  with jax.set_mesh(trainer.mesh):
    new, metrics = trainer.train_step(broken, trainer.put(rows))
  assert metrics["skipped"] == 1
  for a, b in zip(
    *map(jax.tree.leaves, ((new.params, new.opt_state), kept[3:])), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_gradients_have_the_rank(rows):
  trainer = make_trainer("galore", 1, train=schema.TrainConfig(lean=True))
  find = backward.make(
    trainer.tx, trainer.abstract, schema.TrainConfig(lean=True), None, None
  )
  state = trainer.abstract.state
  run = lambda *args: find(*args, jnp.int32(0)).grads
  grads = jax.eval_shape(run, state.params, state.opt_state, rows)
  assert grads["layers"]["mlp"]["up"]["kernel"].shape == (2, 4, 48)
  assert grads["embed"]["embedding"].shape == (300, 32)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (["optimizer.name=fira"], "optimizer.name=fira needs more"),
    (["optimizer.projector=svd"], "optimizer.projector=svd needs whole"),
    (["optimizer.residual=factored"], "residual=factored needs whole"),
  ],
)
def test_refuses_what_needs_whole_gradients(settings, message):
  config = presets.lean(presets.make("sotu_small", "galore"))
  assert config.optimizer.residual == "none"
  with pytest.raises(UserError, match=message):
    schema.override(config, settings)
