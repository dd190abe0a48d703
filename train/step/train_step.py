"""The training step: a pure function, jitted once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from train.config.schema import TrainConfig
from train.parallel import mesh as mesh_lib
from train.step import backward, losses
from train.step.losses import Gradient, Loss
from train.step.state import AbstractState, TrainState, Updater


def make_train_step(
  tx: Updater,
  abstract: AbstractState,
  config: TrainConfig,
  low_rank_parts: int = 1,
  gradient: Gradient | None = None,
  loss: Loss | None = None,
  reduce: str = "float32",
) -> Callable[[TrainState, Any], tuple[TrainState, dict]]:
  """The jitted training step; it consumes the state that it is given.

  A step whose loss or gradient is not finite changes neither parameters nor
  optimizer state. It is counted as skipped, and training goes on with the next
  batch.

  Args:
    tx: what updates the weights.
    abstract: the model, and where the state lives.
    config: microbatches, z-loss, rounding and seed.
    low_rank_parts: microbatches whose gradients `tx` adds up at low rank.
    gradient: function of the weights, a batch and the number of the step that
      returns gradient, loss and token count; None for the next-token loss.
    loss: the loss of which gradients at rank r are taken if `config.lean`; None
      for the next-token loss.
    reduce: how those are summed over devices, `mesh.reduce`.

  Returns:
    A function of a state and rows (B, T + 1) int32 that returns the next state
    and a dict of scalars: `loss` in nats a token, `grad_norm` before
    clipping, the number of predicted `tokens`, and the state's `skipped` and
    `skips_in_row`.
  """
  if isinstance(tx, galore_optax.Layerwise):
    step = _in_parts(_without_z_loss(tx), low_rank_parts)
  elif low_rank_parts > 1:
    run = _part_of_step(tx, abstract, config, low_rank_parts, reduce)
    step = _in_parts(run, low_rank_parts)
  else:
    step = whole_step(tx, abstract, config, gradient, loss, reduce)
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(
      abstract.shardings,
      mesh_lib.replicated(abstract.mesh),
    ),
  )


def _without_z_loss(tx: galore_optax.Layerwise) -> Callable:
  """The layer-by-layer step; it reports the loss without the z-loss."""

  def run(params: dict, opt_state: Any, rows: jax.Array) -> tuple:
    params, opt_state, found = tx.step(params, opt_state, rows)
    return params, opt_state, found | {"loss": found["aux"]}

  return run


def _in_parts(run: Callable, count: int) -> Callable:
  """A step in microbatches whose gradients the optimizer itself adds up.

  All microbatches but the last one only add to low-rank accumulators. `run`
  has to leave out gradients that are not finite, because an accumulator
  cannot be restored afterwards.

  Args:
    run: function of parameters, optimizer state and rows that returns the new
      ones and a dict with `loss` and `grad_norm`.
    count: number of microbatches.
  """

  def train_step(
    state: TrainState, rows: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    def part(carry: tuple, rows: jax.Array) -> tuple:
      params, opt_state, metrics = run(*carry, rows)
      return (params, opt_state), metrics

    carry = (state.params, state.opt_state)
    if count == 1:
      (params, opt_state), found = part(carry, rows)
    else:
      parts = mesh_lib.microbatches(rows, count)
      (params, opt_state), found = jax.lax.scan(part, carry, parts)
    loss, norm = found["loss"].mean(), found["grad_norm"].mean()
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    tokens = losses.is_predicted(rows).sum()
    return finish(state, finite, params, opt_state, loss, norm, tokens)

  return train_step


def _part_of_step(
  tx: optax.GradientTransformation,
  abstract: AbstractState,
  config: TrainConfig,
  parts: int,
  reduce: str,
) -> Callable:
  """A microbatch through the model and an optimizer that accumulates."""
  find = backward.make(tx, abstract, config, None, None, reduce)

  def run(params: dict, opt_state: Any, rows: jax.Array) -> tuple:
    # The number of the part, from the first step on: each has draws of its own.
    count = _count_of(opt_state) * parts + _count_of(opt_state, "micro_step")
    found = find(params, opt_state, rows, count)
    weights = abstract.read(params)
    # GaLore replaces gradients that are not finite by zero.
    updates, opt_state = tx.update(found.grads, found.opt_state(True), weights)
    key = _rounding_key(config, _count_of(opt_state))
    params = galore_optax.apply_updates(params, updates, key)
    norm = optax.tree.norm(found.grads)
    return params, opt_state, {"loss": found.loss, "grad_norm": norm}

  return run


def _count_of(opt_state: Any, name: str = "step") -> jax.Array:
  """Number of steps that GaLore has counted, or of parts in the present one."""
  states = optax.tree.get_all_with_path(opt_state, name)
  return states[0][1]


def _rounding_key(config: TrainConfig, count: jax.Array) -> jax.Array | None:
  """The random key for rounding quantized weights; None to round to nearest."""
  if config.rounding == "nearest":
    return None
  return jax.random.fold_in(jax.random.key(config.seed), count)


def finish(
  state: TrainState,
  finite: jax.Array,
  params: dict,
  opt_state: Any,
  loss: jax.Array,
  norm: jax.Array,
  tokens: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """The state after a step, and the step's metrics."""
  skipped = state.skipped + ~finite
  in_row = jnp.where(finite, 0, state.skips_in_row + 1)
  metrics = {"loss": loss, "grad_norm": norm, "tokens": tokens}
  metrics |= {"skipped": skipped, "skips_in_row": in_row}
  new = TrainState(state.step + 1, skipped, in_row, params, opt_state)
  return new, metrics


def whole_step(
  tx: optax.GradientTransformation,
  abstract: AbstractState,
  config: TrainConfig,
  gradient: Gradient | None = None,
  loss: Loss | None = None,
  reduce: str = "float32",
) -> Callable[[TrainState, Any], tuple[TrainState, dict]]:
  """The step that computes the whole gradient before it updates weights.

  It is not jitted; see `make_train_step`.
  """
  find = backward.make(tx, abstract, config, gradient, loss, reduce)

  def train_step(
    state: TrainState, rows: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    found = find(state.params, state.opt_state, rows, state.step)
    _, trained, _ = abstract.differentiable(state.params)
    norm = optax.tree.norm(found.grads)
    finite = jnp.isfinite(found.loss) & jnp.isfinite(norm)
    key = _rounding_key(config, state.step)

    # The old state, with refreshed bases if the step is taken.
    before = found.opt_state(finite)

    updates, opt_state = tx.update(found.grads, before, trained)
    updates = backward.or_nothing(updates, finite)
    params = abstract.add(state.params, updates, key)
    opt_state = backward.select(opt_state, before, finite)
    if abstract.adapters is not None:
      count = state.step - state.skipped + 1
      restarted = abstract.adapters.restart_if_due(
        params, opt_state, count, config.seed
      )
      params, opt_state = backward.select(
        restarted, (params, opt_state), finite
      )
    return finish(
      state, finite, params, opt_state, found.loss, norm, found.tokens
    )

  return train_step


def count_programs(f: Callable) -> int:
  """Number of programs a jitted function has compiled; 0 for a compiled one."""
  size = getattr(f, "_cache_size", None)
  return size() if size else 0
