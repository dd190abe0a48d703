"""One compiled program for all runs that differ in numbers alone.

A search tries many learning rates, multipliers and decays. If these were
constants of the training step, each run would be compiled anew. Here they are
arguments: the numbers of a run are arrays, and a program is compiled once a
method. The program trains one run, or several side by side: then every array
has one axis more, and each index of that axis is a *lane*.

What shapes the program stays constant: the method, ranks, bursts, dtypes.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from train.config import schema
from train.parallel import mesh as mesh_lib
from train.step import losses as losses_lib
from train.step import optimizer, setup, train_step
from train.step import state as state_lib

# Options of the optimizer that are arrays, and what stands for them in the
# config that is common to the lanes.
NUMBERS: dict[str, Any] = {
  "learning_rate": 0.5,
  "matrix_lr": 0.5,
  "b2": 0.999,
  "residual_factor": 1.0,
  "residual_decay": 0.95,
  "update_proj_gap": 50,
}
MOST_STEPS = 32  # in one dispatch

Config = TypeVar("Config")
Numbers = dict[str, Any]  # arrays (), or (lanes,)


class Program(NamedTuple):
  """The compiled functions of the lanes that have one common config.

  Attributes:
    setup: the model and its training state, of a single lane.
    state: shapes and shardings of the state of all lanes.
    chunk: steps in one dispatch.
    start: from numbers to a new state.
    advance: from a state, numbers and rows (chunk, B, T + 1), with lanes
      (chunk, lanes, B, T + 1), to the next state and a dict of (chunk,) or
      (chunk, lanes) metrics.
    evaluate: from parameters and rows to summed losses and token counts.
  """

  setup: setup.Setup
  state: state_lib.AbstractState
  chunk: int
  start: Callable[[Numbers], state_lib.TrainState]
  advance: Callable[..., tuple[state_lib.TrainState, dict]]
  evaluate: Callable[[Any, Any], tuple[jax.Array, jax.Array]]


def common(config: schema.Config) -> schema.Config:
  """The config without what may differ between the lanes of a program."""
  chosen = config.optimizer
  stand_ins = {
    name: value
    for name, value in NUMBERS.items()
    # Without a residual, its options are at their defaults.
    if chosen.residual != "none" or not name.startswith("residual_")
  }
  chosen = optimizer.resolve(chosen, config.train.steps)
  return dataclasses.replace(
    config,
    optimizer=dataclasses.replace(chosen, **stand_ins),
    train=dataclasses.replace(config.train, seed=0),
  )


def numbers(configs: Sequence[schema.Config]) -> Numbers:
  """The numbers of runs: arrays () of a single one, (lanes,) of several."""
  found: Numbers = {
    name: np.array(
      [getattr(c.optimizer, name) for c in configs],
      np.int32 if isinstance(stand_in, int) else np.float32,
    )
    for name, stand_in in NUMBERS.items()
  }
  found["seed"] = np.array([c.train.seed for c in configs], np.int32)
  return found if len(configs) > 1 else {k: v[0] for k, v in found.items()}


def make(config: schema.Config, lanes: int, mesh: jax.sharding.Mesh) -> Program:
  """Sets up the program of a number of lanes; it is compiled when first run.

  Args:
    config: what `common` returns for all of the runs.
    lanes: number of runs side by side.
    mesh: one device.
  """
  made = setup.make(config, mesh)
  start, step, evaluate = _of_one_lane(config, made)
  state = _state_of(lanes, made.abstract)
  if lanes > 1:
    # All lanes are at the same step.
    axes = state_lib.TrainState(None, 0, 0, 0, 0)
    start = jax.vmap(start, out_axes=axes)
    step = jax.vmap(step, in_axes=(axes, 0, 0), out_axes=(axes, 0))
    evaluate = jax.vmap(evaluate, in_axes=(0, None), out_axes=(0, 0))

  def advance(state: state_lib.TrainState, values: Numbers, rows: jax.Array):
    if len(rows) > 1:
      one = lambda state, rows: step(state, values, rows)
      return jax.lax.scan(one, state, rows)
    state, metrics = step(state, values, rows[0])
    return state, jax.tree.map(lambda x: x[None], metrics)

  return Program(
    made,
    state,
    _chunk(config),
    jax.jit(start, out_shardings=state.shardings),
    jax.jit(advance, donate_argnums=0, out_shardings=(state.shardings, None)),
    jax.jit(evaluate),
  )


def _of_one_lane(
  config: schema.Config, made: setup.Setup
) -> tuple[Callable, Callable, Callable]:
  """Start, step and evaluation of a single run, as functions of numbers."""

  def optimizer_of(values: Numbers) -> Any:
    chosen = {name: values[name] for name in NUMBERS}
    return optimizer.make_optimizer(
      _with_arrays(config.optimizer, **chosen), config.train.steps
    )

  def start(values: Numbers) -> state_lib.TrainState:
    tx = optimizer_of(values)
    return state_lib.new_state(tx, made.abstract, values["seed"])

  def step(state: state_lib.TrainState, values: Numbers, rows: jax.Array):
    train = _with_arrays(config.train, seed=values["seed"])
    tx = optimizer_of(values)
    return train_step.whole_step(tx, made.abstract, train)(state, rows)

  def evaluate(params: dict, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    return losses_lib.evaluate(made.abstract, params, rows)

  return start, step, evaluate


def _with_arrays(config: Config, **arrays: Any) -> Config:
  """A copy of a config with arrays in place of numbers.

  The config's checks cannot read arrays. They have been made on the config of
  each lane.
  """
  copied = copy.copy(config)
  for name, value in arrays.items():
    object.__setattr__(copied, name, value)
  return copied


def _state_of(
  lanes: int, abstract: state_lib.AbstractState
) -> state_lib.AbstractState:
  """The state of all lanes: of several, every array but `step` has an axis."""
  if lanes == 1:
    return abstract
  whole = mesh_lib.replicated(abstract.mesh)
  add_axis = lambda x: jax.ShapeDtypeStruct((lanes, *x.shape), x.dtype)
  state = jax.tree.map(add_axis, abstract.state)
  return abstract._replace(
    state=state._replace(step=abstract.state.step),
    shardings=jax.tree.map(lambda _: whole, abstract.state),
  )


def _chunk(config: schema.Config) -> int:
  """Steps in one dispatch: as many as evaluations and checkpoints allow.

  On a CPU it is one, because its compiler does not run the operations of a
  loop on several cores.
  """
  if jax.default_backend() == "cpu":
    return 1
  stops = (config.train.steps, config.run.eval_every)
  common_divisor = int(np.gcd.reduce(stops))
  return max(n for n in range(1, MOST_STEPS + 1) if common_divisor % n == 0)
