"""Refreshes of several steps, against NumPy, and what they do not go with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  Refresh,
  galore,
  galore_adamw,
  gum,
  ldadam,
  q_galore_adamw_8bit,
)

RATE, B1, B2, EPS, SCALE, RANK = 1e-2, 0.9, 0.99, 1e-8, 0.5, 3


class Reference:
  """One matrix (m, n), m < n, in float64."""

  def __init__(self, basis, gap, burst, phase):
    self.basis, self.when = np.asarray(basis, np.float64), (gap, burst, phase)
    self.mu = self.nu = 0.0
    self.step = 0

  def update(self, g):
    gap, burst, phase = self.when
    if self.step < burst or (self.step - phase) % gap < burst:
      self.refresh(g)
    self.step += 1
    low = self.basis.T @ g
    self.mu = B1 * self.mu + (1 - B1) * low
    self.nu = B2 * self.nu + (1 - B2) * low**2
    mu, nu = (x / (1 - b**self.step) for x, b in ((self.mu, B1), (self.nu, B2)))
    return -RATE * SCALE * self.basis @ (mu / (np.sqrt(nu) + EPS))

  def refresh(self, g):
    y = g @ g.T @ self.basis
    q, r = np.linalg.qr(y / np.linalg.norm(y) + 1e-6 * self.basis)
    new = q * np.sign(np.diag(r))
    rotation = new.T @ self.basis
    self.basis = new
    if self.step:
      self.mu, self.nu = rotation @ self.mu, rotation**2 @ self.nu


def gradients(shape, count):
  """Slowly changing ones, with a spectrum that falls."""
  rng = np.random.default_rng(0)
  fixed = rng.normal(size=shape) * 2.0 ** -np.arange(shape[-2])[:, None]
  return [fixed + 0.1 * rng.normal(size=shape) for _ in range(count)]


@pytest.mark.parametrize(
  ("policy", "phases"), [("synchronous", (0, 0)), ("staggered", (0, 3))]
)
def test_follows_the_reference(policy, phases):
  tx = galore(
    optax.adam(RATE, B1, B2, EPS),
    rank=RANK,
    update_proj_gap=6,
    scale=SCALE,
    refresh=Refresh(policy=policy, burst=2),
  )
  params = {"w": jnp.zeros((2, 6, 10))}
  state = tx.init(params)
  start = state.projector["w"]["left"]
  wanted = [
    Reference(basis, 6, 2, phase)
    for basis, phase in zip(start, phases, strict=True)
  ]
  update = jax.jit(tx.update)
  for g in gradients((2, 6, 10), 15):
    updates, state = update({"w": jnp.asarray(g, jnp.float32)}, state, params)
    for k, reference in enumerate(wanted):
      expected = reference.update(g[k])
      np.testing.assert_allclose(updates["w"][k], expected, atol=3e-6)
      found = state.projector["w"]["left"][k]
      np.testing.assert_allclose(found, reference.basis, atol=2e-5)


def test_bases_stay_orthonormal_over_ten_thousand_steps():
  tx = galore(
    optax.sgd(1e-2),
    rank=4,
    update_proj_gap=5,
    refresh=Refresh(policy="synchronous", burst=4),
  )
  params = {"w": jnp.zeros((12, 20))}

  def step(state, key):
    g = {"w": jax.random.normal(key, (12, 20))}
    return tx.update(g, state, params)[1], None

  keys = jax.random.split(jax.random.key(0), 10_000)
  state, _ = jax.jit(lambda: jax.lax.scan(step, tx.init(params), keys))()
  basis = np.asarray(state.projector["w"]["left"], np.float64)
  assert np.abs(basis.T @ basis - np.eye(4)).max() < 1e-5


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_gradient_without_directions_leaves_the_basis(bad):
  tx = galore(optax.sgd(1e-2), rank=RANK, refresh=Refresh(burst=4))
  params = {"w": jnp.zeros((6, 10))}
  state = tx.init(params)
  g = {"w": jnp.zeros((6, 10)).at[1, 2].set(bad)}
  updates, after = tx.update(g, state, params)
  np.testing.assert_array_equal(
    after.projector["w"]["left"], state.projector["w"]["left"]
  )
  assert not updates["w"].any()


def test_a_step_makes_one_iteration():
  """A burst of one step is a refresh of one iteration."""
  tx, other = (
    galore(optax.adam(RATE), rank=RANK, update_proj_gap=3, refresh=refresh)
    for refresh in (Refresh(burst=1), Refresh(iterations=1))
  )
  params = {"w": jnp.zeros((2, 6, 10))}
  state, same = tx.init(params), other.init(params)
  for g in gradients((2, 6, 10), 7):
    g = {"w": jnp.asarray(g, jnp.float32)}
    found, state = jax.jit(tx.update)(g, state, params)
    wanted, same = jax.jit(other.update)(g, same, params)
    np.testing.assert_array_equal(found["w"], wanted["w"])


@pytest.mark.parametrize(
  ("fields", "says"),
  [
    ({"iterations": 3}, "one subspace iteration"),
    ({"policy": "adaptive"}, "compares the bases"),
    ({"finder": "svd"}, "needs no second step"),
    ({"finder": "random"}, "random bases"),
    ({"random_from": 100}, "random bases"),
    ({"burst": 1.5}, "whole number"),
    ({"burst": 0}, "positive"),
  ],
)
def test_what_it_does_not_go_with_is_refused(fields, says):
  with pytest.raises(ValueError, match=says):
    Refresh(**{"burst": 4, **fields})


def test_a_recipe_whose_refreshes_are_adaptive_says_what_works():
  with pytest.raises(ValueError, match="set policy='staggered'"):
    q_galore_adamw_8bit(RATE, refresh=Refresh(burst=4))
  chosen = Refresh(burst=4, policy="staggered")
  q_galore_adamw_8bit(RATE, refresh=chosen)


@pytest.mark.parametrize("make", [gum, ldadam])
def test_recipes_that_use_a_basis_at_once_refuse_it(make):
  with pytest.raises(ValueError, match=f"`{make.__name__}`.*burst=4"):
    make(RATE, refresh=Refresh(burst=4))
  with pytest.raises(ValueError, match="burst"):
    galore_adamw(RATE, refresh=Refresh(burst=4), faithful=True)
