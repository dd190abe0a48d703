"""What a long run has to bear, and the methods that have to bear it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax as go

RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # to choose from
RESTARTS = 10  # cycles of the learning rate
GAP = 10  # steps between two bases of a matrix
CLIP = 1.0  # global norm of the gradient
SPIKE = 1e4  # factor on the gradient
SPIKES, NANS = 0.01, 0.005  # shares of the steps
PATIENCE = 100  # steps in a row that may be left out


class Scenario(NamedTuple):
  """A long run.

  Attributes:
    name: Its name on the command line.
    title: Its name in the table.
    weights: Dtype of the weights.
    compute: Dtype in which the network is computed.
    fault: `spikes` or `nans` in the gradient, or an empty string.
    restarts: Whether the learning rate restarts; it is constant otherwise.
    guarded: Whether steps with a gradient that is not finite are left out.
  """

  name: str
  title: str
  weights: Any = jnp.float32
  compute: Any = jnp.float32
  fault: str = ""
  restarts: bool = False
  guarded: bool = True


SCENARIOS = {
  scenario.name: scenario
  for scenario in (
    Scenario("float32", "float32"),
    Scenario(
      "bfloat16", "weights in bfloat16", jnp.bfloat16, compute=jnp.bfloat16
    ),
    Scenario(
      "float16", "computed in float16, loss scaled", compute=jnp.float16
    ),
    Scenario("spikes", "1% of gradients times 10,000", fault="spikes"),
    Scenario("nans", "0.5% of gradients NaN", fault="nans"),
    Scenario(
      "unguarded", "the same, nothing left out", fault="nans", guarded=False
    ),
    Scenario("restarts", "ten restarts of the learning rate", restarts=True),
  )
}


def rates(scenario: Scenario, steps: int, highest: float) -> np.ndarray:
  """The learning rate of each step, up to the highest."""
  warm_up = np.minimum(1, np.arange(1, steps + 1) / min(200, steps))
  if not scenario.restarts:
    return (highest * warm_up).astype(np.float32)
  cycle = max(1, steps // RESTARTS)
  phase = np.arange(steps) % cycle / cycle
  shape = (1 + np.cos(np.pi * phase)) / 2
  return (highest * warm_up * shape).astype(np.float32)


def factors(scenario: Scenario, steps: int) -> np.ndarray:
  """What the gradient of each step is multiplied with: 1, except for faults."""
  values = np.ones(steps, np.float32)
  if scenario.fault:
    spikes = scenario.fault == "spikes"
    hit = np.random.default_rng(0).random(steps) < (SPIKES if spikes else NANS)
    values[hit] = SPIKE if spikes else np.nan
  return values


def optimizer(
  method: str, scenario: Scenario
) -> optax.GradientTransformationExtraArgs:
  """A method whose learning rate is a part of its state."""

  # By default a rate has the weights' dtype, in which 0.01 is not 0.01.
  @functools.partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
  def build(learning_rate: Any) -> optax.GradientTransformation:
    tx = optax.chain(
      optax.clip_by_global_norm(CLIP), METHODS[method][1](learning_rate)
    )
    if scenario.guarded:
      return optax.apply_if_finite(tx, max_consecutive_errors=PATIENCE)
    return tx

  return build(learning_rate=0.0)


def _adamw(rate: Any) -> optax.GradientTransformation:
  """AdamW with moments in float32, for weights of any dtype."""
  tx = optax.adamw(rate, weight_decay=0.0)
  single = lambda tree: optax.tree.cast(tree, jnp.float32)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    new, state = tx.update(single(updates), state, single(params))
    return optax.tree.cast_like(new, updates), state

  return optax.GradientTransformation(
    lambda params: tx.init(single(params)), update
  )


def _galore(**options: Any) -> Callable[[Any], optax.GradientTransformation]:
  return lambda rate: go.galore_adamw(
    rate,
    weight_decay=0.0,
    rank=0.25,
    scale=1.0,
    update_proj_gap=GAP,
    **options,
  )


def _galore_8bit(rate: Any) -> optax.GradientTransformation:
  return go.galore_adamw_8bit(
    rate,
    weight_decay=0.0,
    rank=0.25,
    scale=1.0,
    update_proj_gap=GAP,
    min_size=0,
    basis_dtype="int8",
    residual="normalized",
  )


METHODS = {
  "adamw": ("AdamW", _adamw),
  "galore": ("GaLore", _galore(residual="normalized")),
  "galore_plain": ("GaLore, no residual", _galore()),
  "galore_8bit": ("GaLore, 8-bit moments and bases", _galore_8bit),
}


class LossScale(NamedTuple):
  """A dynamic loss scale: halved by overflows, doubled after `EVERY` steps."""

  scale: jax.Array
  good_steps: jax.Array

  EVERY = 500

  @classmethod
  def start(cls) -> "LossScale":
    """The scale before the first step."""
    return cls(jnp.float32(2**15), jnp.int32(0))

  def after(self, finite: jax.Array) -> "LossScale":
    """The scale of the next step."""
    count = jnp.where(finite, self.good_steps + 1, 0)
    grows = count >= self.EVERY
    scale = jnp.where(grows, self.scale * 2, self.scale)
    scale = jnp.where(finite, jnp.minimum(scale, 2.0**24), self.scale / 2)
    return LossScale(jnp.maximum(scale, 1.0), jnp.where(grows, 0, count))
