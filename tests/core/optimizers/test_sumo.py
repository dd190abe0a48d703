"""Orthogonalized momentum: against NumPy's SVD, its limits, its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  Refresh,
  describe,
  find_bases,
  galore,
  polar_factor,
  scale_by_orthogonal_momentum,
  state_bytes,
  sumo,
)
from tests.core import small as small_lib
from tests.marks import slow

GAP, RANK, RATE, DECAY, MU, ALPHA = 3, 3, 1e-2, 0.1, 0.9, 0.5
STEPS = 3 * GAP + 2  # refreshes at 0, 3, 6, 9
OPTIONS = {"rank": RANK, "update_proj_gap": GAP}


def numpy_polar(x):
  """U Vᵀ of the directions that are there, in float64."""
  u, s, vt = np.linalg.svd(np.float64(x), full_matrices=False)
  there = s > 1e-9 * np.max(s, axis=-1, keepdims=True)
  return (u * there[..., None, :]) @ vt


def with_spectrum(shape, spectrum, seed=0):
  """Matrices with the given singular values."""
  rng = np.random.default_rng(seed)
  left = np.linalg.qr(rng.normal(size=(*shape[:-1], len(spectrum))))[0]
  right = rng.normal(size=(*shape[:-2], shape[-1], len(spectrum)))
  return left * spectrum @ np.swapaxes(np.linalg.qr(right)[0], -1, -2)


def gradients(shape, seed=0):
  """Gradients of full rank whose subspaces change."""
  rng = np.random.default_rng(seed)
  base = with_spectrum(shape, 1.5 ** -np.arange(min(shape[-2:])), seed)
  for _ in range(STEPS):
    yield np.float32(base + 0.3 * np.std(base) * rng.normal(size=shape))


@pytest.mark.parametrize(
  "shape", [(8, 20), (20, 8), (12, 12), (1, 5), (2, 3, 6, 9)]
)
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_the_polar_factor_is_numpy_s(shape, size):
  spectrum = np.linspace(1, 10, min(shape[-2:]))
  x = np.float32(size * with_spectrum(shape, spectrum))
  np.testing.assert_allclose(polar_factor(x), numpy_polar(x), atol=1e-5)


@pytest.mark.parametrize("condition", [1e3, 1e4])
def test_an_ill_conditioned_matrix_costs_its_condition(condition):
  """Not more than the rounding of the matrix to float32 may cost."""
  spectrum = np.geomspace(1, 1 / condition, 16)
  x = np.float32(with_spectrum((16, 40), spectrum))
  error = np.linalg.norm(polar_factor(x) - numpy_polar(x), 2)
  assert error < 1e-7 * condition


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_directions_that_are_not_there_stay_out(shape):
  exact = with_spectrum(shape, np.geomspace(1, 1e-2, 5))
  found = polar_factor(np.float32(exact))
  difference = np.linalg.norm(found - numpy_polar(exact), 2)
  assert difference < 0.02
  assert not polar_factor(jnp.zeros(shape)).any()


def test_no_factorization_is_called_on_a_stack():
  """They hang on CPU where they are batched."""
  stack = jnp.ones((4, 8, 12))
  for f in (polar_factor, jax.vmap(polar_factor)):
    text = jax.jit(f).lower(stack).as_text()
    assert "dot_general" in text and "custom_call" not in text


class Sumo:
  """One matrix under SUMO in float64, on bases that are given."""

  def __init__(self):
    self.basis, self.moment = None, 0.0

  def update(self, weight, grad, basis):
    """The change of the weight."""
    grad, basis = np.float64(grad), np.float64(basis)
    left = grad.shape[0] <= grad.shape[1]
    if self.basis is not None:
      overlap = basis.T @ self.basis
      self.moment = overlap @ self.moment if left else self.moment @ overlap.T
    self.basis = basis
    low = basis.T @ grad if left else grad @ basis
    self.moment = MU * self.moment + low
    normal = numpy_polar(self.moment) * max(grad.shape) ** 0.5
    lifted = basis @ normal if left else normal @ basis.T
    return -RATE * (ALPHA * lifted + DECAY * weight)


@pytest.mark.parametrize("shape", [(10, 16), (16, 10), (2, 3, 8, 12)])
def test_sumo_follows_the_reference_over_four_refreshes(shape):
  tx = sumo(RATE, MU, weight_decay=DECAY, scale=ALPHA, **OPTIONS)
  params = np.random.default_rng(1).normal(size=shape)
  ours = jnp.asarray(params, jnp.float32)
  theirs = params.reshape(-1, *shape[-2:])
  models = [Sumo() for _ in theirs]
  state, update = tx.init({"w": ours}), jax.jit(tx.update)
  bases = []
  for grad in gradients(shape):
    updates, state = update({"w": grad}, state, {"w": ours})
    (basis,) = find_bases(state)["w"].values()
    basis = np.asarray(basis).reshape(-1, *basis.shape[-2:])
    bases.append(basis)
    rows = zip(models, theirs, grad.reshape(theirs.shape), basis, strict=True)
    change = np.stack([model.update(w, g, p) for model, w, g, p in rows])
    found = np.asarray(updates["w"]).reshape(theirs.shape)
    np.testing.assert_allclose(found, change, atol=1e-3 * RATE)
    ours, theirs = ours + updates["w"], theirs + change
  assert np.abs(bases[0] - bases[-1]).max() > 0.01


def run(tx, grads, params):
  """Updates of one step after the other, and the last state."""
  state, update, found = tx.init(params), jax.jit(tx.update), []
  for grad in grads:
    updates, state = update(grad, state, params)
    found.append(updates)
  return found, state


def test_other_leaves_get_adamw():
  shapes = {"bias": (16,), "embed": (8, 16), "kernel": (8, 16), "out": (8, 16)}
  params = {name: jnp.ones(shape) for name, shape in shapes.items()}
  rng = np.random.default_rng(0)
  grads = [
    {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    for _ in range(3)
  ]
  rules = [("out", None)]
  tx = sumo(RATE, MU, weight_decay=DECAY, rules=rules, **OPTIONS)
  found, state = run(tx, grads, params)
  wanted, _ = run(optax.adamw(RATE, weight_decay=DECAY), grads, params)
  assert list(find_bases(state)) == ["kernel"]
  for ours, adamw in zip(found, wanted, strict=True):
    for name in ("bias", "embed", "out"):
      np.testing.assert_allclose(ours[name], adamw[name], rtol=1e-5)
    assert not np.allclose(ours["kernel"], adamw["kernel"], rtol=0.1)


def test_a_matrix_too_small_to_project_is_orthogonalized_whole():
  params = {"w": jnp.zeros((4, 6)), "v": jnp.zeros((8, 64))}
  tx = sumo(1.0, rank=4, scale=1.0)
  assert "full rank" in str(describe(tx, params))
  grads = {"w": jnp.asarray(with_spectrum((4, 6), [1, 2, 3, 4]), jnp.float32)}
  (updates,), _ = run(tx, [{**grads, "v": params["v"]}], params)
  wanted = -(6**0.5) * numpy_polar(grads["w"])
  np.testing.assert_allclose(updates["w"], wanted, atol=1e-4)


def test_one_moment_is_kept():
  params = {"w": jnp.zeros((2, 64, 512))}
  counters = 4 * 3
  size = state_bytes(sumo(RATE, rank=16).init(params))
  assert size - 2 * 4 * 16 * (64 + 512) <= counters
  coarse = sumo(RATE, rank=16, state_dtype="bfloat16", basis_dtype="int4")
  small = state_bytes(coarse.init(params))
  assert small < 2 * 16 * (64 * 0.6 + 512 * 2) + counters


@pytest.mark.parametrize(
  "options",
  [
    {"basis_dtype": "int8"},
    slow({"state_dtype": "bfloat16"}),
    slow({"residual": "fira"}),
    {"proj_type": "full"},
    slow({"refresh": Refresh.paper()}),
    {"refresh": "adaptive", "nesterov": True},
  ],
)
def test_goes_down_with_other_options(options):
  tx = sumo(0.1, MU, **OPTIONS, **options)
  assert small_lib.left_of_the_way(tx, (8, 24)) < 0.85


def test_accumulation_is_that_of_the_mean():
  first, second, *_ = gradients((8, 12))
  inner = optax.chain(scale_by_orthogonal_momentum(MU), optax.scale(-RATE))
  params = {"w": jnp.zeros((8, 12))}
  # The bases come from the first of the gradients, so it comes alone before.
  twice = galore(inner, accumulation_steps=2, **OPTIONS)
  grads = [{"w": g} for g in (first, first, first, second)]
  found, _ = run(twice, grads, params)
  once = galore(inner, **OPTIONS)
  wanted, _ = run(once, [{"w": first}, {"w": (first + second) / 2}], params)
  np.testing.assert_allclose(found[3]["w"], wanted[1]["w"], atol=1e-5)


@pytest.mark.parametrize("name", ["sumo", "ldadam"])
def test_layer_by_layer_equals_the_usual_step(name):
  options = {"rules": small_lib.RULES, **OPTIONS}
  if name == "sumo":
    tx = sumo(RATE, MU, weight_decay=DECAY, **options)
  else:
    tx = galore(optax.adam(RATE), refresh=Refresh(moments="ldadam"), **options)
  small_lib.train_both_ways(tx, GAP + 1, atol=2e-4)


def test_what_is_refused():
  with pytest.raises(ValueError, match=r"'bias' has shape \(3,\).*`sumo`"):
    scale_by_orthogonal_momentum().init({"bias": jnp.zeros(3)})
  with pytest.raises(ValueError, match="sumo updates in the"):
    sumo(RATE, refresh=Refresh(finder="random"))
