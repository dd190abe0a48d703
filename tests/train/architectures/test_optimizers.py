"""The methods share their schedule and the factor on the matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from train.architectures import optimizers
from train.common.errors import UserError

PARAMS = {
  "w": jnp.ones((8, 16)),
  "kernel": jnp.ones((1, 2, 4, 16)),
  "b": jnp.ones(3),
}
OPTIONS = optimizers.Options(
  steps=10, rank=2, gap=2, rules=(), kernels="kernel"
)


@pytest.mark.parametrize("method", optimizers.METHODS)
def test_the_factor_is_for_the_matrices_alone(method):
  grads = jax.tree.map(jnp.ones_like, PARAMS)

  # The factor is a part of the state, so that one program serves both.
  update = jax.jit(optimizers.make(method, 0.1, 1.0, OPTIONS).update)

  def second_update(multiplier):
    state = optimizers.make(method, 0.1, multiplier, OPTIONS).init(PARAMS)
    for _ in range(2):  # the rate of the first step is 0
      updates, state = update(grads, state, PARAMS)
    return updates

  ones, halves = second_update(1.0), second_update(0.5)
  np.testing.assert_allclose(halves["b"], ones["b"], rtol=1e-6)
  for name in ("w", "kernel"):
    assert jnp.abs(ones[name]).max() > 1e-3
    np.testing.assert_allclose(halves[name], ones[name] / 2, rtol=1e-5)


def test_muon_reads_kernels_as_the_rules_do():
  options = OPTIONS._replace(rules=(("kernel", optimizers.ONE_MATRIX),))
  axes = optimizers._axes(PARAMS, options)
  dimensions = optax.contrib.MuonDimensionNumbers
  assert axes["kernel"] == dimensions((0, 1, 2), 3)
  assert axes["w"] == dimensions(-2, -1)


@pytest.mark.parametrize("method", ["galore_one_matrix", "galore_tucker"])
def test_a_model_without_convolutions_says_so(method):
  options = OPTIONS._replace(kernels=None)
  with pytest.raises(UserError, match="no convolutions"):
    optimizers.make(method, 0.1, 1.0, options).init(PARAMS)


@pytest.mark.parametrize(
  ("method", "shapes"),
  [
    ("galore", {"left": (1, 2, 4, 2)}),
    ("galore_one_matrix", {"left": (8, 2)}),
    ("galore_tucker", {"axis2": (4, 2), "axis3": (16, 2)}),
  ],
)
def test_ways_to_read_a_kernel(method, shapes):
  state = optimizers.make(method, 0.1, 1.0, OPTIONS).init(PARAMS)
  bases = go.find_bases(state)["kernel"]
  assert {name: bases[name].shape for name in bases} == shapes
