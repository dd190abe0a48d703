"""LDAdam's moments at a refresh: against NumPy, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  Projection,
  adamw_8bit,
  find_bases,
  galore,
  scale_by_orthogonal_momentum,
)
from galore_optax.subspace import moments
from tests.core.options import gathered
from tests.marks import slow

GAP, RANK, RATE, DECAY, ALPHA = 3, 3, 1e-2, 0.1, 0.5
B1, B2, EPS = 0.8, 0.95, 1e-8
STEPS = 3 * GAP + 2
OPTIONS = {"rank": RANK, "update_proj_gap": GAP, "scale": ALPHA}
OPTIONS |= {"moments": "ldadam"}


class LDAdam:
  """Adam on one matrix, with LDAdam's moments at a refresh, in float64.

  On bases that are given, in the order of the published code: corrected
  moments, their variance, the squares of the rotation, the absolute value.
  """

  def __init__(self):
    self.steps, self.mu, self.nu, self.basis = 0, 0.0, 0.0, None

  def update(self, weight, grad, basis):
    """The change of the weight."""
    grad, basis = np.float64(grad), np.float64(basis)
    left = grad.shape[0] <= grad.shape[1]
    if self.steps and not np.array_equal(basis, self.basis):
      self._carry(basis.T @ self.basis, left)
    self.basis = basis
    low = basis.T @ grad if left else grad @ basis
    self.steps += 1
    self.mu = B1 * self.mu + (1 - B1) * low
    self.nu = B2 * self.nu + (1 - B2) * low**2
    mean, square = self._corrected()
    normal = mean / (np.sqrt(square) + EPS)
    lifted = basis @ normal if left else normal @ basis.T
    return -RATE * (ALPHA * lifted + DECAY * weight)

  def _corrected(self):
    return self.mu / (1 - B1**self.steps), self.nu / (1 - B2**self.steps)

  def _carry(self, rotation, left):
    apply = lambda c, x: c @ x if left else x @ c.T
    mean, square = self._corrected()
    variance = apply(rotation**2, square - mean**2)
    square = np.abs(variance + apply(rotation, mean) ** 2)
    self.mu, self.nu = apply(rotation, self.mu), square * (1 - B2**self.steps)


def gradients(shape, seed=0):
  """Gradients with a mean, so that squared means matter in the moments."""
  rng = np.random.default_rng(seed)
  mean = rng.normal(size=shape)
  for _ in range(STEPS):
    yield np.float32(mean + rng.normal(size=shape))


def adamw():
  return optax.adamw(RATE, B1, B2, EPS, weight_decay=DECAY)


INNER = {
  "adamw": adamw(),
  "partition": optax.partition({"a": adamw()}, "a"),
  "inject": optax.inject_hyperparams(optax.adamw)(
    RATE, B1, B2, EPS, weight_decay=DECAY
  ),
}


@pytest.mark.parametrize(
  ("shape", "inner"),
  [
    ((10, 16), "adamw"),
    ((16, 10), "partition"),
    ((2, 2, 8, 12), "adamw"),
    ((8, 12), "inject"),
  ],
)
def test_follows_the_reference_over_four_refreshes(shape, inner):
  tx = galore(INNER[inner], **gathered(OPTIONS))
  params = np.random.default_rng(1).normal(size=shape)
  ours = jnp.asarray(params, jnp.float32)
  theirs = params.reshape(-1, *shape[-2:])
  models = [LDAdam() for _ in theirs]
  state, update = tx.init({"w": ours}), jax.jit(tx.update)
  for grad in gradients(shape):
    updates, state = update({"w": grad}, state, {"w": ours})
    (basis,) = find_bases(state)["w"].values()
    basis = np.asarray(basis).reshape(-1, *basis.shape[-2:])
    rows = zip(models, theirs, grad.reshape(theirs.shape), basis, strict=True)
    change = np.stack([model.update(w, g, p) for model, w, g, p in rows])
    found = np.asarray(updates["w"]).reshape(theirs.shape)
    np.testing.assert_allclose(found, change, atol=1e-3 * RATE)
    ours, theirs = ours + updates["w"], theirs + change


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decays_are_read_in_full_precision(dtype):
  """0.999 is 1 in bfloat16."""
  inner = optax.adam(1e-3, b1=0.9, b2=0.999)
  params = {"w": jnp.zeros((4, 4), dtype)}
  state = inner.init(params)
  adam = state[0]._replace(count=jnp.int32(3))
  ratios = moments.bias_ratios(
    optax.with_extra_args_support(inner), (adam, *state[1:]), params, params, {}
  )
  (found,) = ratios.values()
  wanted = (1 - 0.999**3) / (1 - 0.9**3) ** 2
  np.testing.assert_allclose(found, wanted, rtol=1e-4)


def last(inner, grads, **options):
  """The last update of a run."""
  tx = galore(inner, **gathered(OPTIONS | options))
  params = {"w": jnp.zeros(grads[0].shape)}
  state, update = tx.init(params), jax.jit(tx.update)
  for grad in grads:
    updates, state = update({"w": grad}, state, params)
  return np.asarray(updates["w"])


def test_differs_from_rotating_the_moments():
  grads = list(gradients((8, 12)))
  found = last(adamw(), grads)
  assert np.abs(found - last(adamw(), grads, moments="rotate")).max() > 1e-4


@pytest.mark.parametrize(
  "options",
  [
    {"basis_dtype": "int4"},
    slow({"residual": "fira"}),
    {"proj_type": "full"},
    {"policy": "adaptive"},
    {"state_dtype": "bfloat16"},
  ],
)
def test_goes_with_other_options(options):
  found = last(adamw(), list(gradients((8, 12))), **options)
  assert np.isfinite(found).all() and found.any()


@pytest.mark.parametrize(
  ("inner", "options", "message"),
  [
    (optax.lion(1.0), {}, r"moments=\"ldadam\" is for .*optax.scale_by_adam"),
    (adamw_8bit(1.0, min_size=0), {}, r"moments that are arrays"),
    (scale_by_orthogonal_momentum(), {}, r"Use moments=\"rotate\""),
    (
      optax.MultiSteps(adamw(), 2).gradient_transformation(),
      {},
      r"`optax\.MultiSteps` around",
    ),
    (
      adamw(),
      {"faithful": True},
      r"means Refresh\(moments='keep'\), got moments='ldadam'",
    ),
    (
      adamw(),
      {"finder": "random", "residual": "apollo"},
      r"keeps the moments.*'ldadam'",
    ),
  ],
)
def test_errors(inner, options, message):
  with pytest.raises(ValueError, match=message):
    galore(inner, **gathered(OPTIONS | options)).init({"w": jnp.zeros((8, 12))})


def test_leaves_of_other_shapes():
  """A bias at full rank, and a kernel read as a matrix of other axes."""
  params = {"bias": jnp.ones(5), "w": jnp.ones((8, 3, 4))}
  rules = [("w", Projection(rows=0, cols=(1, 2)))]
  tx = galore(adamw(), rules=rules, **gathered(OPTIONS))
  state, update = tx.init(params), jax.jit(tx.update)
  for _ in range(GAP + 1):
    updates, state = update(params, state, params)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
