import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_optax import basis_overlap, captured_energy, stable_rank


@pytest.fixture(scope="module")
def stack():
  """Three (24, 40) matrices of falling spectra, and their singular vectors."""
  rng = np.random.default_rng(0)
  left = np.linalg.qr(rng.normal(size=(3, 24, 24)))[0]
  right = np.linalg.qr(rng.normal(size=(3, 40, 24)))[0]
  values = 0.8 ** np.arange(24) * np.array([[1.0], [1e-12], [1e12]])
  g = np.einsum("bmk,bk,bnk->bmn", left, values, right)
  return jnp.asarray(g, jnp.float32), left, right, values


def test_stable_rank_is_that_of_the_spectrum(stack):
  g, _, _, values = stack
  expected = (values**2).sum(-1) / values[:, 0] ** 2
  np.testing.assert_allclose(stable_rank(g), expected, rtol=1e-4)


def test_captured_energy_is_that_of_the_leading_values(stack):
  g, left, right, values = stack
  share = (values[:, :5] ** 2).sum(-1) / (values**2).sum(-1)
  bases = {"left": left[..., :5], "right": right[..., :5]}
  bases = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), bases)
  for sides in (("left",), ("right",), ("left", "right")):
    found = captured_energy(g, {side: bases[side] for side in sides})
    np.testing.assert_allclose(found, share, rtol=1e-5)


def test_overlap_of_the_side_that_turned_more(stack):
  _, left, right, _ = stack
  left, right = (jnp.asarray(x, jnp.float32) for x in (left, right))
  old = {"left": left[..., :4], "right": right[..., :4]}
  new = {"left": left[..., 1:5], "right": right[..., 2:6]}
  np.testing.assert_allclose(basis_overlap(old, old), 1, rtol=1e-5)
  np.testing.assert_allclose(basis_overlap(new, old), 0.5, rtol=1e-5)
  del new["right"], old["right"]
  np.testing.assert_allclose(basis_overlap(new, old), 0.75, rtol=1e-5)


def test_a_zero_gradient_has_no_rank_and_no_energy():
  zero = jnp.zeros((6, 4))
  assert stable_rank(zero) == 0
  assert captured_energy(zero, {"left": jnp.eye(6)[:, :2]}) == 0


def test_bfloat16_gradients_are_summed_in_float32(stack):
  g, _, _, values = stack
  expected = (values[0] ** 2).sum() / values[0, 0] ** 2
  found = stable_rank(g[0].astype(jnp.bfloat16))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-2)
