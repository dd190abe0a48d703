import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from tests.train.conftest import TINY, make_trainer
from train import config, llama, optimizer, step


def test_the_loss_is_the_cross_entropy_of_the_next_token(trainer, rows):
  params = trainer.init().params
  graphdef = trainer.placed.graphdef
  losses = step.token_losses(graphdef, params, rows)
  assert losses.shape == (8, 16)
  logits = llama.apply(graphdef, params, rows)
  expected = -jax.nn.log_softmax(logits[2, 5])[rows[2, 6]]
  np.testing.assert_allclose(losses[2, 5], expected, rtol=1e-5)


def test_training_learns_consumes_its_state_and_compiles_once(trainer, rows):
  state = trainer.init()
  first = state
  with jax.set_mesh(trainer.mesh):
    for _ in range(12):
      state, metrics = trainer.train_step(state, trainer.put(rows))
      losses = float(metrics["loss"])
  assert losses < math.log(TINY.vocab_size) - 1.0
  assert int(state.step) == 12
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.opt_state))
  assert trainer.train_step._cache_size() == 1


def test_a_seed_makes_the_same_weights_and_another_makes_others(trainer):
  one, same, other = (trainer.init(seed).params for seed in (0, 0, 1))
  kernel = "layers", "attn", "q", "kernel"
  pick = functools.partial(functools.reduce, lambda tree, name: tree[name])
  assert (pick(kernel, one) == pick(kernel, same)).all()
  assert (pick(kernel, one) != pick(kernel, other)).any()


def test_evaluation_leaves_out_the_filling(trainer, rows):
  params = trainer.init().params
  weights = np.array([1, 1, 1, 0, 0, 0, 0, 0], np.float32)
  with jax.set_mesh(trainer.mesh):
    total, count = trainer.eval_step(
      params, trainer.put(rows), trainer.put(weights)
    )
  expected = step.token_losses(trainer.placed.graphdef, params, rows)[:3]
  assert count == 3 * 16
  np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)


@pytest.mark.parametrize("fsdp, tensor", [(1, 1), (2, 2)])
def test_eight_devices_give_the_losses_of_one(trainer, rows, fsdp, tensor):
  if jax.device_count() < 8:
    pytest.skip(f"needs 8 devices, found {jax.device_count()}")
  many = make_trainer("galore", 8, fsdp, tensor)
  alone, together = trainer.losses(rows, 6), many.losses(rows, 6)
  np.testing.assert_allclose(together, alone, rtol=2e-4)


def test_weights_and_moments_are_sharded_over_fsdp_and_tensor():
  if jax.device_count() < 8:
    pytest.skip(f"needs 8 devices, found {jax.device_count()}")
  trainer = make_trainer("adamw", 8, fsdp=2, tensor=2)
  state = trainer.init()
  for tree in (state.params, optax.tree.get(state.opt_state, "mu")):
    up = tree["layers"]["mlp"]["up"]["kernel"]
    table = tree["embed"]["embedding"]
    assert up.addressable_shards[0].data.shape == (2, 16, 24)
    assert table.addressable_shards[0].data.shape == (75, 32)


@pytest.fixture(scope="module")
def params():
  return llama.init(TINY, 0)


# On a bowl in the space of the model's own parameters: the paths decide what
# is projected, and a step compiles in no time.
@pytest.mark.parametrize("name", config.OPTIMIZERS)
def test_every_optimizer_goes_downhill(name, params):
  rate = {"sgd": 0.1, "galore_sgd": 0.1}.get(name, 1e-2)
  chosen = config.OptimizerConfig(
    name=name, learning_rate=rate, rank=8, update_proj_gap=2, scale=1.0
  )
  tx = optimizer.make_optimizer(chosen, steps=20)

  def distance(tree):
    return optax.tree.norm(optax.tree.sub(tree, params), squared=True) / 2

  @jax.jit
  def descend(tree, state):
    updates, state = tx.update(jax.grad(distance)(tree), state, tree)
    return optax.apply_updates(tree, updates), state

  tree = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size) ** 1.5)
                      .reshape(x.shape), params)  # fmt: skip
  start, state = tree, tx.init(tree)
  for _ in range(8):
    tree, state = descend(tree, state)
  for before, after, goal in zip(
    *map(jax.tree.leaves, (start, tree, params)), strict=True
  ):
    assert jnp.linalg.norm(after - goal) < 0.97 * jnp.linalg.norm(before - goal)


def _update(**fields):
  settings: Any = {"name": "adamw", "clip": 0.0, "warmup": 0.0} | fields
  tx = optimizer.make_optimizer(config.OptimizerConfig(**settings), steps=10)
  params = llama.init(TINY, 0)
  grads = jax.tree.map(jnp.ones_like, params)
  state = tx.init(params)
  for _ in range(2):  # the rate is 0 at the first step of the warm-up
    updates, state = tx.update(grads, state, params)
  return params, updates


def test_the_factor_scales_the_matrices_and_nothing_else():
  params, plain = _update()
  _, scaled = _update(matrix_lr=0.25)
  hits = optimizer.matrices(params)
  assert sum(jax.tree.leaves(hits)) == 7
  jax.tree.map(
    lambda hit, a, b: np.testing.assert_allclose(
      b, a * (0.25 if hit else 1), rtol=1e-6
    ),
    hits,
    plain,
    scaled,
  )


def test_norms_do_not_decay():
  params, plain = _update()
  _, decayed = _update(weight_decay=0.5)
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), plain, decayed)
  assert not changed["norm"]["scale"]
  assert not changed["layers"]["attn_norm"]["scale"]
  assert changed["layers"]["attn"]["q"]["kernel"]
  assert changed["embed"]["embedding"]
  del params


def test_the_schedule_warms_up_and_ends_at_its_fraction():
  settings = config.OptimizerConfig(learning_rate=2.0, warmup=0.1, final=0.1)
  schedule = optimizer.make_schedule(settings, 100)
  np.testing.assert_allclose(schedule(5), 1.0)
  np.testing.assert_allclose(schedule(10), 2.0)
  np.testing.assert_allclose(schedule(100), 0.2, rtol=1e-5)


def test_unstacked_layers_take_the_same_steps_as_stacked_ones(rows):
  params = llama.init(TINY, 0)
  tx = optax.adam(1e-3)
  cut = optimizer.unstacked(tx)
  grads = jax.tree.map(jnp.cos, params)
  plain, _ = tx.update(grads, tx.init(params), params)
  apart, state = cut.update(grads, cut.init(params), params)
  jax.tree.map(np.testing.assert_array_equal, plain, apart)
  moments = optax.tree.get(state, "mu")["layers"]["attn"]["q"]["kernel"]
  assert [m.shape for m in moments] == [(32, 32)] * 2


def test_accounting_counts_what_the_states_take():
  params = llama.init(TINY, 0)
  chosen = config.OptimizerConfig(name="galore_lion", rank=4)
  found = optimizer.accounting(chosen, params)
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  assert 2 * size < found["adamw"] < 2 * size + 64
  assert list(found) == [
    "adamw", "optax.contrib.galore", "this run (galore_lion)"
  ]  # fmt: skip
  own = optimizer.make_optimizer(chosen, 100).init(params)
  assert found["this run (galore_lion)"] == galore_optax.state_bytes(own)
  # Without clashes of size: the two projected methods differ from AdamW by
  # the block matrices only.
  matrices = [
    x
    for x, hit in zip(
      jax.tree.leaves(params),
      jax.tree.leaves(optimizer.matrices(params)),
      strict=True,
    )
    if hit
  ]
  saved = found["adamw"] - found["optax.contrib.galore"]
  long_side = [
    m.shape[0] * (4 * max(m.shape[1:]) + 8 * min(m.shape[1:])) * 4
    for m in matrices
  ]
  expected = sum(2 * m.nbytes for m in matrices) - sum(long_side)
  assert abs(saved - expected) <= 16


def test_options_that_exclude_one_another_are_refused():
  chosen = dataclasses.replace(
    config.OptimizerConfig(), name="galore_faithful", moments="reset"
  )
  with pytest.raises(config.UserError, match="galore_faithful"):
    optimizer.make_optimizer(chosen, 10)
