"""A model of three layers, and a matrix to be found, for short trainings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax import Layered, Projection, layerwise

MODEL = Layered(
  first=lambda params, batch: batch @ params["inner"],
  layer=lambda w, x: x + jnp.tanh(x @ w),
  last=lambda params, x, batch: jnp.mean((x @ params["outer"] - 1) ** 2),
)
RULES = (("layers", Projection()), ("", None))  # the ends at full rank


def train_both_ways(tx, steps, atol):
  """The states of a training layer by layer, and of the usual one.

  The weights must have come out alike.
  """
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {
    "inner": normal(8, 16),
    "layers": normal(3, 16, 16) / 8,
    "outer": normal(16, 1),
  }
  init, step = layerwise(tx, MODEL)
  fused, plain = params, params
  state, other = init(params), tx.init(params)
  step = jax.jit(step)

  @jax.jit
  def usual(params, state, batch):
    grads = jax.grad(MODEL.loss)(params, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(steps):
    batch = normal(4, 8)
    fused, state, _ = step(fused, state, batch)
    plain, other = usual(plain, other, batch)
  for name, x in plain.items():
    np.testing.assert_allclose(fused[name], x, atol=atol)
  return state, other


def left_of_the_way(tx, shape, steps=60):
  """Which part of the distance to a random target training leaves."""
  rng = np.random.default_rng(0)
  target = jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {"w": jnp.zeros(shape)}
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    grads = {"w": params["w"] - target}
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(steps):
    params, state = step(params, state)
  distance = jnp.linalg.norm(params["w"] - target)
  return float(distance / jnp.linalg.norm(target))
