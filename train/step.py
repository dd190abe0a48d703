"""Loss, training step and evaluation step: pure functions, jitted once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import galore_optax
from train import llama
from train import mesh as meshes
from train.config import ModelConfig, TrainConfig

PADDING = -1  # id of the positions that fill up a row


class TrainState(NamedTuple):
  """Everything that training changes on the devices.

  The same tuple holds the arrays' shapes or their shardings in their place.
  """

  step: Any  # (), int32: batches read so far, those of skipped steps too
  skipped: Any  # (), int32: steps left out, their gradient was not finite
  skips_in_row: Any  # (), int32: of them, those since the last good step
  params: Any
  opt_state: Any


class Placed(NamedTuple):
  """A model laid out on a mesh before it takes any memory."""

  graphdef: nnx.GraphDef
  state: TrainState  # of ShapeDtypeStructs
  shardings: TrainState  # of NamedShardings


def token_losses(
  graphdef: nnx.GraphDef, params: dict, rows: jax.Array
) -> jax.Array:
  """Cross-entropy in nats of each next token.

  Args:
    graphdef: the model's structure.
    params: its parameters.
    rows: (B, T + 1) int32 ids; each predicts its successor. Padding is
      `PADDING`, at the end of a row, and is never predicted.

  Returns:
    (B, T) float32, 0 where the successor is padding.
  """
  return _losses(graphdef, params, rows)[0]


def _losses(
  graphdef: nnx.GraphDef, params: dict, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy and log-normaliser of each token, 0 at padding."""
  targets, valid = rows[:, 1:], is_predicted(rows)
  logits = llama.apply(graphdef, params, jnp.maximum(rows[:, :-1], 0))
  log_z = jax.nn.logsumexp(logits, axis=-1)
  index = jnp.maximum(targets, 0)[..., None]
  chosen = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
  return jnp.where(valid, log_z - chosen, 0.0), jnp.where(valid, log_z, 0.0)


def is_predicted(rows: jax.Array) -> jax.Array:
  """(B, T) bool: the positions of rows (B, T + 1) whose successor counts."""
  return rows[:, 1:] != PADDING


def place(
  config: ModelConfig,
  tx: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> Placed:
  """Shapes and shardings of the whole training state."""
  graphdef, boxes = llama.abstract(config)
  params = nnx.to_pure_dict(boxes)
  shardings = meshes.param_shardings(boxes, mesh)
  count = jax.ShapeDtypeStruct((), jnp.int32)
  opt_state = jax.eval_shape(tx.init, params)
  # Without these, `jit` would put a copy of every moment on every device.
  opt_shardings = galore_optax.state_shardings(tx, params, shardings)
  whole = meshes.replicated(mesh)
  return Placed(
    graphdef,
    TrainState(count, count, count, params, opt_state),
    TrainState(whole, whole, whole, shardings, opt_shardings),
  )


def init_state(
  config: ModelConfig,
  tx: optax.GradientTransformation,
  placed: Placed,
  seed: int,
  params: dict | None = None,
) -> TrainState:
  """A fresh state, built shard by shard where it will live.

  Args:
    config: the model's.
    tx: the optimizer.
    placed: where the state lives.
    seed: of fresh parameters.
    params: those to start from instead, arrays on the host.
  """

  def init(params: dict | None) -> TrainState:
    params = llama.init(config, seed) if params is None else params
    zeros = (jnp.zeros((), jnp.int32),) * 3
    return TrainState(*zeros, params, tx.init(params))

  if params is not None:
    params = jax.tree.map(
      lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__),
      params,
      placed.shardings.params,
    )
  # What is given is handed over: a model is never in memory twice.
  run = jax.jit(init, out_shardings=placed.shardings, donate_argnums=0)
  return run(params)


def make_train_step(
  tx: optax.GradientTransformation,
  placed: Placed,
  config: TrainConfig,
) -> Callable[[TrainState, jax.Array], tuple[TrainState, dict]]:
  """The training step, jitted; it consumes the state it is given.

  A step whose loss or gradient is not finite changes neither parameters nor
  optimizer state; it is counted, and its batch is left behind.

  Returns:
    A function of a state and rows (B, T + 1) int32 that gives the next state
    and a dict of scalars: `loss` in nats a token, `grad_norm` before
    clipping, `tokens` predicted, and the state's `skipped` and
    `skips_in_row`.
  """
  gradient = make_gradient(placed, config)

  def train_step(
    state: TrainState, rows: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    grads, loss, tokens = gradient(state.params, rows)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)

    def update() -> tuple[Any, Any]:
      updates, opt_state = tx.update(grads, state.opt_state, state.params)
      return optax.apply_updates(state.params, updates), opt_state

    params, opt_state = jax.lax.cond(
      finite, update, lambda: (state.params, state.opt_state)
    )
    skipped = state.skipped + ~finite
    in_row = jnp.where(finite, 0, state.skips_in_row + 1)
    metrics = {"loss": loss, "grad_norm": norm, "tokens": tokens}
    metrics |= {"skipped": skipped, "skips_in_row": in_row}
    new = TrainState(state.step + 1, skipped, in_row, params, opt_state)
    return new, metrics

  return jax.jit(
    train_step,
    donate_argnums=0,
    out_shardings=(placed.shardings, meshes.replicated(_mesh(placed))),
  )


def make_gradient(
  placed: Placed, config: TrainConfig
) -> Callable[[dict, jax.Array], tuple[dict, jax.Array, jax.Array]]:
  """A function of parameters and rows: gradient, loss and token count.

  The loss is the mean over all predicted tokens of the batch, wherever they
  lie: a microbatch's share of it is its sum over the batch's count.
  """

  def share(
    params: dict, rows: jax.Array, tokens: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    losses, log_z = _losses(placed.graphdef, params, rows)
    loss = losses.sum() / tokens
    penalty = config.z_loss * jnp.square(log_z).sum() / tokens
    return (loss + penalty if config.z_loss else loss), loss

  differentiate = jax.value_and_grad(share, has_aux=True)

  def gradient(params: dict, rows: jax.Array):
    count = is_predicted(rows).sum()
    tokens = jnp.maximum(count, 1).astype(jnp.float32)
    if config.accumulate == 1:
      (_, loss), grads = differentiate(params, rows, tokens)
      return grads, loss, count

    def add(total: tuple[dict, jax.Array], part: jax.Array):
      (_, loss), grads = differentiate(params, part, tokens)
      return jax.tree.map(jnp.add, total, (grads, loss)), None

    # In float32 whatever the weights' dtype: many small terms are added.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    zeros = jax.lax.with_sharding_constraint(zeros, placed.shardings.params)
    parts = meshes.microbatches(rows, config.accumulate)
    (grads, loss), _ = jax.lax.scan(add, (zeros, jnp.float32(0)), parts)
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, params)
    return grads, loss, count

  return gradient


def make_eval_step(
  placed: Placed,
) -> Callable[[dict, jax.Array], tuple[jax.Array, jax.Array]]:
  """The evaluation step, jitted.

  Returns:
    A function of parameters and rows (B, T + 1) that gives the summed loss
    in nats and the number of predicted tokens.
  """

  def eval_step(params: dict, rows: jax.Array):
    losses = token_losses(placed.graphdef, params, rows)
    return losses.sum(), is_predicted(rows).sum()

  return jax.jit(eval_step, out_shardings=meshes.replicated(_mesh(placed)))


def all_finite(params: dict) -> bool:
  """Whether no weight is infinite or not a number."""
  return bool(jax.device_get(_all_finite(params)))


@jax.jit
def _all_finite(params: dict) -> jax.Array:
  hits = [jnp.isfinite(x).all() for x in jax.tree.leaves(params)]
  return jnp.stack(hits).all()


def _mesh(placed: Placed) -> jax.sharding.Mesh:
  return placed.shardings.step.mesh
