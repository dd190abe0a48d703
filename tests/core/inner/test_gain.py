"""The gain of an inner update, for the optimizers of Optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax.inner import gain

GRADS = {"a": jnp.linspace(-1.0, 2.0, 24).reshape(4, 6), "b": jnp.ones(6)}
SCHEDULE = optax.linear_schedule(0.0, 0.3, 3)

# Optimizer to its gain after two steps; None for 1.
GAINS = {
  "no factor": (optax.scale_by_adam(), None),
  "sgd": (optax.sgd(0.1), -0.1),
  "momentum": (optax.sgd(0.1, momentum=0.9, nesterov=True), -0.1),
  "adam": (optax.adam(1e-3), -1e-3),
  "schedule": (optax.adam(SCHEDULE), -0.2),
  "inject": (optax.inject_hyperparams(optax.adam)(SCHEDULE), -0.2),
  "lion": (optax.lion(1e-3, weight_decay=0.0), -1e-3),
  "several": (
    optax.chain(optax.scale_by_adam(), optax.scale(-0.5), optax.scale(4.0)),
    -2.0,
  ),
  "clip": (optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.5)), -0.5),
  "partition": (
    optax.partition(
      {"x": optax.adam(0.5), "y": optax.sgd(0.1)}, {"a": "x", "b": "y"}
    ),
    -0.5,
  ),
  "jitted": (
    optax.GradientTransformation(
      optax.adam(0.5).init, jax.jit(optax.adam(0.5).update)
    ),
    -0.5,
  ),
}
UNKNOWN = {
  "running mean": optax.chain(optax.adam(1e-3), optax.ema(0.9)),
  "clip": optax.chain(optax.adam(1e-3), optax.clip(1.0)),
}


def find_gains(inner):
  """The gains after two steps."""
  inner = optax.with_extra_args_support(inner)
  state = inner.init(GRADS)
  for _ in range(2):
    _, state = inner.update(GRADS, state, GRADS)
  return gain.find_gains(inner, GRADS, state, GRADS, {"a": None}, {})


@pytest.mark.parametrize("name", GAINS)
def test_gain(name):
  inner, expected = GAINS[name]
  gains = find_gains(inner)
  assert gains.keys() == {"a"}
  if expected is None:
    assert gains["a"] is None
  else:
    np.testing.assert_allclose(gains["a"], expected, rtol=1e-6)


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_gains(name):
  with pytest.raises(gain.UnknownGainError, match="a"):
    find_gains(UNKNOWN[name])
