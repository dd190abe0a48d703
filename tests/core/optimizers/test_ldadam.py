"""LDAdam with error feedback: against NumPy, what it gains, what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  LDAdamState,
  Refresh,
  find_bases,
  ldadam,
  state_bytes,
  state_shardings,
)
from tests.core import small as small_lib

RANK, RATE, DECAY, B1, B2, EPS = 3, 1e-2, 0.1, 0.9, 0.99, 1e-8
SETTINGS = {"b1": B1, "b2": B2, "eps": EPS, "rank": RANK}


def gradients(shape, steps, seed=0):
  rng = np.random.default_rng(seed)
  base = rng.normal(size=shape)
  for _ in range(steps):
    yield np.float32(base + rng.normal(size=shape))


class Reference:
  """One wide matrix under LDAdam in float64, on given bases."""

  def __init__(self, feedback):
    self.feedback, self.steps, self.basis = feedback, 0, None
    self.m = self.v = self.error = 0.0

  def update(self, weight, grad, basis):
    """The change of the weight."""
    whole, basis = np.float64(grad) + self.error, np.float64(basis)
    lost = whole - basis @ basis.T @ whole
    if self.basis is not None:
      overlap, t = basis.T @ self.basis, self.steps
      mean, square = self.m / (1 - B1**t), self.v / (1 - B2**t)
      rotated = overlap @ self.m
      gone = self.basis @ self.m - basis @ rotated
      lost = lost + B1 / (1 - B1) * gone
      self.v = (1 - B2**t) * np.abs(
        overlap**2 @ (square - mean**2) + (overlap @ mean) ** 2
      )
      self.m = rotated
    self.error = lost if self.feedback else 0.0
    self.basis, self.steps = basis, self.steps + 1
    low = basis.T @ whole
    self.m = B1 * self.m + (1 - B1) * low
    self.v = B2 * self.v + (1 - B2) * low**2
    mean = self.m / (1 - B1**self.steps)
    square = self.v / (1 - B2**self.steps)
    normal = basis @ (mean / (np.sqrt(square) + EPS))
    return -RATE * (normal + DECAY * weight)


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("gap", [1, 3])
def test_ldadam_follows_the_reference(feedback, gap):
  shape = (2, 8, 20)
  tx = ldadam(
    RATE, weight_decay=DECAY, error_feedback=feedback, update_proj_gap=gap,
    **SETTINGS
  )  # fmt: skip
  theirs = np.random.default_rng(1).normal(size=shape)
  ours = {"w": jnp.asarray(theirs, jnp.float32)}
  models = [Reference(feedback) for _ in theirs]
  state, update = tx.init(ours), jax.jit(tx.update)
  for grad in gradients(shape, 8):
    updates, state = update({"w": grad}, state, ours)
    bases = np.asarray(find_bases(state)["w"]["left"])
    rows = zip(models, theirs, grad, bases, strict=True)
    change = np.stack([model.update(w, g, p) for model, w, g, p in rows])
    np.testing.assert_allclose(updates["w"], change, atol=2e-3 * RATE)
    ours, theirs = optax.apply_updates(ours, updates), theirs + change
  for model, kept in zip(models, state[0].error.get("w", ()), strict=False):
    np.testing.assert_allclose(kept, model.error, atol=1e-3)
  assert bool(state[0].error) == feedback


def test_bases_are_found_from_momentum_and_the_whole_gradient():
  """Without noise, and from a gradient of rank 3, they are its own."""
  rng = np.random.default_rng(0)
  left = np.linalg.qr(rng.normal(size=(8, RANK)))[0]
  grad = {"w": jnp.asarray(left @ rng.normal(size=(RANK, 20)), jnp.float32)}
  params = {"w": jnp.zeros((8, 20))}
  tx = ldadam(RATE, **SETTINGS)
  update, state = jax.jit(tx.update), tx.init(params)
  _, state = update(grad, state, params)
  other = {"w": jnp.asarray(rng.normal(size=(8, 20)), jnp.float32)}
  for rho, share in ((1 - 1e-6, 1.0), (0.0, 0.9)):
    tx = ldadam(RATE, rho=rho, **SETTINGS)
    _, after = jax.jit(tx.update)(other, state, params)
    basis = np.asarray(find_bases(after)["w"]["left"])
    kept = np.linalg.norm(basis.T @ left) ** 2 / RANK
    assert kept > 0.999 if share == 1 else kept < share
  first = np.asarray(find_bases(state)["w"]["left"])
  assert np.linalg.norm(first.T @ left) ** 2 / RANK > 0.999


def test_error_feedback_finds_what_a_fixed_subspace_hides():
  rng = np.random.default_rng(0)
  target = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
  target = target.at[:2].multiply(4)
  left = {}
  for feedback in (True, False):
    tx = ldadam(0.02, rank=2, error_feedback=feedback)
    params = {"w": jnp.zeros(target.shape)}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(120):
      # Of one size all the way, so that what is large stays large.
      grads = {"w": jnp.sign(params["w"] - target) * jnp.abs(target)}
      updates, state = update(grads, state, params)
      params = optax.apply_updates(params, updates)
    left[feedback] = float(jnp.linalg.norm((params["w"] - target)[2:]))
  whole = float(jnp.linalg.norm(target[2:]))
  assert left[False] > 0.95 * whole and left[True] < 0.9 * whole, left


def test_the_error_is_what_the_state_grows_by():
  params = {"w": jnp.zeros((3, 64, 96)), "bias": jnp.zeros(96)}
  size = lambda **options: state_bytes(
    ldadam(1e-3, rank=8, **options).init(params)
  )
  small = size(error_feedback=False)
  assert size() - small == 4 * 3 * 64 * 96
  assert size(error_dtype="bfloat16") - small == 2 * 3 * 64 * 96
  bases, moments = 3 * 64 * 8, 2 * (3 * 8 * 96 + 96)
  assert small - 4 * (bases + moments) <= 3 * 4  # counters


def ldadam_state(state):
  return next(x for x in state if isinstance(x, LDAdamState))


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_nothing_of_momentum_is_lost_while_a_basis_stays(dtype):
  """Also where it is kept in so few bits that it is not orthonormal."""
  params = {"w": jnp.zeros((64, 256))}
  tx = ldadam(1e-3, rank=16, update_proj_gap=1000, basis_dtype=dtype)
  state, update = tx.init(params), jax.jit(tx.update)
  for grad in gradients((64, 256), 4):
    whole = grad + np.asarray(ldadam_state(state).error["w"])
    _, state = update({"w": jnp.asarray(grad)}, state, params)
  basis = np.asarray(find_bases(state)["w"]["left"])
  left = whole - basis @ (basis.T @ whole)
  np.testing.assert_allclose(ldadam_state(state).error["w"], left, atol=1e-4)


def test_a_gradient_that_is_not_finite_counts_as_none():
  params = {"w": jnp.ones((2, 8, 16))}
  tx = ldadam(RATE, rank=2)
  update, state = jax.jit(tx.update), tx.init(params)
  first, second = gradients((2, 8, 16), 2)
  _, state = update({"w": first}, state, params)
  second[0, 1, 1] = np.nan
  updates, state = update({"w": second}, state, params)
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state))
  assert bool(jnp.isfinite(updates["w"]).all())


def test_other_leaves_get_adamw():
  shapes = {"bias": (16,), "w": (8, 16)}
  params = {k: jnp.ones(s) for k, s in shapes.items()}
  tx = ldadam(RATE, 0.9, 0.999, weight_decay=DECAY, rank=2)
  plain = optax.adamw(RATE, weight_decay=DECAY)
  ours, theirs = tx.init(params), plain.init(params)
  for bias, kernel in zip(
    gradients((16,), 3), gradients((8, 16), 3), strict=True
  ):
    grads = {"bias": bias, "w": kernel}
    found, ours = tx.update(grads, ours, params)
    wanted, theirs = plain.update(grads, theirs, params)
    np.testing.assert_allclose(found["bias"], wanted["bias"], rtol=1e-5)


def test_layer_by_layer_equals_the_usual_step():
  # A large eps, for entries of a rounding error's size.
  tx = ldadam(RATE, eps=1e-3, rank=4, rules=small_lib.RULES)
  small_lib.train_both_ways(tx, 4, atol=1e-3)


def test_the_error_is_sharded_as_the_weights_are():
  axes = (jax.sharding.AxisType.Explicit,) * 2
  mesh = jax.make_mesh((2, 2), ("layers", "model"), axis_types=axes)
  sharding = jax.NamedSharding(mesh, jax.P("layers", None, "model"))
  where = {"w": sharding}
  tx = ldadam(RATE, param_shardings=where, **SETTINGS)
  alone = ldadam(RATE, **SETTINGS)
  params = {"w": jnp.zeros((2, 8, 16))}
  state, update = alone.init(params), jax.jit(alone.update)
  for grad in gradients((2, 8, 16), 3):
    wanted, state = update({"w": grad}, state, params)
  with jax.set_mesh(mesh):
    params = jax.device_put(params, where)
    assert state_shardings(tx, params, where)[0].error["w"] == sharding
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in gradients((2, 8, 16), 3):
      grads = jax.device_put({"w": grad}, where)
      found, state = update(grads, state, params)
  np.testing.assert_allclose(found["w"], wanted["w"], atol=1e-2 * RATE)


def test_what_is_refused():
  for name, wrong in (("b1", 1.0), ("rho", -0.1)):
    with pytest.raises(ValueError, match=f"`{name}` must"):
      ldadam(RATE, **{name: wrong})
  with pytest.raises(ValueError, match="keeps the moments"):
    ldadam(RATE, refresh=Refresh(finder="random"))
  with pytest.raises(ValueError, match="got moments='rotate'"):
    ldadam(RATE, refresh=Refresh(moments="rotate"))
  with pytest.raises(ValueError, match="`refresh` must be one of"):
    ldadam(RATE, refresh="adaptive")
  with pytest.raises(TypeError, match="`error_dtype` must be"):
    ldadam(RATE, error_dtype="int8")
