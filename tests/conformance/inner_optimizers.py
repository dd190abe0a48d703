"""Optimizers to put inside of GaLore."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tests.conformance import cases


class _CodesState(NamedTuple):
  codes: Any
  half_codes: Any
  scale: jax.Array
  key: jax.Array


def momentum_in_codes():
  """Momentum in stochastically rounded int8: leaves of unusual kinds."""

  def init(params):
    zeros = lambda dtype: jax.tree.map(
      lambda x: jnp.zeros(jnp.shape(x), dtype), params
    )
    return _CodesState(
      zeros(jnp.int8), zeros(jnp.int4), jnp.float32(0.01), jax.random.key(0)
    )

  def update(updates, state, params=None):
    del params
    key, now = jax.random.split(state.key)
    mean = jax.tree.map(
      lambda c, g: 0.9 * state.scale * c.astype(g.dtype) + 0.1 * g,
      state.codes,
      updates,
    )
    noise = lambda x: jax.random.uniform(now, x.shape) - 0.5
    code = lambda x: jnp.round(x / state.scale + noise(x))
    codes = jax.tree.map(
      lambda x: jnp.clip(code(x), -127, 127).astype(jnp.int8), mean
    )
    half = jax.tree.map(lambda c: (c // 16).astype(jnp.int4), codes)
    updates = jax.tree.map(lambda x: -0.1 * x, mean)
    return updates, _CodesState(codes, half, state.scale, key)

  return optax.GradientTransformation(init, update)


def _masked_adam():
  return optax.masked(optax.adam(cases.RATE), cases.KERNEL_ONLY)


# Those whose weight decay leaves the subspace.
DECAYING = ("partition", "nadamw", "lion", "inject_hyperparams")
INNER = {
  "adam": lambda: optax.adam(cases.RATE),
  "adam, masked": _masked_adam,
  "partition": lambda: optax.partition(
    {"a": optax.adamw(cases.RATE), "b": optax.sgd(cases.RATE, 0.9)},
    {"bias": "b", "kernel": "a"},
  ),
  "nadamw": lambda: optax.nadamw(cases.RATE, mask=cases.KERNEL_ONLY),
  "lion": lambda: optax.lion(cases.RATE),
  "sgd": lambda: optax.sgd(cases.RATE),
  "rmsprop": lambda: optax.rmsprop(cases.RATE, momentum=0.9),
  "adafactor": lambda: cases.OPTIMIZERS["galore_adafactor"].plain(),
  "factored_rms": lambda: optax.scale_by_factored_rms(min_dim_size_to_factor=2),
  "MultiSteps": lambda: optax.MultiSteps(
    optax.adam(cases.RATE), 2
  ).gradient_transformation(),
  "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(
    optax.linear_schedule(1e-2, 0.0, 9)
  ),
  "codes": momentum_in_codes,
}
