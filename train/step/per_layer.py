"""The LLaMA in the three parts that `galore_optax.layerwise` walks."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import galore_optax
from train.config.schema import ModelConfig, TrainConfig
from train.models import experts, layer_kinds, llama
from train.parallel import mesh as mesh_lib
from train.step import losses

# Approximate size of the chunks in which leaves outside of the layers are
# updated: enough to keep a device busy, and small beside one layer of a model
# whose leaves are that large.
CHUNK = 2**22

# Number of positions whose logits are in memory together on each device.
LOSS_CHUNK = 1024


class Counted(NamedTuple):
  """What the loss that balances experts depends on.

  Attributes:
    text_BxT: 1 for text, 0 for padding: float, as all that has a gradient.
    sums_2xE: What the experts of the layers so far count.
  """

  text_BxT: jax.Array
  sums_2xE: jax.Array


class Activations(NamedTuple):
  """What one layer hands to the next.

  Attributes:
    x_BxTxD: The residual stream.
    number: The next layer's, where layers differ, else None. It is a float,
      because it has a gradient, 0, like the stream's.
    counted: None where layers have no experts.
  """

  x_BxTxD: jax.Array
  number: jax.Array | None
  counted: Counted | None


def layered(config: ModelConfig, train: TrainConfig) -> galore_optax.Layered:
  """The model as embedding, layers and head; a batch is rows (B, T + 1).

  The loss is the mean cross-entropy of the predicted tokens in nats plus the
  penalties of `train.z_loss` and of unbalanced experts. It is also returned
  without the penalties. Logits
  are computed, used and recomputed in the backward pass in chunks, because
  those of whole rows would be the largest array of all.
  """
  tied = config.tie_embeddings

  def first(lower: dict, rows: jax.Array) -> Activations:
    table = lower["embed"]["embedding"].astype(config.dtype)
    x_BxTxD = _look_up(table, jnp.maximum(rows[:, :-1], 0))
    number = None if layer_kinds.stacked(config) is None else jnp.float32(0)
    zeros_2xE, counted = llama.no_sums(config), None
    if zeros_2xE is not None:
      counted = Counted(losses.is_text(rows[:, :-1]), zeros_2xE)
    return Activations(x_BxTxD, number, counted)

  def layer(params: dict, x: Activations) -> Activations:
    _, length, width = x.x_BxTxD.shape
    x_MxD = x.x_BxTxD.reshape(-1, width)
    number = None if x.number is None else x.number.astype(jnp.int32)
    counted = x.counted
    text_BxT = None if counted is None else counted.text_BxT
    x_MxD, sums_2xE = llama.block(
      config, params, x_MxD, length, number, text_BxT
    )
    if counted is not None and sums_2xE is not None:
      counted = Counted(counted.text_BxT, counted.sums_2xE + sums_2xE)
    return Activations(
      x_MxD.reshape(x.x_BxTxD.shape),
      None if x.number is None else x.number + 1,
      counted,
    )

  def last(upper: dict, x: Activations, rows: jax.Array) -> tuple:
    total, penalty, count = _all_sums(config, upper, x.x_BxTxD, rows)
    count = jnp.maximum(count, 1)
    loss = (total + train.z_loss * penalty) / count
    if x.counted is not None:
      tokens = x.counted.text_BxT.sum()
      balance = experts.balance_loss(config, x.counted.sums_2xE, tokens)
      loss += config.router_aux_loss_coef * balance
    return loss, total / count

  return galore_optax.Layered(
    first,
    layer,
    last,
    first_keys=("embed",),
    last_keys=("norm", "embed" if tied else "lm_head"),
    has_aux=True,
  )


def summed_loss(
  config: ModelConfig, params: dict, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Summed loss in nats and number of predicted tokens of rows (B, T + 1).

  Quantized weights are dequantized one layer at a time.
  """
  model = layered(config, TrainConfig())
  model = model._replace(
    last=lambda upper, x, rows: _all_sums(config, upper, x.x_BxTxD, rows),
    has_aux=False,
  )
  total, _, count = model.loss(params, rows, config.dtype)
  return total, count.astype(jnp.int32)


def fuse(
  tx: optax.GradientTransformation,
  model: ModelConfig,
  train: TrainConfig,
  weights: dict,
) -> galore_optax.Layerwise:
  """The step that updates each layer inside the backward pass.

  It clips the gradient of each layer separately, because clipping is part of
  `tx`, which gets one layer at a time.

  Args:
    tx: the optimizer.
    model: sizes and dtypes.
    train: rounding and seed.
    weights: shapes of the parameters.
  """
  return galore_optax.layerwise(
    tx,
    layered(model, train),
    dtype=model.dtype,
    chunks=chunks(weights),
    stochastic_rounding=train.rounding == "stochastic",
    seed=train.seed,
    projected=train.lean,
  )


def chunks(params: dict) -> dict[str, int]:
  """Number of chunks of rows for each large leaf outside of the layers."""
  found = {}
  for name, leaf in (("embed", "embedding"), ("lm_head", "kernel")):
    if name not in params or params[name][leaf].size <= 2 * CHUNK:
      continue
    rows, columns = params[name][leaf].shape
    wanted = max(1, CHUNK // columns)
    # Of the divisors of the vocabulary, the size closest to the wanted one.
    sizes = [n for n in range(1, rows + 1) if rows % n == 0]
    size = min(sizes, key=lambda n: abs(math.log(n / wanted)))
    if size < rows:
      found[f"{name}/{leaf}"] = rows // size
  return found


@jax.custom_vjp
def _look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
  """Rows of the embedding."""
  return table[tokens]


def _look_up_forward(table: jax.Array, tokens: jax.Array) -> tuple:
  # Keeps the table's shape for the backward pass without its memory.
  like = jax.eval_shape(lambda: table)
  return table[tokens], (tokens, _Shape(like.shape))


def _look_up_backward(saved: tuple, dx: jax.Array) -> tuple:
  tokens, like = saved
  # The zeros to which rows are added depend on the gradient. Compilers would
  # otherwise create them first and keep them through the whole backward pass.
  dx, zero = jax.lax.optimization_barrier((dx, jnp.zeros((), dx.dtype)))
  return jnp.broadcast_to(zero, like.shape).at[tokens].add(dx), None


class _Shape:
  """A shape, as a pytree without leaves."""

  def __init__(self, shape: tuple[int, ...]):
    self.shape = shape


jax.tree_util.register_pytree_node(
  _Shape, lambda x: ((), x.shape), lambda shape, _: _Shape(shape)
)
_look_up.defvjp(_look_up_forward, _look_up_backward)


@functools.cache
def _upper(config: ModelConfig) -> nnx.GraphDef:
  """The structure of the last norm and the head."""
  model = llama.abstract_model(config)
  del model.layers
  if not config.tie_embeddings:
    del model.embed
  return nnx.split(model, nnx.Param)[0]


def _all_sums(
  config: ModelConfig, upper: dict, x_BxTxD: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Summed losses and squared log-normalizers, and the number of tokens.

  A chunk has some positions of every row, so that on a mesh every device has a
  part of it.
  """
  head = nnx.merge(_upper(config), upper)

  @jax.checkpoint
  def chunk(x_BxCxD: jax.Array, targets_BxC: jax.Array) -> jax.Array:
    x_MxD = x_BxCxD.reshape(-1, x_BxCxD.shape[-1])
    targets_M = targets_BxC.reshape(-1)
    logits_MxV = head.head(x_MxD, 1)[0]
    valid = targets_M >= 0
    log_z = jax.nn.logsumexp(logits_MxV, axis=-1)
    index = jnp.maximum(targets_M, 0)[:, None]
    chosen = jnp.take_along_axis(logits_MxV, index, axis=-1)[:, 0]
    sums = (log_z - chosen, jnp.square(log_z), jnp.ones_like(log_z))
    return jnp.where(valid, jnp.stack(sums), 0).sum(axis=1)

  targets_BxT = rows[:, 1:]
  count = _loss_chunks(*targets_BxT.shape)
  parts = tuple(
    jnp.moveaxis(x.reshape(len(x), count, -1, *x.shape[2:]), 1, 0)
    for x in (x_BxTxD, targets_BxT)
  )
  zeros = jnp.zeros(3, jnp.float32)
  add = lambda total, part: (total + chunk(*part), None)
  total, _ = jax.lax.scan(add, zeros, parts)
  return total[0], total[1], total[2]


def _loss_chunks(batch: int, length: int) -> int:
  """Number of chunks into which the positions of the rows are divided."""
  size = LOSS_CHUNK * mesh_lib.batch_shards(jax.sharding.get_abstract_mesh())
  count = min(-(-batch * length // size), length)
  while length % count:
    count += 1
  return count
