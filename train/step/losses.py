"""Losses, gradients and evaluation: pure functions of weights and rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from train.config.schema import TrainConfig
from train.models import llama
from train.parallel import mesh as mesh_lib
from train.step import per_layer
from train.step.state import AbstractState

PADDING = -1  # id of the positions that fill up a row


def token_losses(
  graphdef: nnx.GraphDef, params: dict, rows: jax.Array
) -> jax.Array:
  """Cross-entropy in nats of each next token.

  Args:
    graphdef: the model's structure.
    params: its parameters.
    rows: (B, T + 1) int32 ids; each predicts its successor. Padding is
      `PADDING`, at the end of a row; it is never predicted.

  Returns:
    (B, T) float32, 0 where the successor is padding.
  """
  return _losses(graphdef, params, rows)[0]


def _losses(
  graphdef: nnx.GraphDef, params: dict, rows: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Cross-entropy and log-normalizer of each token, 0 at padding; balance."""
  targets, valid = rows[:, 1:], is_predicted(rows)
  logits, balance = llama.apply_with_balance(
    graphdef,
    params,
    jnp.maximum(rows[:, :-1], 0),
    counted=is_text(rows[:, :-1]),
  )
  log_z = jax.nn.logsumexp(logits, axis=-1)
  index = jnp.maximum(targets, 0)[..., None]
  chosen = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
  losses, log_z = (jnp.where(valid, x, 0.0) for x in (log_z - chosen, log_z))
  return losses, log_z, balance


def is_text(tokens: jax.Array) -> jax.Array:
  """1 for each token, 0 for padding, float32."""
  return (tokens != PADDING).astype(jnp.float32)


def is_predicted(rows: jax.Array) -> jax.Array:
  """(B, T) bool: the positions of rows (B, T + 1) whose successor counts."""
  return rows[:, 1:] != PADDING


# From weights, a batch and the step's number to gradient, loss, token count.
Gradient = Callable[[Any, Any, jax.Array], tuple[Any, jax.Array, jax.Array]]


class Loss(NamedTuple):
  """A batch's mean loss, as a sum over parts of the batch.

  Attributes:
    share: from weights, a part, the number of items in the batch, the step's
      number and the part's to the part's share of the loss, with penalties and
      without.
    count: from a batch to the numbers of items in it and of tokens.
    divide: from a batch to its parts, stacked.
  """

  share: Callable[..., tuple[jax.Array, jax.Array]]
  count: Callable[[Any], tuple[jax.Array, jax.Array]]
  divide: Callable[[Any, int], Any] = mesh_lib.microbatches

  def of(self, batch: Any, step: Any) -> tuple:
    """The arguments of `share` after the weights, for a whole batch."""
    items = jnp.maximum(self.count(batch)[0], 1).astype(jnp.float32)
    return batch, items, step, 0


def next_token_loss(abstract: AbstractState, config: TrainConfig) -> Loss:
  """The mean loss of the predicted tokens of a batch."""
  share = _share_of_loss(abstract, config)

  def count(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    tokens = is_predicted(rows).sum()
    return tokens, tokens

  return Loss(lambda w, rows, items, *_: share(w, rows, items), count)


def _share_of_loss(
  abstract: AbstractState, config: TrainConfig
) -> Callable[[dict, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """A microbatch's share of the loss, with penalties and without.

  It is a function of parameters, rows and the number of predicted tokens of the
  whole batch.
  """

  def share(
    params: dict, rows: jax.Array, tokens: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    losses, log_z, balance = _losses(abstract.graphdef, params, rows)
    loss = losses.sum() / tokens
    total = loss
    if config.z_loss:
      total += config.z_loss * jnp.square(log_z).sum() / tokens
    if balance is not None:
      # Each microbatch is balanced by itself, and weighs as much as its tokens.
      part = is_predicted(rows).sum() / tokens
      total += abstract.config.router_aux_loss_coef * balance * part
    return total, loss

  return share


def make_gradient(
  abstract: AbstractState, config: TrainConfig
) -> Callable[[dict, jax.Array], tuple[dict, jax.Array, jax.Array]]:
  """A function from parameters and rows to gradient, loss and token count.

  The loss is the mean over all predicted tokens of the batch. The share of a
  microbatch is its summed loss, divided by the token count of the whole batch.
  """
  differentiate = jax.value_and_grad(
    _share_of_loss(abstract, config), has_aux=True
  )

  def gradient(params: dict, rows: jax.Array):
    count = is_predicted(rows).sum()
    tokens = jnp.maximum(count, 1).astype(jnp.float32)
    if config.accumulate == 1:
      (_, loss), grads = differentiate(params, rows, tokens)
      return grads, loss, count

    def add(total: tuple[dict, jax.Array], part: jax.Array):
      (_, loss), grads = differentiate(params, part, tokens)
      return jax.tree.map(jnp.add, total, (grads, loss)), None

    # In float32 for weights of any dtype, because many small terms are added.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    zeros = jax.lax.with_sharding_constraint(zeros, abstract.weight_shardings)
    parts = mesh_lib.microbatches(rows, config.accumulate)
    (grads, loss), _ = jax.lax.scan(add, (zeros, jnp.float32(0)), parts)
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, params)
    return grads, loss, count

  return gradient


def make_eval_step(
  abstract: AbstractState, parts: int = 1
) -> Callable[[dict, jax.Array], tuple[jax.Array, jax.Array]]:
  """The jitted evaluation step.

  Args:
    abstract: the model, and where the state lives.
    parts: microbatches that are evaluated one after the other, so that an
      evaluation takes no more memory than a training step.

  Returns:
    A function of parameters and rows (B, T + 1) that returns the summed loss
    in nats and the number of predicted tokens.
  """

  def eval_step(params: dict, rows: jax.Array):
    if parts == 1:
      return evaluate(abstract, params, rows)
    if abstract.adapters is not None:
      params = abstract.read(params)
    cut = mesh_lib.microbatches(rows, parts)
    sums = lambda part: _loss_sums(abstract, params, part)
    total, count = jax.lax.map(sums, cut)
    return total.sum(), count.sum()

  return jax.jit(eval_step, out_shardings=mesh_lib.replicated(abstract.mesh))


def evaluate(
  abstract: AbstractState, params: dict, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Summed loss in nats and number of predicted tokens of rows (B, T + 1)."""
  if abstract.adapters is not None:
    params = abstract.read(params)
  return _loss_sums(abstract, params, rows)


def _loss_sums(
  abstract: AbstractState, params: dict, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The same of the weights that the model computes with."""
  if abstract.config.weights != "full":
    # Dequantizes the weights of one layer at a time.
    return per_layer.summed_loss(abstract.config, params, rows)
  losses = token_losses(abstract.graphdef, params, rows)
  return losses.sum(), is_predicted(rows).sum()
