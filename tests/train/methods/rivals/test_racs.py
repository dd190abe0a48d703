"""RACS against its equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_optax
from galore_optax import baselines
from tests.train.methods.rivals import reference

DECAY, GROWTH, SCALE = 0.9, 1.01, 0.5


def racs(grads):
  """Algorithm 1, with the matrices of equation 16 written out."""
  s, q, norm, found = 0.0, 0.0, 0.0, []
  for t, g in enumerate(grads, 1):
    rows = np.eye(g.shape[0])
    for _ in range(5):
      columns = np.diag(np.diag(g.T @ rows @ g)) / np.linalg.norm(rows) ** 2
      rows = np.diag(np.diag(g @ columns @ g.T)) / np.linalg.norm(columns) ** 2
    s = DECAY * s + (1 - DECAY) * np.diag(columns)
    q = DECAY * q + (1 - DECAY) * np.diag(rows)
    scaled = np.diag(q**-0.5) @ g @ np.diag(s**-0.5)
    size = np.linalg.norm(scaled)
    limit = GROWTH / max(size / norm, GROWTH) if t > 1 else 1
    norm = limit * size
    found.append(-reference.RATE * SCALE * limit * scaled)
  return found


def gradients():
  """Gradients whose norms jump, so that the limit comes into play."""
  grads = reference.gradients(5)
  for size, tree in zip([1, 0.1, 0.2, 30, 2], grads, strict=True):
    for kernel in tree["layers"].values():
      kernel["kernel"] *= size
  return grads


def test_the_updates_are_those_of_the_equations():
  grads = gradients()
  found, state = reference.run(reference.make("racs", scale=SCALE), grads)
  for name in ("up", "down"):
    expected = reference.by_layer(racs, reference.kernels(grads, name))
    reference.check(reference.kernels(found, name), expected)
  reference.check(
    [u["embed"]["embedding"] for u in found],
    reference.adam([g["embed"]["embedding"] for g in grads]),
  )
  # Two matrices of either shape; two moments of other leaves, and counters.
  scales, others = 4 * (8 + 12 + 1), 2 * (5 * 8 + 8 * 5 + 8)
  assert 0 <= galore_optax.state_bytes(state) - 4 * (scales + others) < 32


def test_some_of_these_updates_are_limited():
  grads = [g[0] for g in reference.kernels(gradients(), "up")]
  norms = [np.linalg.norm(u) for u in racs(grads)]
  growth = np.array(norms[1:]) / norms[:-1]
  assert np.isclose(growth, GROWTH).any() and (growth < 1).any()


def test_a_leaf_that_is_no_matrix_is_refused():
  with pytest.raises(ValueError, match=r"'bias' has shape \(3,\).*partition"):
    baselines.scale_by_racs().init({"bias": jnp.zeros(3)})


def test_tiny_gradients_and_their_zeros_are_scaled_like_others():
  tx = reference.make("racs")
  grads = reference.gradients(2)
  for tree in grads:
    tree["layers"]["up"]["kernel"][:, 3] = 0
    tree["layers"]["down"]["kernel"][0] = 0
  small = jax.tree.map(lambda x: 1e-15 * x, grads)
  found, _ = reference.run(tx, grads)
  tiny, _ = reference.run(tx, small)
  for name in ("up", "down"):
    reference.check(
      reference.kernels(tiny, name), reference.kernels(found, name)
    )
    assert all(np.isfinite(u).all() for u in reference.kernels(found, name))
  assert not jnp.any(found[1]["layers"]["up"]["kernel"][:, 3])
