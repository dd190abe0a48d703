"""Several gradients to a step, added up at low rank."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  Refresh,
  captured_energy,
  galore,
  galore_adamw_8bit,
  state_bytes,
)

SHAPES = {"bias": (24,), "stack": (2, 16, 24), "w": (24, 16)}
K, STEPS = 3, 8
RATE = optax.linear_schedule(1e-2, 1e-3, STEPS)


def normal(seed):
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray(rng.normal(size=shape), jnp.float32)
    for name, shape in SHAPES.items()
  }


def tx(steps=1, inner=None, **options):
  inner = inner or optax.adamw(RATE, weight_decay=0.1)
  settings = {"rank": 4, "update_proj_gap": 2, "accumulation_steps": steps}
  return galore(inner, **{**settings, **options})


def micro_gradients(same_first):
  """(steps, k, ...) gradients; the first of a step may be their mean."""
  each = [normal(i) for i in range(STEPS * K)]
  grads = jax.tree.map(
    lambda *x: jnp.stack(x).reshape(STEPS, K, *x[0].shape), *each
  )
  if not same_first:
    return grads
  return jax.tree.map(lambda x: x.at[:, 0].set(x[:, 1:].mean(1)), grads)


@functools.cache
def scanned(optimizer):
  """Compiled: parameters, state and updates after each of the gradients."""

  def step(carry, grads):
    params, state = carry
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), (params, updates, state.step)

  return jax.jit(lambda carry, grads: jax.lax.scan(step, carry, grads))


def flat(grads):
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), grads)


OURS = tx(K)


@functools.cache
def accumulated():
  params, grads = normal(99), micro_gradients(same_first=True)
  return scanned(OURS)((params, OURS.init(params)), flat(grads))


def test_equals_a_step_on_the_mean_gradient():
  """Where a step's bases come from the same gradient, that is."""
  params, grads = normal(99), micro_gradients(same_first=True)
  mean = jax.tree.map(lambda x: x.mean(1), grads)
  plain = tx()
  _, (wanted, _, _) = scanned(plain)((params, plain.init(params)), mean)
  _, (found, _, count) = accumulated()
  for name, x in wanted.items():
    np.testing.assert_allclose(found[name][K - 1 :: K], x, atol=2e-6)
  assert count.tolist() == [i // K for i in range(1, K * STEPS + 1)]


def test_in_between_updates_are_zero_and_the_accumulator_is_low_rank():
  (_, state), (_, updates, _) = accumulated()
  for x in updates.values():
    x = np.asarray(x).reshape(STEPS, K, -1)
    assert not x[:, :-1].any() and x[:, -1].all()
  assert state.micro_step == 0
  assert not any(x.any() for x in jax.tree.leaves(state.accumulator))
  extra = 4 * (2 * 4 * 24 + 24 * 4 + 24) + 4
  assert state_bytes(state) == state_bytes(tx().init(normal(0))) + extra


def test_bases_are_those_of_the_first_gradient():
  """And all gradients of a step are projected on them."""
  optimizer = tx(K, refresh=Refresh(policy="synchronous", finder="svd"))
  params, grads = normal(99), micro_gradients(same_first=False)
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  for i in range(2):  # refreshed at step 0, not at step 1
    for j in range(K):
      g = jax.tree.map(lambda x, i=i, j=j: x[i, j], grads)
      updates, state = update(g, state, params)
      if i == j == 0:
        first = state.projector
      basis = state.projector["stack"]["left"]
      np.testing.assert_array_equal(basis, first["stack"]["left"])
  u, s, _ = np.linalg.svd(grads["stack"][0, 0])
  share = (s[:, :4] ** 2).sum(1) / (s**2).sum(1)
  found = captured_energy(grads["stack"][0, 0], first["stack"])
  np.testing.assert_allclose(found, share, rtol=1e-4)
  # The step's update lies in the subspace of that gradient.
  decay = 0.1 * float(RATE(1)) * params["stack"]
  low = updates["stack"] + decay
  np.testing.assert_allclose(
    np.einsum("bmr,bnr,bno->bmo", u[..., :4], u[..., :4], low), low, atol=1e-6
  )


def test_with_moments_in_eight_bits_and_inside_others():
  """One gradient k times is one gradient, whatever is around."""
  settings = {"rank": 4, "min_size": 0, "weight_decay": 0.1}
  many = galore_adamw_8bit(RATE, accumulation_steps=2, **settings)
  many = optax.chain(optax.clip_by_global_norm(1.0), many)
  one = optax.chain(
    optax.clip_by_global_norm(1.0), galore_adamw_8bit(RATE, **settings)
  )
  params = normal(99)
  state, plain = many.init(params), one.init(params)
  update, once = jax.jit(many.update), jax.jit(one.update)
  for i in range(3):
    for _ in range(2):
      updates, state = update(normal(i), state, params)
    wanted, plain = once(normal(i), plain, params)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), updates, wanted
    )
  assert jax.tree.leaves(state[1].micro_step) == [0]


@pytest.mark.parametrize(
  ("steps", "error", "message"),
  [
    (0, ValueError, r"`accumulation_steps` must be positive, got 0"),
    (2.0, TypeError, r"`accumulation_steps` must be an int, got 2\.0"),
    (True, TypeError, r"`accumulation_steps` must be an int, got True"),
  ],
)
def test_errors(steps, error, message):
  with pytest.raises(error, match=message):
    tx(steps)


@pytest.mark.parametrize("refresh", ["staggered", "adaptive"])
def test_map_params_finds_nothing_like_the_parameters(refresh):
  optimizer = tx(K, refresh=refresh)
  state = optimizer.init(normal(0))
  like_params = []
  mapped = optax.tree.map_params(
    optimizer, lambda x: like_params.append(x) or x, state
  )
  assert not like_params
  assert jax.tree.structure(mapped) == jax.tree.structure(state)
