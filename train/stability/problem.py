"""A small network that follows a teacher whose weights turn slowly.

So gradients never stop, and neither do their subspaces: a basis of the first
steps is of no use later.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

INPUTS, HIDDEN, OUTPUTS = 32, 64, 16
BATCH = 64
PERIOD = (
  5000  # steps in which the teacher's weights come back to where they were
)
NOISE = 0.1  # standard deviation of the targets' noise

Params = Any  # dict of weights: `first`, `second`, `third`


def start(seed: int) -> Params:
  """The network's initial weights, in float32."""
  return _weights(jax.random.key(seed))


def _weights(key: jax.Array) -> Params:
  shapes = {
    "first": (INPUTS, HIDDEN),
    "second": (HIDDEN, HIDDEN),
    "third": (HIDDEN, OUTPUTS),
  }
  keys = jax.random.split(key, len(shapes))
  return {
    name: jax.random.normal(k, shape) * (2 / shape[0]) ** 0.5
    for k, (name, shape) in zip(keys, shapes.items(), strict=True)
  }


def teacher(step: jax.Array) -> Params:
  """The weights to follow at a step."""
  angle = 2 * jnp.pi * step / PERIOD
  return jax.tree.map(
    lambda x, y: jnp.cos(angle) * x + jnp.sin(angle) * y, *_teachers()
  )


@functools.cache
def _teachers() -> tuple[Params, Params]:
  """Two sets of weights, computed now: XLA is slow at folding them."""
  with jax.ensure_compile_time_eval():
    weights = _weights(jax.random.key(1000)), _weights(jax.random.key(1001))
    return jax.device_get(weights)


def forward(params: Params, x: jax.Array) -> jax.Array:
  """Inputs (n, INPUTS) to outputs (n, OUTPUTS), in the weights' dtype."""
  x = x.astype(params["first"].dtype)
  x = jax.nn.relu(x @ params["first"])
  x = jax.nn.relu(x @ params["second"])
  return x @ params["third"]


def batch(step: jax.Array, seed: int) -> tuple[jax.Array, jax.Array]:
  """Inputs and noisy targets of a step."""
  inputs, noise = jax.random.split(
    jax.random.fold_in(jax.random.key(seed), step)
  )
  x = jax.random.normal(inputs, (BATCH, INPUTS))
  y = forward(teacher(step), x)
  return x, y + NOISE * jax.random.normal(noise, y.shape)


def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
  """Mean squared error, in float32."""
  return jnp.mean((forward(params, x).astype(jnp.float32) - y) ** 2)


def held_out_loss(params: Params, step: jax.Array, seed: int) -> jax.Array:
  """The error on inputs that are never trained on, with exact targets.

  Each seed has inputs of its own, so that rates that are chosen by one seed are
  not chosen by what another reports.
  """
  x = jnp.asarray(_held_out(seed))
  params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
  return loss(params, x, forward(teacher(step), x))


@functools.cache
def _held_out(seed: int) -> np.ndarray:
  with jax.ensure_compile_time_eval():
    x = jax.random.normal(jax.random.key(2000 + seed), (512, INPUTS))
    return jax.device_get(x)
