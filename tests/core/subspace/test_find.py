"""Bases: orthonormal, close to the best, and safe on degenerate gradients."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from galore_optax import linalg
from galore_optax.subspace import find as find_lib
from galore_optax.subspace import moments, projection
from tests.marks import slow

find = jax.jit(find_lib.find_basis, static_argnames=("side", "method"))
begin = jax.jit(find_lib.start_basis, static_argnums=(1, 2))
start = functools.partial(begin, jax.random.key(0))
HARD = hypothesis.settings(max_examples=20, deadline=None)


def with_spectrum(singular, shape, seed=0):
  rng = np.random.default_rng(seed)
  short = min(shape)
  u = np.linalg.qr(rng.normal(size=(shape[0], short)))[0]
  v = np.linalg.qr(rng.normal(size=(shape[1], short)))[0]
  return jnp.asarray((u * np.asarray(singular)[:short]) @ v.T, jnp.float32)


def orthogonality(basis):
  basis = np.asarray(basis, np.float64)
  return np.abs(basis.T @ basis - np.eye(basis.shape[1])).max()


def energy(g, basis, side):
  """Captured energy relative to the best basis of this rank."""
  g = np.asarray(g, np.float64)
  low = basis.T @ g if side == "left" else g @ basis
  best = np.linalg.svd(g, compute_uv=False)[: basis.shape[1]]
  return np.sum(np.asarray(low, np.float64) ** 2) / np.sum(best**2)


@HARD
@hypothesis.given(
  size=st.integers(1, 300), rank=st.integers(1, 40), seed=st.integers(0, 99)
)
def test_start_is_orthonormal(size, rank, seed):
  basis = begin(jax.random.key(seed), size, min(rank, size))
  assert orthogonality(basis) < 1e-5


def test_start_is_orthonormal_at_scale():
  assert orthogonality(start(11008, 512)) < 1e-5


RANDOM = np.random.default_rng(0).normal
DEGENERATE = {
  "zero": jnp.zeros((96, 120)),
  "constant": jnp.ones((96, 120)),
  "rank 4": jnp.asarray(RANDOM(size=(96, 4)) @ RANDOM(size=(4, 120))),
  "rank 15": jnp.asarray(RANDOM(size=(96, 15)) @ RANDOM(size=(15, 120))),
  "one row": jnp.zeros((96, 120)).at[3].set(1.0),
  "one entry": jnp.zeros((96, 120)).at[3, 5].set(-2.0),
  "tiny": jnp.asarray(1e-20 * RANDOM(size=(96, 120))),
  "huge": jnp.asarray(1e30 * RANDOM(size=(96, 120))),
  "decay to 1e-12": with_spectrum(10 ** -np.linspace(0, 12, 96), (96, 120)),
  "nan": jnp.ones((96, 120)).at[1, 2].set(jnp.nan),
  "inf": jnp.ones((96, 120)).at[1, 2].set(jnp.inf),
}


@pytest.mark.parametrize(
  ("method", "side"),
  [
    ("subspace", "left"),
    ("subspace", "right"),
    ("svd", "left"),
    ("random", "right"),
    slow("svd", "right"),
    slow("random", "left"),
  ],
)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_gradients_leave_an_orthonormal_basis(name, side, method):
  g = DEGENERATE[name].astype(jnp.float32)
  old = start(96 if side == "left" else 120, 16)
  new = find(g, old, side=side, method=method, iterations=3)
  assert orthogonality(new) < 1e-5
  if name in ("zero", "nan", "inf"):
    np.testing.assert_array_equal(new, old)
  else:
    assert energy(g, new, side) > 0.9


@pytest.mark.parametrize(
  ("alpha", "after_three", "after_twelve"),
  [(0.5, 0.97, 0.997), (1.0, 0.998, 0.9999)],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_iterations_reach_the_best_energy(
  alpha, after_three, after_twelve, side
):
  shape = (96, 120)
  g = with_spectrum(np.arange(1.0, 97.0) ** -alpha, shape)
  old = start(96 if side == "left" else 120, 16)
  three, twelve = (
    energy(g, find(g, old, side=side, method="subspace", iterations=n), side)
    for n in (3, 12)
  )
  assert after_three < three < twelve
  assert twelve > after_twelve


def test_svd_is_the_best_and_signed():
  g = with_spectrum(0.8 ** np.arange(30.0), (30, 50))
  for side, size in (("left", 30), ("right", 50)):
    new = find(g, start(size, 6), side=side, method="svd", iterations=0)
    flip = find(-g, start(size, 6), side=side, method="svd", iterations=0)
    assert energy(g, new, side) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(new, flip, atol=1e-5)


@HARD
@hypothesis.given(
  m=st.integers(2, 12), n=st.integers(2, 12), seed=st.integers(0, 99)
)
def test_full_rank_two_sided_round_trip(m, n, seed):
  rng = np.random.default_rng(seed)
  bases = {
    "left": jnp.asarray(np.linalg.qr(rng.normal(size=(m, m)))[0], jnp.float32),
    "right": jnp.asarray(np.linalg.qr(rng.normal(size=(n, n)))[0], jnp.float32),
  }
  g = rng.normal(size=(3, m, n)).astype(np.float32)
  stacked = jax.tree.map(lambda x: jnp.stack([x] * 3), bases)
  low = jax.jit(projection.project)(g, stacked)
  lifted = jax.jit(projection.lift)(low, stacked)
  np.testing.assert_allclose(lifted, g, atol=1e-5)
  np.testing.assert_allclose(
    low[1],
    np.asarray(bases["left"]).T @ g[1] @ np.asarray(bases["right"]),
    atol=1e-5,
  )


def test_rotation_is_exact_within_the_subspace():
  rng = np.random.default_rng(0)
  old = np.linalg.qr(rng.normal(size=(20, 4)))[0]
  rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
  new = {"left": jnp.asarray(old @ rotation, jnp.float32)}
  old = {"left": jnp.asarray(old, jnp.float32)}
  moment = jnp.asarray(rng.normal(size=(4, 30)), jnp.float32)
  overlap = projection.overlap(new, old)
  mu = moments.rotate(moment, overlap, 1)
  np.testing.assert_allclose(
    projection.lift(mu, new), projection.lift(moment, old), atol=1e-5
  )
  nu = moments.rotate(moment**2, overlap, 2)
  np.testing.assert_allclose(nu, (rotation.T**2) @ moment**2, atol=1e-5)
  assert (nu >= 0).all()


def test_rotation_by_both_sides():
  rng = np.random.default_rng(0)
  rotation = {"left": rng.normal(size=(3, 3)), "right": rng.normal(size=(3, 3))}
  moment = rng.normal(size=(3, 3))
  got = moments.rotate(jnp.asarray(moment), rotation, 2)
  expected = rotation["left"] ** 2 @ moment @ (rotation["right"] ** 2).T
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_null_directions_are_dropped_and_no_others():
  low = jnp.array([[3.0, 4.0], [1e-4, 0.0], [0.0, 3e-7], [0.0, 0.0]])
  got = projection.drop_null(low, {"left": None}, 1e-6)
  np.testing.assert_array_equal(got, low.at[2].set(0))
  got = projection.drop_null(low.T, {"right": None}, 1e-6)
  np.testing.assert_array_equal(got, low.at[2].set(0).T)


@pytest.mark.parametrize("rank", [64, 100, 128])
def test_elimination_of_several_blocks(rank):
  """L⁻¹ by blocks of 64 rows, of which the last may be padded."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3 * rank, rank))
  gram = x.T @ x / len(x)
  found = jax.jit(linalg.eliminate)(jnp.asarray(gram, jnp.float32), 0.5)
  factor = np.linalg.cholesky(gram + 0.5 * np.eye(rank))
  np.testing.assert_allclose(found, np.linalg.inv(factor), atol=2e-6)
