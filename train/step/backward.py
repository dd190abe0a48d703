"""The backward pass of a step: whole gradients, or gradients at rank r."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import galore_optax
from train.config.schema import TrainConfig
from train.parallel import quantized_sum
from train.step import losses
from train.step.losses import Gradient, Loss
from train.step.state import AbstractState


class Backward(NamedTuple):
  """What the backward pass of a step finds."""

  grads: Any  # of what is trained; those of projected weights may have rank r
  loss: jax.Array  # (), float32
  tokens: jax.Array  # (), int32
  # From whether the step is taken to the state with bases that fit the
  # gradients; the state as it was if not.
  opt_state: Callable[[Any], Any]


def make(
  tx: optax.GradientTransformation,
  abstract: AbstractState,
  config: TrainConfig,
  gradient: Gradient | None,
  loss: Loss | None,
  reduce: str = "float32",
) -> Callable[[dict, Any, Any, jax.Array], Backward]:
  """A function of parameters, optimizer state, batch and step's number.

  Args:
    tx: the optimizer.
    abstract: the model, and where the state lives.
    config: microbatches, z-loss and seed.
    gradient: see `train.step.train_step.make_train_step`.
    loss: see there.
    reduce: how gradients at rank r are summed over devices, `mesh.reduce`.
  """
  if config.lean:
    loss = loss or losses.next_token_loss(abstract, config)
    return _lean(tx, abstract, config, loss, reduce)
  if gradient is None:
    of_tokens = losses.make_gradient(abstract, config)
    gradient = lambda weights, rows, step: of_tokens(weights, rows)

  def usual(params: dict, opt_state: Any, batch: Any, step: jax.Array):
    weights, _, back = abstract.differentiable(params)
    grads, loss, tokens = gradient(weights, batch, step)
    return Backward(back(grads), loss, tokens, lambda is_taken: opt_state)

  return usual


def _lean(
  tx: optax.GradientTransformation,
  abstract: AbstractState,
  config: TrainConfig,
  loss: Loss,
  reduce: str,
) -> Callable[[dict, Any, Any, jax.Array], Backward]:
  """The same with gradients at rank r."""
  differentiate = galore_optax.deferred_value_and_grad(
    loss.share,
    tx,
    has_aux=True,
    dtype=abstract.config.dtype,
    axis_name="data" if reduce == "int8" else None,
  )
  run = _whole if config.accumulate == 1 else _in_parts
  run = run(differentiate, loss, config.accumulate)
  if reduce == "int8":
    run = _on_each_device(run, abstract, config.seed)

  def lean(params: dict, opt_state: Any, batch: Any, step: jax.Array):
    _, items, _, _ = loss.of(batch, step)
    grads, alone, refreshed = run(params, opt_state, batch, items, step)
    return Backward(grads, alone, loss.count(batch)[1], refreshed)

  return lean


# From parameters, optimizer state, a batch, the number of its items and that of
# the step to gradients, the loss without penalties and a function that returns
# the refreshed state; its argument is whether the step is taken.
_Run = Callable[[dict, Any, Any, jax.Array, jax.Array], tuple]


def _whole(differentiate: Callable, loss: Loss, count: int) -> _Run:
  """The gradients of a batch in one part."""
  del loss, count

  def run(params: dict, opt_state: Any, batch: Any, items: Any, step: Any):
    (_, alone), grads, refreshed = differentiate(
      params, opt_state, None, batch, items, step, 0
    )
    return grads, alone, refreshed

  return run


def _in_parts(differentiate: Callable, loss: Loss, count: int) -> _Run:
  """The gradients of a batch in `count` parts, added up in float32.

  The first part's gradient refreshes the bases.
  """

  def run(params: dict, opt_state: Any, batch: Any, items: Any, step: Any):
    def one(opt_state: Any, part: Any, index: jax.Array) -> tuple:
      (_, alone), grads, refreshed = differentiate(
        params, opt_state, index == 0, part, items, step, index
      )
      return refreshed(True), (grads, alone)

    def add(carry: tuple, part: tuple) -> tuple[tuple, None]:
      opt_state, found = one(carry[0], *part)
      total = jax.tree.map(lambda a, b: a + b, carry[1], found)
      return (opt_state, total), None

    parts = (loss.divide(batch, count), jnp.arange(count))
    first = jax.tree.map(lambda x: x[0], parts)
    _, like = jax.eval_shape(one, opt_state, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
    (new, (grads, alone)), _ = jax.lax.scan(add, (opt_state, zeros), parts)
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, like[0])
    return grads, alone, functools.partial(select, new, opt_state)

  return run


def select(new: Any, old: Any, is_taken: jax.Array) -> Any:
  """The new arrays if the step is taken, else the old ones.

  A selection is made in place. A conditional would have the old state and the
  new one in memory at once, and a GPU would wait for its predicate.
  """
  return jax.tree.map(lambda a, b: jnp.where(is_taken, a, b), new, old)


def or_nothing(updates: Any, is_taken: jax.Array) -> Any:
  """The updates if the step is taken, else what changes no weight at all.

  A selection of weights would have the old and the new ones in memory at once.
  Negative zero is the number that leaves both zeros as they are.
  """
  return jax.tree.map(
    lambda u: jnp.where(is_taken, u, jnp.full_like(u, -0.0)), updates
  )


# Sets the draws apart from those that round weights in the same step.
_STREAM = 8


def _on_each_device(run: _Run, abstract: AbstractState, seed: int) -> _Run:
  """The same of each device's rows, and their sums in eight bits.

  Gradients of all parts of a batch are added up on the device, and sent once.
  """

  def of_device(
    params: dict, opt_state: Any, batch: Any, items: Any, step: jax.Array
  ) -> tuple:
    grads, alone, refreshed = run(params, opt_state, batch, items, step)
    key = jax.random.fold_in(jax.random.key(seed), _STREAM)
    key = jax.random.fold_in(key, step)
    along = jax.tree.map(_axis_of_blocks, grads, abstract.weights)
    grads = quantized_sum.psum_int8(grads, along, "data", key)
    return grads, jax.lax.psum(alone, "data"), refreshed(True)

  whole = jax.P()
  mapped = jax.shard_map(
    of_device,
    mesh=abstract.mesh,
    in_specs=(whole, whole, jax.P("data"), whole, whole),
    out_specs=whole,
    # A sum that is gathered from codes is equal on all devices, which types
    # cannot tell.
    check_vma=False,
  )

  def summed(params: dict, opt_state: Any, *args: Any) -> tuple:
    grads, alone, new = mapped(params, opt_state, *args)
    return grads, alone, functools.partial(select, new, opt_state)

  return summed


def _axis_of_blocks(grad: jax.Array, weight: Any) -> int:
  """The axis of a gradient along which elements are of similar size.

  In a projected gradient (r, n) or (m, r) this is a direction's, in a whole one
  of the embedding or the head a token's.
  """
  if grad.ndim < 2:
    return -1
  rows_are_longer = grad.shape[-2] > grad.shape[-1]
  is_projected = grad.shape != weight.shape
  return -2 if rows_are_longer == is_projected else -1
