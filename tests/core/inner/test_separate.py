"""The parameter term of an inner update, for the optimizers of Optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax.inner import separate

PARAMS = {"a": jnp.linspace(-1.0, 2.0, 24).reshape(4, 6), "b": jnp.ones(6)}
GRADS = jax.tree.map(lambda x: x**2 - 0.5, PARAMS)
MASK = {"a": True, "b": False}
contrib = optax.contrib

FREE = {
  "adam": optax.adam(1e-3),
  "sgd": optax.sgd(0.1, momentum=0.9),
  "factored": optax.scale_by_factored_rms(),
  "sm3": optax.sm3(1e-3),
  "not on this leaf": optax.adamw(1e-3, mask={"a": False, "b": True}),
}
SEPARABLE = {
  "adamw": optax.adamw(optax.linear_schedule(1e-2, 0, 9), weight_decay=0.1),
  "adamw, mask": optax.adamw(1e-2, weight_decay=0.1, mask=MASK),
  "adamw, bfloat16": optax.adamw(1e-2, mu_dtype="bfloat16", weight_decay=0.1),
  "nadamw": optax.nadamw(1e-2, weight_decay=0.1),
  "lion": optax.lion(1e-2, weight_decay=0.1),
  "adan": optax.adan(1e-2, weight_decay=0.1),
  "ademamix": contrib.ademamix(1e-2, weight_decay=0.1),
  "muon": contrib.muon(1e-2, weight_decay=0.1),
  "adafactor": optax.adafactor(
    1e-2, multiply_by_parameter_scale=False, weight_decay_rate=0.1
  ),
  "l2, no momentum": optax.chain(
    optax.add_decayed_weights(0.1), optax.sgd(0.1)
  ),
  "clip": optax.chain(
    optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=0.1)
  ),
  "noise": optax.chain(
    optax.add_noise(0.1, 0.1, 0), optax.adamw(1e-2, weight_decay=0.1)
  ),
  "inject": optax.inject_hyperparams(optax.adamw)(1e-2, weight_decay=0.1),
  "multi steps": optax.MultiSteps(
    optax.adamw(1e-2, weight_decay=0.1), 1
  ).gradient_transformation(),
  "masked": optax.masked(optax.adamw(1e-2, weight_decay=0.1), MASK),
  "partition": optax.partition(
    {"x": optax.adamw(1e-2, weight_decay=0.1), "y": optax.sgd(0.1)},
    {"a": "x", "b": "y"},
  ),
  "jitted": optax.GradientTransformation(
    optax.adamw(1e-2, weight_decay=0.1).init,
    jax.jit(optax.adamw(1e-2, weight_decay=0.1).update),
  ),
}
COUPLED = {
  "lamb": optax.lamb(1e-2),
  "lars": optax.lars(1e-2),
  "fromage": optax.fromage(1e-2),
  "novograd": optax.novograd(1e-2, weight_decay=0.1),
  "adafactor with scale": optax.adafactor(1e-2),
  "prodigy": contrib.prodigy(),
  "schedule free": contrib.schedule_free_adamw(1e-2),
  "l2 inside adam": optax.chain(
    optax.add_decayed_weights(0.1), optax.adam(1e-2)
  ),
  "l2 with momentum": optax.chain(
    optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)
  ),
  "nonnegative": optax.chain(optax.adam(1e-2), optax.keep_params_nonnegative()),
  "adaptive clip": optax.adaptive_grad_clip(0.1),
  "if finite": optax.apply_if_finite(optax.adamw(1e-2), 3),
}


def warm(inner):
  """The inner optimizer and its state after two steps."""
  inner = optax.with_extra_args_support(inner)
  state = inner.init(PARAMS)
  for _ in range(2):
    _, state = inner.update(GRADS, state, PARAMS)
  return inner, state


def param_term(inner, state):
  return separate.param_term(inner, state, PARAMS, {"a": None}, {})


@pytest.mark.parametrize("name", FREE)
def test_no_parameter_term(name):
  assert param_term(*warm(FREE[name])) == {}


@pytest.mark.parametrize("name", SEPARABLE)
def test_parameter_term_is_the_difference_to_zero_parameters(name):
  inner, state = warm(SEPARABLE[name])
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  with_params, _ = inner.update(GRADS, state, PARAMS)
  without, _ = inner.update(GRADS, state, zeros)
  expected = with_params["a"] - without["a"]
  assert np.abs(expected).max() > 1e-5
  term = param_term(inner, state)["a"]
  np.testing.assert_allclose(term, expected, atol=1e-7)


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_optimizers_are_recognized(name):
  inner, state = warm(COUPLED[name])
  with pytest.raises(separate.CoupledError, match=r"'a'|all leaves"):
    param_term(inner, state)


def test_extra_arguments_reach_the_inner_optimizer():
  inner = optax.chain(
    optax.adamw(1e-2, weight_decay=0.1), contrib.reduce_on_plateau()
  )
  terms = separate.param_term(
    inner, inner.init(PARAMS), PARAMS, {"a": None}, {"value": 1.0}
  )
  np.testing.assert_allclose(terms["a"], -1e-3 * PARAMS["a"], rtol=1e-6)
