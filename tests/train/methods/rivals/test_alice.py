"""Alice against its equations in NumPy."""

import jax
import numpy as np

import galore_optax
from tests.train.methods.rivals import reference

RANK, LEADING, GAP, SCALE, GROWTH = 3, 1, 2, 0.5, 1.01
B1, B2, B3, COMPENSATION, EPS = 0.9, 0.9, 0.999, 0.4, 1e-8


def switched(covariance, basis, count):
  """Algorithm 2, by full matrices."""
  m = len(basis)
  found, _ = np.linalg.qr(covariance @ basis)
  values, vectors = np.linalg.eigh(found.T @ covariance @ found)
  found = found @ vectors[:, np.argsort(-values)]
  found *= np.where((found * basis).sum(0) < 0, -1, 1)
  complement = np.linalg.qr(found, mode="complete")[0][:, RANK:]
  key = jax.random.fold_in(jax.random.key(0), count)
  drawn = np.asarray(jax.random.permutation(key, m - RANK))
  rest = complement[:, drawn[: RANK - LEADING]]
  return np.concatenate([found[:, :LEADING], rest], axis=1)


def alice(grads):
  """Algorithms 3 and 4, for matrices that are not higher than wide."""
  m = len(grads[0])
  start = jax.random.normal(jax.random.key(0), (m, RANK))
  u, _ = np.linalg.qr(np.asarray(start, np.float64))
  q, mu, nu, p, norm, found = np.zeros((RANK, RANK)), 0.0, 0.0, 0.0, 0.0, []
  for t, g in enumerate(grads, 1):
    if t == 1 or t % GAP == 0:
      u = switched(B3 * u @ q @ u.T + (1 - B3) * g @ g.T, u, t)
    low = u.T @ g
    q = B3 * q + (1 - B3) * low @ low.T
    mu, nu = B1 * mu + (1 - B1) * low, B2 * nu + (1 - B2) * low**2
    p = B1 * p + (1 - B1) * ((g**2).sum(0) - (low**2).sum(0))
    extra = np.sqrt(m - RANK) * (g - u @ u.T @ g) @ np.diag(p**-0.5)
    size = np.linalg.norm(extra)
    limit = GROWTH / max(size / norm, GROWTH) if norm > 0 else 1
    norm = limit * size
    step = u @ (mu / (np.sqrt(nu) + EPS)) + COMPENSATION * limit * extra
    found.append(-reference.RATE * SCALE * step)
  return found


def tall(grads):
  return [u.T for u in alice([g.T for g in grads])]


def matrices_of(state):
  """The states of the stacked kernels."""
  layers = state.inner_states["matrices"].inner_state[0].matrices["layers"]
  return [layers[name]["kernel"] for name in ("up", "down")]


def test_the_updates_are_those_of_the_equations():
  grads = reference.gradients(5)
  tx = reference.make("alice", rank=RANK, update_proj_gap=GAP, scale=SCALE)
  found, state = reference.run(tx, grads)
  for name, rule in (("up", alice), ("down", tall)):
    expected = reference.by_layer(rule, reference.kernels(grads, name))
    reference.check(reference.kernels(found, name), expected, 1e-3)
  for basis in (matrix.basis for matrix in matrices_of(state)):
    gram = basis.mT @ basis
    np.testing.assert_allclose(gram, [np.eye(RANK)] * 2, atol=1e-5)
  # Of four matrices the basis, the covariance, two moments, p and φ; and two
  # moments of other leaves.
  matrix = 8 * RANK + RANK**2 + 2 * RANK * 12 + 12 + 1
  kept = 4 * matrix + 2 * (5 * 8 + 8 * 5 + 8)
  assert 0 <= galore_optax.state_bytes(state) - 4 * kept < 32


def test_at_full_rank_nothing_is_left_to_compensate():
  grads = reference.gradients(3)
  tx = reference.make("alice", rank=64, update_proj_gap=GAP)
  found, state = reference.run(tx, grads)
  for name in ("up", "down"):
    assert all(np.isfinite(u).all() for u in reference.kernels(found, name))
  for matrix in matrices_of(state):
    assert matrix.basis.shape == (2, 8, 8)
    assert float(abs(matrix.norm).max()) == 0
