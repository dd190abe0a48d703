"""Synthetic gradients, and gradients recorded in a run."""

import numpy as np
import pytest

from train.measure import gradients


def test_synthetic_spectra_and_stale_bases():
  made = gradients.Synthetic(24, 40)
  sigma = np.linalg.svd(made.gradient(0.5), compute_uv=False)
  np.testing.assert_allclose(sigma, np.arange(1, 25) ** -0.5, rtol=1e-4)
  old = made.stale_basis(6)
  np.testing.assert_allclose(old.T @ old, np.eye(6), atol=1e-5)
  overlap = np.sum((made.left[:, :6].T @ old) ** 2) / 6
  assert abs(overlap - 0.5) < 1e-4
  with pytest.raises(ValueError, match="no room"):
    made.stale_basis(20)


@pytest.mark.slow
def test_gradients_of_a_run():
  settings = ["model.d_model=32", "model.d_ff=48", "model.n_layers=2"]
  settings += ["model.n_heads=2", "data.length=16", "data.batch=8"]
  when = gradients.Steps((1, 2), (3, 4))
  found = gradients.record("sotu_small", settings, when)
  assert len(found) == 4 * 7
  assert all(np.isfinite(x).all() and x.any() for x in found.values())
