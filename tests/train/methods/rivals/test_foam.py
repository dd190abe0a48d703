"""FOAM against its equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

import galore_optax
from tests.train.methods.rivals import reference
from train.methods.rivals.foam import scale_by_foam

B1, B2, EPS, SCALE, BLOCK = 0.9, 0.95, 1e-3, 0.5, 4


def foam(grads):
  """With the matrices that fold and unfold rows written out."""
  m = grads[0].shape[0]
  unfold = np.repeat(np.eye(-(-m // BLOCK)), BLOCK, axis=0)[:m]
  fold = unfold.T / BLOCK
  mu, nu, found = 0.0, 0.0, []
  for t, g in enumerate(grads, 1):
    mu = B1 * mu + (1 - B1) * fold @ g
    nu = B2 * nu + (1 - B2) * fold @ g**2
    residual = g - unfold @ fold @ g
    step = (unfold @ mu + residual) / (np.sqrt(unfold @ nu + residual**2) + EPS)
    found.append(np.sqrt(1 - B2**t) / (1 - B1**t) * step)
  return found


def test_the_updates_are_those_of_the_equations():
  grads = reference.gradients(4)
  tx = reference.make("foam", b1=B1, b2=B2, eps=EPS, scale=SCALE)
  found, state = reference.run(tx, grads)
  for name in ("up", "down"):
    expected = reference.by_layer(foam, reference.kernels(grads, name))
    expected = [-reference.RATE * SCALE * u for u in expected]
    reference.check(reference.kernels(found, name), expected)
  # Two moments: of every fourth element of four matrices, and of other leaves.
  moments = 2 * (4 * 8 * 12 // BLOCK + 5 * 8 + 8 * 5 + 8)
  assert 0 <= galore_optax.state_bytes(state) - 4 * moments < 32


def test_the_last_block_is_filled_up_with_zeros():
  grads = list(np.random.default_rng(0).normal(size=(3, 6, 5)))
  tx = scale_by_foam(B1, B2, EPS)
  state, found = tx.init({"w": jnp.zeros((6, 5))}), []
  for g in grads:
    updates, state = tx.update({"w": jnp.asarray(g, jnp.float32)}, state)
    found.append(updates["w"])
  assert state.mu["w"].shape == (2, 5)
  reference.check(found, foam(grads))


def test_a_gradient_that_is_constant_in_blocks_gives_adam():
  rows = [np.repeat(g, BLOCK, axis=0) for g in
          np.random.default_rng(0).normal(size=(3, 2, 5))]  # fmt: skip
  tx = scale_by_foam(reference.B1, reference.B2, 0.0)
  state, found = tx.init({"w": jnp.zeros((8, 5))}), []
  for g in rows:
    updates, state = jax.jit(tx.update)({"w": jnp.asarray(g)}, state)
    found.append(-reference.RATE * updates["w"])
  reference.check(found, reference.adam(rows))
