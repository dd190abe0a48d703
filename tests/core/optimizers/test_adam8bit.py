"""Adam with moments in eight bits, next to Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  adamw_8bit,
  dequantize,
  galore,
  galore_adamw,
  galore_adamw_8bit,
  scale_by_adam_8bit,
  state_bytes,
)
from galore_optax.quantization import qarray

SHAPES = {"bias": (96,), "kernel": (64, 96)}


def normal(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray(rng.normal(size=shape), jnp.float32)
    for name, shape in sorted(shapes.items())
  }


def kinds(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def train(tx, steps):
  """Losses of a noisy quadratic of badly scaled coordinates."""
  target = normal(SHAPES)
  size = {k: 10 ** (x / 2) for k, x in normal(SHAPES, 1).items()}

  def step(carry, key):
    params, state = carry
    off = jax.tree.map(jnp.subtract, params, target)
    noise = optax.tree.random_like(key, off)
    grads = jax.tree.map(lambda s, x, n: s * (x + n), size, off, noise)
    updates, state = tx.update(grads, state, params)
    loss = sum(jnp.mean(x**2) for x in off.values())
    return (optax.apply_updates(params, updates), state), (loss, updates)

  params = jax.tree.map(jnp.zeros_like, target)
  keys = jax.random.split(jax.random.key(0), steps)
  run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))
  return run((params, tx.init(params)))[1]


RATES = optax.linear_schedule(0.1, 0.0, 50)


def test_close_to_adam_for_fifty_steps():
  losses, updates = train(adamw_8bit(RATES, weight_decay=0.0), 50)
  expected, wanted = train(optax.adam(RATES), 50)
  assert expected[-1] < 0.3 * expected[0]
  np.testing.assert_allclose(losses, expected, rtol=0.03)
  off = np.sqrt(np.sum((updates["kernel"] - wanted["kernel"]) ** 2))
  size = np.sqrt(np.sum(wanted["kernel"] ** 2))
  assert 1e-4 < off / size < 0.1
  # Too small to be kept in eight bits, and so exactly Adam's.
  np.testing.assert_allclose(updates["bias"], wanted["bias"], atol=1e-6)


def test_low_rank_moments_are_carried_over_to_new_bases():
  """8-bit GaLore is close to GaLore while bases change."""
  settings = {"rank": 32, "update_proj_gap": 5, "scale": 1.0}
  settings |= {"weight_decay": 0.0}
  losses, updates = train(galore_adamw_8bit(RATES, **settings), 30)
  expected, wanted = train(galore_adamw(RATES, **settings), 30)
  np.testing.assert_allclose(losses, expected, rtol=0.03)
  off = np.sqrt(np.sum((updates["kernel"] - wanted["kernel"]) ** 2))
  assert off / np.sqrt(np.sum(wanted["kernel"] ** 2)) < 0.15


def test_moments_are_codes_of_a_byte():
  params = {"bias": jnp.zeros(4096), "kernel": jnp.zeros((1376, 512))}
  state = scale_by_adam_8bit().init(params)
  assert state.mu["kernel"].codes.dtype == jnp.int8
  assert state.nu["kernel"].codes.dtype == jnp.uint8
  codes = 1376 * 512 + 4096
  scales = 6 * 512 + 16
  assert state_bytes(state) == 2 * (codes + 4 * scales) + 4
  wide = scale_by_adam_8bit(min_size=4097).init(params)
  assert wide.mu["bias"].dtype == jnp.float32
  assert state_bytes(wide) == state_bytes(state) + 2 * (3 * 4096 - 4 * 16)
  assert scale_by_adam_8bit(min_size=0).init(params).mu["bias"].kind


TX = scale_by_adam_8bit(min_size=0)
update = jax.jit(TX.update)


def test_where_gradients_stop_steps_stay_small():
  """However small they were, and whatever the others do from then on."""
  shape = (4, 256)
  rng = np.random.default_rng(0)
  before = 10.0 ** rng.uniform(-8, 0, shape) * rng.choice([-1, 1], shape)
  state = TX.init(jnp.zeros(shape))
  for i in range(300):
    g = before * (1 + 0.1 * rng.normal(size=shape))
    if i >= 20:
      g[:, 1::2] = 0
      g[2] *= 100  # which takes the others' second moments below the codes
      g[3] *= 0.01
    steps, state = update(jnp.asarray(g, jnp.float32), state)
    assert np.abs(steps).max() < 3.5
  stopped = np.abs(steps[:, 1::2])
  assert np.median(stopped) < 0.05


def test_an_element_without_a_gradient_does_not_move():
  g = jnp.ones((4, 256)).at[:, 7].set(0)
  state = TX.init(g)
  for _ in range(5):
    steps, state = update(g, state)
    np.testing.assert_array_equal(steps[:, 7], 0)
    np.testing.assert_allclose(steps[:, 8], 1, rtol=0.02)


def test_a_lost_second_moment_counts_as_half_of_the_smallest():
  g = jnp.ones((256, 1)).at[0].set(1e-5)
  state = TX.init(g)
  _, state = update(g, state)
  assert dequantize(state.nu)[0] == 0
  assert dequantize(state.mu)[0] > 0
  least = float(qarray.elementwise_scale(state.nu)[0, 0]) * 1.625e-7
  steps, _ = update(0 * g, state)
  m = 0.9 * float(dequantize(state.mu)[0, 0]) / (1 - 0.9**2)
  v = 0.999 * least / (1 - 0.999**2)
  np.testing.assert_allclose(steps[0, 0], m / np.sqrt(v), rtol=1e-3)


def test_dtypes_of_gradients_do_not_change_the_state():
  for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
    g = {name: x.astype(dtype) for name, x in normal(SHAPES).items()}
    tx = scale_by_adam_8bit()
    state = tx.init(g)
    steps, after = jax.eval_shape(tx.update, g, state)
    assert jax.tree.map(lambda x: x.dtype, steps) == {
      "bias": dtype,
      "kernel": dtype,
    }
    assert kinds(after) == kinds(state)


INNERS = {
  "partition": lambda: optax.partition(
    {"a": TX, "b": optax.sgd(0.1)}, {"bias": "b", "kernel": "a"}
  ),
  "MultiSteps": lambda: optax.MultiSteps(TX, 2).gradient_transformation(),
  "inject_hyperparams": lambda: optax.inject_hyperparams(
    adamw_8bit, static_args="min_size"
  )(optax.linear_schedule(1e-2, 0.0, 9), min_size=16),
}


@pytest.mark.parametrize("name", INNERS)
def test_as_an_inner_optimizer(name):
  tx = galore(INNERS[name](), rank=4, update_proj_gap=1)
  params = normal(SHAPES)
  state, step = tx.init(params), jax.jit(tx.update)
  codes = [x for x in jax.tree.leaves(state) if x.dtype == jnp.int8]
  assert (4, 96) in {x.shape for x in codes}
  for seed in range(3):
    steps, after = step(normal(SHAPES, seed), state, params)
    assert kinds(after) == kinds(state)
    state = after
  assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(steps))
  assert jnp.any(steps["kernel"] != 0) or name == "MultiSteps"


def test_errors():
  with pytest.raises(ValueError, match=r"`min_size` must not be neg.*got -1"):
    scale_by_adam_8bit(min_size=-1)
  with pytest.raises(TypeError, match=r"`min_size` must be a number"):
    scale_by_adam_8bit(min_size="4096")
  traced = lambda size: scale_by_adam_8bit(min_size=size).init(jnp.ones(4))
  with pytest.raises(ValueError, match=r"`min_size` decides.*static_args"):
    jax.jit(traced)(4096)


def test_projections_too_small_for_codes_of_leaves_that_are_not():
  """Decay of the full weights, with moments of the projection in float32."""
  params = {"w": normal({"w": (64, 96)})["w"]}  # 6144 entries, but 4 x 96
  ours = galore_adamw_8bit(1e-2, rank=4, weight_decay=0.1)
  plain = galore_adamw(1e-2, rank=4, weight_decay=0.1)
  found, wanted = (
    tx.update(params, tx.init(params), params)[0] for tx in (ours, plain)
  )
  np.testing.assert_allclose(found["w"], wanted["w"], atol=1e-6)
