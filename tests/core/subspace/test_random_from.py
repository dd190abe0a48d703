"""Random bases late in training: against NumPy, their steps, errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  adamw_8bit,
  find_bases,
  galore,
  scale_by_orthogonal_momentum,
)
from galore_optax.subspace import find
from tests.core import small
from tests.core.options import gathered
from tests.marks import slow

GAP, RANK, RATE, ALPHA, LATE = 3, 3, 1e-2, 0.5, 5
B1, B2, EPS = 0.8, 0.95, 1e-8
STEPS = 4 * GAP  # refreshes at 0, 3, late ones at 6, 9
OPTIONS = {"rank": RANK, "update_proj_gap": GAP, "scale": ALPHA}
OPTIONS |= {"policy": "synchronous", "random_from": LATE}


def adam():
  return optax.adam(RATE, B1, B2, EPS)


def gradients(shape, seed=0):
  rng = np.random.default_rng(seed)
  mean = rng.normal(size=shape)
  return [np.float32(mean + 0.3 * rng.normal(size=shape)) for _ in range(STEPS)]


def run(tx, grads):
  """Updates and bases (a stack of matrices) of each step."""
  params = {"w": jnp.zeros(grads[0].shape)}
  state, update, found = tx.init(params), jax.jit(tx.update), []
  for grad in grads:
    updates, state = update({"w": grad}, state, params)
    basis, *_ = find_bases(state)["w"].values()
    basis = np.asarray(basis, np.float64).reshape(-1, *basis.shape[-2:])
    found.append((np.asarray(updates["w"]), basis))
  return found


def test_random_bases_are_uniform():
  keys = jax.random.split(jax.random.key(0), 400)
  draw = lambda key: find.random_basis(key, 6, 2)
  drawn = np.asarray(jax.lax.map(draw, keys), np.float64)
  gram = np.swapaxes(drawn, 1, 2) @ drawn
  np.testing.assert_allclose(
    gram, np.broadcast_to(np.eye(2), gram.shape), 0, 1e-5
  )
  # Of the uniform measure all columns have mean 0 and covariance I / m.
  assert np.abs(drawn.mean(axis=0)).max() < 4 / (6 * 400) ** 0.5
  for k in range(2):
    covariance = np.einsum("ki,kj->ij", drawn[..., k], drawn[..., k]) / 400
    np.testing.assert_allclose(covariance, np.eye(6) / 6, atol=0.05)


class GoLore:
  """One matrix under Adam in float64, on bases that are given."""

  def __init__(self):
    self.steps, self.mu, self.nu, self.basis = 0, 0.0, 0.0, None

  def update(self, grad, basis):
    """The change of the weight."""
    grad = np.float64(grad)
    left = grad.shape[0] <= grad.shape[1]
    if self.steps:
      overlap = basis.T @ self.basis
      apply = lambda c, x: c @ x if left else x @ c.T
      self.mu = apply(overlap, self.mu)
      self.nu = self.nu if self.steps >= LATE else apply(overlap**2, self.nu)
    self.basis = basis
    low = basis.T @ grad if left else grad @ basis
    self.steps += 1
    self.mu = B1 * self.mu + (1 - B1) * low
    self.nu = B2 * self.nu + (1 - B2) * low**2
    mean = self.mu / (1 - B1**self.steps)
    normal = mean / (np.sqrt(self.nu / (1 - B2**self.steps)) + EPS)
    return -RATE * ALPHA * (basis @ normal if left else normal @ basis.T)


@pytest.mark.parametrize("shape", [(10, 16), (16, 10), (2, 2, 8, 12)])
def test_follows_the_reference(shape):
  grads = gradients(shape)
  matrices = [g.reshape(-1, *g.shape[-2:]) for g in grads]
  models = [GoLore() for _ in matrices[0]]
  for (found, basis), grad in zip(
    run(galore(adam(), **gathered(OPTIONS)), grads), matrices, strict=True
  ):
    rows = zip(models, grad, basis, strict=True)
    wanted = np.stack([model.update(g, p) for model, g, p in rows])
    np.testing.assert_allclose(found.reshape(grad.shape), wanted, atol=1e-5)


@pytest.mark.parametrize("method", ["subspace", slow("svd")])
def test_bases_are_found_before_and_drawn_after(method):
  grads = gradients((2, 8, 12))
  options = OPTIONS | {"finder": method}
  found = [
    basis for _, basis in run(galore(adam(), **gathered(options)), grads)
  ]
  plain = run(
    galore(adam(), **gathered(options | {"random_from": None})), grads
  )
  for i, (_, basis) in enumerate(plain):
    assert np.allclose(found[i], basis, atol=1e-5) == (i < 2 * GAP)
  changes = [not np.array_equal(a, b) for a, b in itertools.pairwise(found)]
  assert [i + 1 for i, x in enumerate(changes) if x] == [GAP, 2 * GAP, 3 * GAP]
  late = found[-1]
  np.testing.assert_allclose(
    np.swapaxes(late, 1, 2) @ late,
    np.broadcast_to(np.eye(RANK), (2, RANK, RANK)),
    atol=1e-5,
  )
  assert not np.allclose(late[0], late[1], atol=0.1)
  other = run(galore(adam(), **gathered(options), seed=1), grads)[-1][1]
  assert not np.allclose(late, other, atol=0.1)
  # They know nothing of the gradients.
  again = run(
    galore(adam(), **gathered(options)), gradients((2, 8, 12), seed=1)
  )[-1][1]
  np.testing.assert_allclose(late, again, atol=1e-6)


@pytest.mark.parametrize(
  ("inner", "options"),
  [
    (adam(), {"basis_dtype": "int4", "policy": "staggered"}),
    slow(adamw_8bit(RATE, min_size=0), {"basis_dtype": "int8"}),
    (adam(), {"residual": "fira", "moments": "keep"}),
    slow(adam(), {"proj_type": "full", "moments": "reset"}),
    (adam(), {"policy": "adaptive"}),
    (adam(), {"accumulation_steps": 2}),
    slow(scale_by_orthogonal_momentum(), {}),
  ],
)
def test_goes_with_other_options(inner, options):
  tx = galore(inner, **gathered(OPTIONS | options))
  updates, bases = zip(*run(tx, gradients((8, 12))), strict=True)
  assert all(np.isfinite(x).all() for x in updates) and updates[-1].any()
  assert not np.allclose(bases[0], bases[-1], atol=0.1)


def test_on_a_mesh_numbers_are_those_of_one_device():
  kinds = (jax.sharding.AxisType.Explicit,) * 2
  mesh = jax.make_mesh((2, 2), ("x", "y"), kinds, devices=jax.devices()[:4])
  where = jax.NamedSharding(mesh, jax.P("x", "y"))
  tx, grads = galore(adam(), **gathered(OPTIONS)), gradients((8, 12))
  wanted = [updates for updates, _ in run(tx, grads)]
  params = {"w": jax.device_put(jnp.zeros((8, 12)), where)}
  with jax.set_mesh(mesh):
    state, update = tx.init(params), jax.jit(tx.update)
    for grad, expected in zip(grads, wanted, strict=True):
      grad = {"w": jax.device_put(grad, where)}
      updates, state = update(grad, state, params)
      np.testing.assert_allclose(updates["w"], expected, atol=1e-5)


def test_layer_by_layer_equals_the_usual_step():
  options = OPTIONS | {"random_from": 2}
  tx = galore(adam(), rules=small.RULES, **gathered(options))
  small.train_both_ways(tx, GAP + 2, atol=2e-4)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"finder": "random", "residual": "apollo"}, r"finder='random'"),
    ({"moments": "ldadam"}, r"moments='ldadam' does not go with"),
    ({"faithful": True, "policy": "staggered"}, r"faithful=True"),
  ],
)
def test_what_it_does_not_go_with(options, message):
  with pytest.raises(ValueError, match=f"`random_from` draws.*{message}"):
    galore(adam(), **gathered(OPTIONS | options))
  with pytest.raises(TypeError, match="`random_from` must be a number"):
    galore(adam(), **gathered(OPTIONS | {"random_from": "late"}))
