"""Moments that are stored in bfloat16, against float64 references."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import galore, galore_adamw, state_bytes
from galore_optax.inner import storage
from galore_optax.quantization import bfloat16
from galore_optax.tree import split

pytestmark = [
  pytest.mark.filterwarnings("ignore:galore projects none"),
  pytest.mark.filterwarnings("ignore:More matrices than"),
]
BFLOAT16 = jnp.dtype(jnp.bfloat16)
B1, B2 = 0.9, 0.999
HOW = {"rank": 4, "update_proj_gap": 2, "refresh": "synchronous"}
TX = galore_adamw(1e-3, **HOW)
SUMS = galore(optax.scale_by_adam(), accumulation_steps=3, **HOW)
# Elements of a leaf at full rank that all have the same gradient.
COPIES = 4096
MATRICES = 24  # equal ones


def wide(x):
  return np.asarray(x.astype(jnp.float32), np.float64)


def dtypes(tree):
  return {x.dtype for x in jax.tree.leaves(tree)}


def moments_after(grads, dtype, tx):
  """Adam's moments of equal elements after steps with these gradients."""
  params = {"bias": jnp.zeros(COPIES, dtype)}

  def step(state, g):
    g = {"bias": jnp.full(COPIES, g)}
    return tx.update(g, state, params)[1], None

  state = jax.jit(lambda s: jax.lax.scan(step, s, grads)[0])(tx.init(params))
  return (optax.tree.get(state, name) for name in ("mu", "nu"))


def reference(grads):
  """The moments in float64."""
  mu = nu = 0.0
  for g in np.asarray(grads, np.float64):
    mu, nu = B1 * mu + (1 - B1) * g, B2 * nu + (1 - B2) * g * g
  return mu, nu


def test_second_moment_of_a_constant_gradient():
  """It reaches g²; rounded to the nearest, it stops far below."""
  grads = jnp.full(5000, 2.0**-8, BFLOAT16)
  adam = optax.scale_by_adam(B1, B2)
  _, plain = moments_after(grads, BFLOAT16, adam)
  assert wide(plain["bias"]).max() <= 0.5 * 2.0**-16
  mu, nu = moments_after(grads, BFLOAT16, galore(adam, rank=4))
  (mu,), (nu,) = jax.tree.leaves(mu), jax.tree.leaves(nu)
  assert nu.dtype == mu.dtype == BFLOAT16
  _, wanted = reference(grads)
  assert wide(nu).mean() == pytest.approx(wanted, rel=3e-4)
  # The last bit of bfloat16 is between 1/256 and 1/128 of a number.
  assert wide(nu).std() < wanted / 128
  assert wide(mu).mean() == pytest.approx(2.0**-8, rel=3e-4)


def test_mean_of_rounded_moments_is_the_exact_one():
  """Also where the gradient shrinks, and the second moment has to decay."""
  noise = np.random.default_rng(0).normal(size=3000)
  grads = jnp.asarray(noise * np.where(np.arange(3000) < 1000, 1, 0.01))
  tx = galore(optax.scale_by_adam(B1, B2), rank=4)
  for moment, exact in zip(
    moments_after(grads, BFLOAT16, tx), reference(grads), strict=True
  ):
    found = wide(jax.tree.leaves(moment)[0])
    error = found.std() / COPIES**0.5
    assert 0 < error < 0.01 * abs(exact)
    assert abs(found.mean() - exact) < 5 * error
    assert found.std() < 0.2 * abs(exact)


def problem(dtype=BFLOAT16):
  params = {
    "w": jnp.ones((MATRICES, 12, 32), dtype),
    "bias": jnp.ones(32, dtype),
    "norm": jnp.ones(32),
  }
  like = jax.random.normal(jax.random.key(0), (12, 32))
  grads = {
    "w": jnp.broadcast_to(like, (MATRICES, 12, 32)).astype(dtype),
    "bias": like[0].astype(dtype),
    "norm": like[1],
  }
  return params, grads


def run(tx, steps, state=None):
  params, grads = problem()
  state = tx.init(params) if state is None else state
  update = jax.jit(tx.update)
  for i in range(steps):
    turned = {**grads, "w": jnp.roll(grads["w"], i, axis=1)}
    updates, state = update(turned, state, params)
  return updates, state


def test_dtype_of_each_leaf():
  """bfloat16 weights have bfloat16 moments, others float32 ones."""
  _, state = run(TX, 2)
  for name in ("mu", "nu"):
    tree = optax.tree.get(state, name)
    assert tree.low["w"].dtype == tree.full["bias"].dtype == BFLOAT16
    assert tree.full["norm"].dtype == jnp.float32
  assert dtypes(state.projector) == {jnp.dtype(jnp.float32)}


def test_a_dtype_that_the_inner_optimizer_asks_for():
  tx = galore_adamw(1e-3, rank=4, mu_dtype="float32")
  _, state = run(tx, 1)
  assert dtypes(optax.tree.get(state, "mu")) == {jnp.dtype(jnp.float32)}
  assert optax.tree.get(state, "nu").low["w"].dtype == BFLOAT16


def test_hyperparameters_in_the_inner_state_keep_float32():
  inner = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
  _, state = run(galore(inner, rank=4), 2)
  rate = optax.tree.get(state, "learning_rate")
  assert rate == jnp.float32(1e-3)
  assert optax.tree.get(state, "nu").low["w"].dtype == BFLOAT16


def test_moments_carried_into_new_bases_are_rounded_at_random():
  """Equal matrices differ in rounding alone, and their mean is exact."""
  params, grads = problem()
  _, state = run(SUMS, 6)

  def equal(x, dtype=BFLOAT16):
    is_moment = x.shape[:1] == (MATRICES,) and x.dtype == BFLOAT16
    return jnp.broadcast_to(x[:1], x.shape).astype(dtype) if is_moment else x

  state = jax.tree.map(equal, state)
  exact = jax.tree.map(lambda x: equal(x, jnp.float32), state)
  turned = {**grads, "w": jnp.roll(grads["w"], 5, axis=1)}
  # The first of three gradients: bases are refreshed, and no step is made.
  new, wanted = (
    jax.jit(SUMS.update)(turned, s, params)[1] for s in (state, exact)
  )
  for name in ("mu", "nu"):
    before, found, right = (
      wide(optax.tree.get(s, name).low["w"]) for s in (state, new, wanted)
    )
    assert np.abs(right - before).max() > 0.1 * np.abs(before).max()
    ulp = np.abs(right) / 2.0**7  # at most
    assert (np.abs(found - right) <= ulp).all()
    assert (found.std(0) > 0).mean() > 0.7
    # Of a draw, the standard deviation is at most half of the last bit.
    error = np.abs((found - right).mean(0)) / (ulp[0] / 2 / MATRICES**0.5)
    assert error.max() < 5


def test_a_state_with_float32_moments_goes_on_with_them():
  """As checkpoints of bfloat16 weights from before have them."""
  old = galore_adamw(1e-3, state_dtype="float32", **HOW)
  _, state = run(old, 2)
  found, wanted = run(TX, 2, state), run(old, 2, state)
  assert BFLOAT16 not in dtypes(found[1])
  for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    np.testing.assert_array_equal(x, y)


def test_sums_of_microbatches():
  _, state = run(SUMS, 2)
  assert state.accumulator.low["w"].dtype == BFLOAT16
  _, whole = run(SUMS, 2, SUMS.init(problem(jnp.float32)[0]))
  found = wide(state.accumulator.low["w"])
  right = wide(whole.accumulator.low["w"])
  assert found.std(0).max() > 0
  assert np.abs((found - right).mean(0)).max() < np.abs(right).max() / 256
  _, state = run(SUMS, 1, state)
  assert not any(x.any() for x in jax.tree.leaves(state.accumulator))


def test_one_layer_is_rounded_as_in_the_stack():
  stack = jax.random.normal(jax.random.key(0), (3, 8, 16))
  like = stack.astype(BFLOAT16)
  trees = lambda x: split.Split({"w": x}, {"w": optax.MaskedNode(), "b": x})
  key = bfloat16.step_key("moments", 0, 4)
  whole = storage.narrow((trees(stack),), (trees(like),), {}, key)
  for i in range(3):
    part = storage.narrow(
      (trees(stack[i]),), (trees(like[i]),), {}, key, jnp.int32(i)
    )
    for x, y in zip(*map(jax.tree.leaves, (part, whole)), strict=True):
      np.testing.assert_array_equal(wide(x), wide(y[i]))
  assert len(set(map(str, map(wide, jax.tree.leaves(whole))))) == 2


def test_state_is_half_of_that_in_float32():
  params = {"w": jnp.ones((512, 2048), BFLOAT16)}
  sizes = [
    state_bytes(galore_adamw(1e-3, rank=64, **how).init(params))
    for how in ({}, {"state_dtype": "float32"})
  ]
  moments = 2 * 64 * 2048
  assert sizes[1] - sizes[0] == 2 * moments
