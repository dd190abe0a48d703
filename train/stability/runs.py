"""Makes a long run, and measures at intervals what could drift."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax as go
from train.measure.bases import orthogonality_error
from train.stability import problem, scenarios
from train.stability.scenarios import LossScale, Scenario

POINTS = 100  # measurements of a run


class State(NamedTuple):
  """What a run carries from step to step."""

  step: jax.Array
  params: problem.Params
  opt_state: Any
  scale: LossScale


def make(
  method: str,
  scenario: Scenario,
  steps: int,
  rate: float,
  seed: int = 0,
  say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Makes a run.

  Returns:
    Lists over the measurements: `step`, held-out `loss`,
    `basis_error` (the largest entry of |P^T P - I| over all bases), `largest`
    (the largest number of the optimizer's state, in absolute value); None where
    there is no such finite number. `finite`: whether all numbers of weights and
    state were finite at every measurement. `faulty`: steps with a gradient that
    was not. `scale`: the last loss scale. `seconds`: what it took.
  """
  tx = scenarios.optimizer(method, scenario)
  advance = _advance(tx, scenario, seed)
  params = optax.tree.cast(problem.start(seed), scenario.weights)
  state = State(jnp.int32(0), params, tx.init(params), LossScale.start())
  inputs = (
    scenarios.rates(scenario, steps, rate),
    scenarios.factors(scenario, steps),
  )
  begin, points, faulty = time.perf_counter(), [], 0
  for part in np.array_split(np.arange(steps), min(POINTS, steps)):
    state, count = advance(state, *(x[part] for x in inputs))
    faulty += int(count)
    points.append(measure(state, seed))
    if len(points) % 25 == 0:
      say(f"step {points[-1]['step']}/{steps}  loss {points[-1]['loss']}")
  columns = ("step", "loss", "basis_error", "largest")
  return {
    **{name: [point[name] for point in points] for name in columns},
    "finite": all(point["finite"] for point in points),
    "faulty": faulty,
    "scale": float(state.scale.scale),
    "seconds": round(time.perf_counter() - begin, 1),
  }


def _advance(
  tx: optax.GradientTransformationExtraArgs, scenario: Scenario, seed: int
) -> Callable[..., tuple[State, jax.Array]]:
  """A function that makes several steps, and counts the faulty gradients."""
  scaled = scenario.compute == jnp.float16

  def loss(params: problem.Params, scale: jax.Array, step: jax.Array) -> Any:
    computed = optax.tree.cast(params, scenario.compute)
    return scale * problem.loss(computed, *problem.batch(step, seed))

  def one(state: State, inputs: tuple) -> tuple[State, jax.Array]:
    rate, factor = inputs
    scale = state.scale.scale if scaled else jnp.float32(1)
    grads = jax.grad(loss)(state.params, scale, state.step)
    grads = jax.tree.map(lambda g: g * (factor / scale).astype(g.dtype), grads)
    finite = jnp.isfinite(optax.tree.norm(optax.tree.cast(grads, jnp.float32)))
    opt_state = state.opt_state._replace(hyperparams={"learning_rate": rate})
    updates, opt_state = tx.update(grads, opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    loss_scale = state.scale.after(finite)
    return State(state.step + 1, params, opt_state, loss_scale), ~finite

  @jax.jit
  def advance(state: State, *inputs: jax.Array) -> tuple[State, jax.Array]:
    state, faulty = jax.lax.scan(one, state, inputs)
    return state, faulty.sum()

  return advance


def measure(state: State, seed: int) -> dict[str, Any]:
  """What could drift, after the steps so far."""
  loss, largest, finite = jax.device_get(_summary(state, seed))
  errors = [
    orthogonality_error(basis)
    for sides in go.find_bases(state.opt_state).values()
    for basis in sides.values()
  ]
  return {
    "step": int(state.step),
    "loss": float(f"{loss:.4g}") if math.isfinite(loss) else None,
    "basis_error": float(f"{max(errors):.3g}") if errors else None,
    "largest": float(f"{largest:.4g}") if math.isfinite(largest) else None,
    "finite": bool(finite),
  }


@functools.partial(jax.jit, static_argnums=1)
def _summary(state: State, seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Held-out loss, largest number of the optimizer's state, all finite."""
  floats = lambda tree: [
    x.astype(jnp.float32)
    for x in jax.tree.leaves(tree)
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  finite = [jnp.isfinite(x).all() for x in floats(state)]
  largest = [jnp.abs(x).max() for x in floats(state.opt_state)]
  return (
    problem.held_out_loss(state.params, state.step, seed),
    jnp.array(largest).max(),
    jnp.array(finite).all(),
  )
