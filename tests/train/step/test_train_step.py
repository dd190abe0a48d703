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
from tests.marks import slow
from tests.train.conftest import QWEN, TINY, make_trainer, weights
from train.config import schema
from train.methods import leaves, registry, transforms
from train.models import llama
from train.parallel import mesh
from train.step import backward, optimizer
from train.step import losses as losses_lib
from train.step import state as state_lib


def test_the_loss_is_the_cross_entropy_of_the_next_token(trainer, rows):
  params = trainer.init().params
  graphdef = trainer.abstract.graphdef
  losses = losses_lib.token_losses(graphdef, params, rows)
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
  one, other = (
    state_lib.init_state(trainer.tx, trainer.abstract, seed).params
    for seed in (0, 1)
  )
  same = weights(TINY)
  kernel = "layers", "attn", "q", "kernel"
  pick = functools.partial(functools.reduce, lambda tree, name: tree[name])
  assert (pick(kernel, one) == pick(kernel, same)).all()
  assert (pick(kernel, one) != pick(kernel, other)).any()


def padded(rows):
  """The rows, ends of very different lengths taken off some of them."""
  rows = np.array(rows)
  for row, length in ((1, 3), (4, 9), (5, 1), (6, 0)):
    rows[row, length:] = losses_lib.PADDING
  return rows


def test_padding_is_never_predicted(trainer, rows):
  params, graphdef = trainer.init().params, trainer.abstract.graphdef
  whole = np.array(losses_lib.token_losses(graphdef, params, rows))
  cut = np.array(losses_lib.token_losses(graphdef, params, padded(rows)))
  valid = np.array(losses_lib.is_predicted(padded(rows)))
  assert valid.sum() == 4 * 16 + 2 + 8
  np.testing.assert_allclose(cut[valid], whole[valid], rtol=1e-6)
  assert (cut[~valid] == 0).all()


def test_evaluation_leaves_out_the_padding(trainer, rows):
  params = trainer.init().params
  filled = np.array(rows)
  filled[3:] = losses_lib.PADDING
  with jax.set_mesh(trainer.mesh):
    total, count = trainer.eval_step(params, trainer.put(filled))
  expected = losses_lib.token_losses(trainer.abstract.graphdef, params, rows)[
    :3
  ]
  assert count == 3 * 16
  np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)


def test_a_batch_in_parts_has_the_gradient_of_the_whole(trainer, rows):
  params, rows = trainer.init().params, padded(rows)

  def gradient(**fields):
    chosen = schema.TrainConfig(**fields)
    return jax.jit(losses_lib.make_gradient(trainer.abstract, chosen))(
      params, rows
    )

  with jax.set_mesh(trainer.mesh):
    whole, loss, count = gradient(z_loss=0.1)
    parts, same, again = gradient(z_loss=0.1, accumulate=4)
  assert count == again == 74
  np.testing.assert_allclose(same, loss, rtol=1e-6)
  # Parts of equal weight, as a mean of means would have, are far off.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max())
    ),
    parts,
    whole,
  )


def test_an_evaluation_in_parts_adds_up_to_the_whole(trainer, rows):
  params, rows = trainer.init().params, padded(rows)
  with jax.set_mesh(trainer.mesh):
    whole, count = trainer.eval_step(params, trainer.put(rows))
    cut = losses_lib.make_eval_step(trainer.abstract, parts=4)
    parts, again = cut(params, trainer.put(rows))
    compiled = [
      run.lower(params, trainer.put(rows)).compile().memory_analysis()
      for run in (trainer.eval_step, cut)
    ]
  assert count == again == 74
  np.testing.assert_allclose(parts, whole, rtol=1e-6)
  sizes = [found.temp_size_in_bytes for found in compiled]
  assert sizes[1] < sizes[0] / 2


def test_the_z_loss_is_the_mean_square_of_the_normalizer(trainer, rows):
  params, rows = trainer.init().params, padded(rows)
  graphdef, valid = trainer.abstract.graphdef, losses_lib.is_predicted(rows)

  def expected(params):
    logits = llama.apply(graphdef, params, jnp.maximum(rows[:, :-1], 0))
    log_z = jax.nn.logsumexp(logits, axis=-1)
    losses = log_z - jnp.take_along_axis(
      logits, jnp.maximum(rows[:, 1:], 0)[..., None], -1
    )[..., 0]  # fmt: skip
    return ((losses + 0.3 * log_z**2) * valid).sum() / valid.sum()

  chosen = schema.TrainConfig(z_loss=0.3)
  with jax.set_mesh(trainer.mesh):
    gradient = jax.jit(losses_lib.make_gradient(trainer.abstract, chosen))
    found, loss, _ = gradient(params, rows)
    wanted = jax.jit(jax.grad(expected))(params)
    plain = losses_lib.token_losses(graphdef, params, rows).sum() / 74
  np.testing.assert_allclose(loss, plain, rtol=1e-6)  # without the penalty
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    found,
    wanted,
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_of_a_step_that_is_not_taken_change_no_bit(dtype):
  """Not even the sign of a zero."""
  weights = {"w": jnp.array([0.0, -0.0, 1.5, -1e-30], dtype)}
  updates = {"w": jnp.array([1.0, jnp.nan, jnp.inf, 2.0], dtype)}
  nothing = backward.or_nothing(updates, jnp.bool_(False))
  found = optax.apply_updates(weights, nothing)
  np.testing.assert_array_equal(found["w"], weights["w"])
  np.testing.assert_array_equal(
    jnp.signbit(found["w"]), jnp.signbit(weights["w"])
  )
  taken = backward.or_nothing(updates, jnp.bool_(True))
  np.testing.assert_array_equal(
    np.float32(taken["w"]), np.float32(updates["w"])
  )


def test_a_gradient_that_is_not_finite_changes_nothing(rows, monkeypatch):
  plain, poison = llama.apply_with_balance, 299

  def overflow(graphdef, params, ids, **more):
    logits, balance = plain(graphdef, params, ids, **more)
    # Infinite logits, a loss of nan.
    return logits / (ids != poison).all(), balance

  monkeypatch.setattr(llama, "apply_with_balance", overflow)
  trainer = make_trainer("galore", devices=1)
  good, bad = trainer.put(rows), np.array(rows)
  bad[3, 5] = poison
  counts, states, state = [], [], trainer.init()
  with jax.set_mesh(trainer.mesh):
    for batch in (good, good, trainer.put(bad), trainer.put(bad), good):
      state, metrics = trainer.train_step(state, batch)
      states.append(jax.device_get(state))
      counts.append((int(metrics["skips_in_row"]), int(metrics["skipped"])))
  assert counts == [(0, 0), (0, 0), (1, 1), (2, 2), (0, 2)]
  assert [int(s.step) for s in states] == [1, 2, 3, 4, 5]
  for before, after in ((states[1], states[2]), (states[1], states[3])):
    jax.tree.map(np.testing.assert_array_equal, before[3:], after[3:])
  moved = jax.tree.map(lambda a, b: (a != b).any(), states[3], states[4])
  assert all(jax.tree.leaves(moved.params))


@pytest.mark.parametrize(
  ("stored", "accumulate"),
  [("float32", 2), ("bfloat16", 1), slow("float32", 1), slow("bfloat16", 2)],
)
def test_the_computation_is_in_bfloat16_and_the_weights_keep_their_dtype(
  stored, accumulate
):
  model = dataclasses.replace(TINY, dtype="bfloat16", param_dtype=stored)
  train = schema.TrainConfig(accumulate=accumulate)
  trainer = make_trainer("galore", 1, train=train, model=model)
  batch = jax.ShapeDtypeStruct((8, 17), jnp.int32)
  with jax.set_mesh(trainer.mesh):
    lowered = trainer.train_step.lower(trainer.abstract.state, batch)
  state, metrics = lowered.out_info
  assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {stored}
  dtypes = jax.tree.map(lambda x: x.dtype, trainer.abstract.state)
  assert jax.tree.map(lambda x: x.dtype, state) == dtypes
  assert metrics["loss"].dtype == jnp.float32
  dots = [x for x in lowered.as_text().splitlines() if "dot_general" in x]
  # GaLore projects in the dtype of its gradients: other dots may be float32.
  assert sum("bf16" in x for x in dots) >= 7 * 3


MESHES = {"data": (1, 1), "fsdp": (8, 1), "tensor": (1, 4), "mixed": (2, 2)}


# A mixed mesh divides over all three axes; the others with `-m slow`.
@pytest.mark.parametrize(
  "name",
  [
    *(pytest.param(x, marks=pytest.mark.slow) for x in list(MESHES)[:3]),
    "mixed",
  ],
)
def test_many_devices_give_the_losses_of_one(trainer, name):
  fsdp, tensor = MESHES[name]
  devices = 4 if name == "tensor" else 8
  if jax.device_count() < devices:
    pytest.skip(f"needs {devices} devices, found {jax.device_count()}")
  rows = jax.random.randint(jax.random.key(2), (8, 17), 0, TINY.vocab_size)
  many = make_trainer("galore", devices, fsdp, tensor)
  # A basis is renewed in most of the 20 steps: 14 matrices, a gap of 3.
  alone, together = trainer.losses(rows, 20), many.losses(rows, 20)
  assert alone[-1] < alone[0] - 2
  np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_parts_take_the_rows_of_every_device():
  if jax.device_count() < 4:
    pytest.skip(f"needs 4 devices, found {jax.device_count()}")
  grid = mesh.make_mesh(schema.MeshConfig(fsdp=2), 16, jax.devices()[:4], 2)
  rows = np.arange(16, dtype=np.int32).reshape(16, 1)
  with jax.set_mesh(grid):
    batch = mesh.put_batch(rows, mesh.batch_sharding(grid))
    cut = jax.jit(lambda x: mesh.microbatches(x, 2))
    parts = cut(batch)
    text = cut.lower(batch).compile().as_text()
  assert sorted(np.ravel(parts)) == list(range(16))
  assert parts.sharding.shard_shape(parts.shape) == (2, 2, 1)
  for word in ("all-to-all", "collective-permute", "all-gather"):
    assert word not in text


def test_a_batch_that_its_parts_do_not_divide_is_refused():
  with pytest.raises(schema.UserError, match=r"accumulate = 3 parts .* of 3$"):
    mesh.make_mesh(schema.MeshConfig(), 8, jax.devices()[:1], 3)


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
  """Weights with all kinds of leaves: also biases, and norms of heads."""
  return weights(QWEN)


# One method of each kind of state; the others with `-m slow`.
QUICK = ("adamw", "lora", "galore", "q_galore", "apollo")


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in registry.METHODS
  ],
)
def test_every_optimizer_goes_downhill(name, params):
  """On a bowl in the space of the model's own parameters.

  The paths decide what is projected, and a step compiles in no time.
  """
  rate = {"sgd": 0.1, "galore_sgd": 0.1}.get(name, 1e-2)
  chosen = schema.OptimizerConfig(
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
  tx = optimizer.make_optimizer(schema.OptimizerConfig(**settings), steps=10)
  params = llama.init(TINY, 0)
  grads = jax.tree.map(jnp.ones_like, params)
  state = tx.init(params)
  for _ in range(2):  # the rate is 0 at the first step of the warm-up
    updates, state = tx.update(grads, state, params)
  return params, updates


def test_the_factor_scales_the_matrices_and_nothing_else():
  params, plain = _update()
  _, scaled = _update(matrix_lr=0.25)
  is_matrix = leaves.block_matrices(params)
  assert sum(jax.tree.leaves(is_matrix)) == 7
  jax.tree.map(
    lambda matrix, a, b: np.testing.assert_allclose(
      b, a * (0.25 if matrix else 1), rtol=1e-6
    ),
    is_matrix,
    plain,
    scaled,
  )


def test_norms_and_biases_do_not_decay(params):
  flags = leaves.decayed(params)
  for name in ("q", "k", "v", "o"):
    kind = flags["layers"]["attn"][name]
    assert kind == {"kernel": True, "bias": False}
  assert not flags["layers"]["attn"]["q_norm"]["scale"]
  params, plain = _update()
  _, decayed = _update(weight_decay=0.5)
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), plain, decayed)
  assert not changed["norm"]["scale"]
  assert not changed["layers"]["attn_norm"]["scale"]
  assert changed["layers"]["attn"]["q"]["kernel"]
  assert changed["embed"]["embedding"]
  del params


def test_the_schedule_warms_up_and_ends_at_its_fraction():
  settings = schema.OptimizerConfig(learning_rate=2.0, warmup=0.1, final=0.1)
  schedule = optimizer.make_schedule(settings, 100)
  np.testing.assert_allclose(schedule(5), 1.0)
  np.testing.assert_allclose(schedule(10), 2.0)
  np.testing.assert_allclose(schedule(100), 0.2, rtol=1e-5)


def test_unstacked_layers_take_the_same_steps_as_stacked_ones(rows):
  params = llama.init(TINY, 0)
  tx = optax.adam(1e-3)
  cut = transforms.unstacked(tx)
  grads = jax.tree.map(jnp.cos, params)
  plain, _ = tx.update(grads, tx.init(params), params)
  apart, state = cut.update(grads, cut.init(params), params)
  jax.tree.map(np.testing.assert_array_equal, plain, apart)
  moments = optax.tree.get(state, "mu")["layers"]["attn"]["q"]["kernel"]
  assert [m.shape for m in moments] == [(32, 32)] * 2


@pytest.mark.parametrize("field", [{"moments": "ldadam"}, {"accumulate": 2}])
def test_accounting_leaves_out_what_only_galore_knows(field):
  chosen = schema.OptimizerConfig(name="galore", rank=4, **field)
  params = jax.eval_shape(lambda: llama.init(TINY, 0))
  found = optimizer.accounting(chosen, params, 0)
  plain = dataclasses.replace(chosen, moments="rotate", accumulate=1)
  assert found["adamw"] == optimizer.accounting(plain, params, 0)["adamw"]


def test_no_warm_up_begins_at_the_peak():
  for decay in ("cosine", "linear"):
    chosen = schema.OptimizerConfig(warmup=0.0, decay=decay)  # type: ignore
    schedule = optimizer.make_schedule(chosen, 100)
    assert schedule(0) == pytest.approx(chosen.learning_rate)


def test_accounting_counts_what_the_states_take():
  params = llama.init(TINY, 0)
  chosen = schema.OptimizerConfig(name="galore_lion", rank=4)
  own = optimizer.make_optimizer(chosen, 100).init(params)
  own_bytes = galore_optax.state_bytes(own)
  found = optimizer.accounting(chosen, params, own_bytes)
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  assert 2 * size < found["adamw"] < 2 * size + 64
  assert list(found) == [
    "adamw", "optax.contrib.galore", "this run (galore_lion)"
  ]  # fmt: skip
  assert found["this run (galore_lion)"] == own_bytes
  # Without clashes of size: the two projected methods differ from AdamW by
  # the block matrices only.
  matrices = [
    x
    for x, matrix in zip(
      jax.tree.leaves(params),
      jax.tree.leaves(leaves.block_matrices(params)),
      strict=True,
    )
    if matrix
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
    schema.OptimizerConfig(), name="galore_faithful", moments="reset"
  )
  with pytest.raises(schema.UserError, match="galore_faithful"):
    optimizer.make_optimizer(chosen, 10)


@pytest.mark.parametrize("name", ["gum", "ldadam"])
@pytest.mark.parametrize(
  "fields", [{"moments": "keep"}, {"random_from": 5}, {"refresh": "adaptive"}]
)
def test_what_a_method_has_no_use_for_is_refused(name, fields):
  chosen = schema.OptimizerConfig(name=name, **fields)
  with pytest.raises(schema.UserError, match=next(iter(fields))):
    optimizer.make_optimizer(schema.Config("", optimizer=chosen).optimizer, 10)


def test_gum_does_not_go_layer_by_layer():
  with pytest.raises(schema.UserError, match=r"train\.layerwise.*use sumo"):
    schema.Config(
      "",
      optimizer=schema.OptimizerConfig(name="gum"),
      train=schema.TrainConfig(layerwise=True),
    )


def test_golore_is_galore_with_random_bases_from_half_of_the_run():
  params = {
    "layers": {"w": {"kernel": jnp.ones((2, 8, 16))}},
    "norm": {"scale": jnp.ones(8)},
  }

  def program(**fields):
    chosen = schema.OptimizerConfig(rank=2, **fields)
    tx = optimizer.make_optimizer(chosen, steps=10)
    return str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))

  half = program(name="golore")
  assert half == program(name="galore", random_from=5)
  assert half != program(name="galore", random_from=6)
  assert program(name="golore", random_from=6) != half
