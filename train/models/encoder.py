"""A BERT or RoBERTa encoder in Flax NNX.

    graphdef, boxes = encoder.abstract(config)        # shapes, no memory
    params = encoder.init(config, seed)               # nested dicts
    encoder.hidden(graphdef, params, ids, mask, types)          (B, T, D)
    encoder.classify(graphdef, params, ids, mask, types)        (B, labels)
    encoder.spans(graphdef, params, ids, mask, types)           2 x (B, T)

`ids` (B, T) are int32; `mask` (B, T) is true on tokens and false on padding;
`types` (B, T) is the segment of each token, or None: all in the first segment.
With a `key`, dropout is on. Regression is `classify` with labels=1. Weights
and tokenizers come from `train.pretrained.encoder_checkpoint.load`.

The two families differ in where positions start, in the number of token types,
and in the dropout of the head; `train/models/encoder_config.py` has the
fields. There is no masked-language-model head.

The layers are stacked as in `train/models/llama.py`. Names of local arrays end
in their shape: B rows, T positions, M = B * T tokens, D d_model, N heads, H
head width.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from train.common.errors import UserError
from train.models import attention, layers
from train.models.encoder_config import Config
from train.parallel.mesh import constrain_batch

ACTIVATIONS = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
}
# GaLore's rules for this model: the papers keep the pooler and the heads at
# full rank.
FULL_RANK = ((r"^(pooler|head)/", None),)

Keys = jax.Array | None  # of dropout; None: no dropout


def _split(key: Keys, count: int) -> list[Keys]:
  return [None] * count if key is None else list(jax.random.split(key, count))


def _drop(rate: float, x: jax.Array, key: Keys) -> jax.Array:
  return nnx.Dropout(rate)(x, deterministic=key is None, rngs=key)


def _linear(
  config: Config,
  fan_in: int,
  fan_out: int,
  axes: tuple[str, str],
  rngs: nnx.Rngs,
) -> nnx.Linear:
  return layers.linear(config, fan_in, fan_out, axes, rngs, use_bias=True)


def _norm(config: Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
  return nnx.LayerNorm(
    config.d_model,
    epsilon=config.norm_eps,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    # E[x^2] - E[x]^2 loses digits where the mean is far from zero.
    use_fast_variance=False,
    scale_metadata={"out_sharding": ("norm",)},
    bias_metadata={"out_sharding": ("norm",)},
    rngs=rngs,
  )


class Embeddings(nnx.Module):
  """The normalized sum of token, position and token type embeddings."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    positions = config.max_length + config.position_offset
    self.words = layers.embedding(config, config.vocab_size, "table", rngs)
    self.positions = layers.embedding(config, positions, "norm", rngs)
    self.types = layers.embedding(config, config.n_types, "norm", rngs)
    self.norm = _norm(config, rngs)

  def __call__(
    self, ids_BxT: jax.Array, mask_BxT: jax.Array, types_BxT: jax.Array
  ) -> jax.Array:
    """Token ids (B, T) to (B * T, D)."""
    x_BxTxD = self.words(ids_BxT) + self.types(types_BxT)
    x_BxTxD = x_BxTxD + self.positions(self._positions(mask_BxT))
    return self.norm(x_BxTxD.reshape(-1, self.config.d_model))

  def _positions(self, mask_BxT: jax.Array) -> jax.Array:
    """The row of the position table for each token."""
    if self.config.family == "bert":
      return jnp.arange(mask_BxT.shape[1])[None]
    # RoBERTa counts tokens only; all padding has the row before the first.
    count_BxT = jnp.cumsum(mask_BxT, axis=1) * mask_BxT
    return count_BxT + self.config.position_offset - 1


def _implementation(
  config: Config, q_BxTxNxH: jax.Array
) -> Literal["cudnn", "xla"]:
  """The implementation of attention that is used on this device.

  Splash attention is never used: it gains nothing at these lengths.
  """
  if attention.choose(config.attention, q_BxTxNxH) != "cudnn":
    return "xla"
  # With a mask, cuDNN has a backward pass for even lengths only.
  length = q_BxTxNxH.shape[1]
  if length % 2 and config.attention == "cudnn":
    raise UserError(
      f"model.attention=cudnn needs texts of an even length, not {length}; pad"
      " them by one token, or use auto"
    )
  return "xla" if length % 2 else "cudnn"


class Attention(nnx.Module):
  """Self-attention to all tokens of a text, but not to its padding."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    d = config.d_model
    self.q = _linear(config, d, d, ("embed", "heads"), rngs)
    self.k = _linear(config, d, d, ("embed", "heads"), rngs)
    self.v = _linear(config, d, d, ("embed", "heads"), rngs)
    self.o = _linear(config, d, d, ("heads", "embed"), rngs)

  def __call__(
    self, x_MxD: jax.Array, mask_BxT: jax.Array, key: Keys
  ) -> jax.Array:
    """(M, D) to (M, D)."""
    config, (rows, length) = self.config, mask_BxT.shape
    shape = (rows, length, config.n_heads, config.head_width)
    q, k, v = (f(x_MxD).reshape(shape) for f in (self.q, self.k, self.v))
    # cuDNN needs the mask in its full shape.
    mask_Bx1xTxT = jnp.broadcast_to(
      mask_BxT[:, None, None], (rows, 1, length, length)
    )
    if key is not None and config.attention_dropout:
      # Fused attention never holds the weights, so it cannot drop them.
      out = nnx.dot_product_attention(
        q,
        k,
        v,
        mask=mask_Bx1xTxT,
        dropout_rng=key,
        dropout_rate=config.attention_dropout,
        broadcast_dropout=False,
        deterministic=False,
        dtype=jnp.float32,
      ).astype(q.dtype)
    else:
      out = jax.nn.dot_product_attention(
        q, k, v, mask=mask_Bx1xTxT, implementation=_implementation(config, q)
      )
    return self.o(out.reshape(len(x_MxD), -1))


class Mlp(nnx.Module):
  """Feed-forward: down(activation(up(x)))."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    d, ff = config.d_model, config.d_ff
    self.up = _linear(config, d, ff, ("embed", "mlp"), rngs)
    self.down = _linear(config, ff, d, ("mlp", "embed"), rngs)
    self.activation = ACTIVATIONS[config.activation]

  def __call__(self, x_MxD: jax.Array) -> jax.Array:
    """(M, D) to (M, D)."""
    return self.down(self.activation(self.up(x_MxD)))


class Block(nnx.Module):
  """One encoder layer: attention and feed-forward, each post-normalized."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.rate = config.dropout
    self.attn = Attention(config, rngs=rngs)
    self.attn_norm = _norm(config, rngs)
    self.mlp = Mlp(config, rngs=rngs)
    self.mlp_norm = _norm(config, rngs)

  def __call__(
    self, x_MxD: jax.Array, mask_BxT: jax.Array, key: Keys
  ) -> jax.Array:
    """(M, D) to (M, D)."""
    weights, first, second = _split(key, 3)
    x_MxD = constrain_batch(x_MxD, len(mask_BxT))
    mixed = self.attn(x_MxD, mask_BxT, weights)
    x_MxD = self.attn_norm(x_MxD + _drop(self.rate, mixed, first))
    return self.mlp_norm(x_MxD + _drop(self.rate, self.mlp(x_MxD), second))


class Encoder(nnx.Module):
  """Token ids (B, T) int32 to hidden states, and to the logits of a head."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    d = config.d_model
    self.embed = Embeddings(config, rngs=rngs)
    self.layers = layers.stack(
      lambda rngs: Block(config, rngs=rngs), config.n_layers, rngs
    )
    if config.head == "classify":
      self.pooler = _linear(config, d, d, ("embed", "heads"), rngs)
      self.head = _linear(config, d, config.labels, ("embed", "norm"), rngs)
    elif config.head == "spans":
      self.head = _linear(config, d, 2, ("embed", "norm"), rngs)

  def __call__(
    self,
    ids_BxT: jax.Array,
    mask_BxT: jax.Array,
    types_BxT: jax.Array | None = None,
    key: Keys = None,
  ) -> jax.Array:
    """Hidden states (B, T, D) of the last layer.

    Args:
      ids_BxT: token ids.
      mask_BxT: true (or 1) on tokens, false on padding, which may have any id.
      types_BxT: the segment of each token; None: all in the first.
      key: of dropout; None: no dropout.

    Raises:
      UserError: the texts are longer than the model's table of positions.
    """
    length, most = ids_BxT.shape[1], self.config.max_length
    if length > most:
      raise UserError(
        f"texts have {length} tokens, but the model has {most} positions; cut"
        f" them to {most} or fewer"
      )
    mask_BxT = mask_BxT.astype(bool)
    if types_BxT is None:
      types_BxT = jnp.zeros_like(ids_BxT)
    first, rest = _split(key, 2)
    x_MxD = self.embed(ids_BxT, mask_BxT, types_BxT)
    x_MxD = _drop(self.config.dropout, x_MxD, first)
    x_MxD = self._scan_layers(x_MxD, mask_BxT, rest)
    return x_MxD.reshape(*ids_BxT.shape, -1)

  def _scan_layers(
    self, x_MxD: jax.Array, mask_BxT: jax.Array, key: Keys
  ) -> jax.Array:
    def body(x: jax.Array, layer: Block, key: Keys) -> jax.Array:
      return layer(x, mask_BxT, key)

    count = self.config.n_layers
    keys = None if key is None else jax.random.split(key, count)
    return layers.scan(self.config, body, x_MxD, self.layers, keys)

  def classify(
    self,
    ids_BxT: jax.Array,
    mask_BxT: jax.Array,
    types_BxT: jax.Array | None = None,
    key: Keys = None,
  ) -> jax.Array:
    """Logits (B, labels) float32 for each text or pair of texts."""
    body, before, after = _split(key, 3)
    rate, roberta = self.config.head_dropout, self.config.family == "roberta"
    x_BxTxD = self(ids_BxT, mask_BxT, types_BxT, body)
    x_BxD = (
      x_BxTxD[:, 0]
      if self.config.pool == "first"
      else mean_of_tokens(x_BxTxD, mask_BxT)
    )
    # RoBERTa has dropout before and after the dense layer, BERT only after.
    x_BxD = _drop(rate, x_BxD, before if roberta else None)
    x_BxD = _drop(rate, jnp.tanh(self.pooler(x_BxD)), after)
    return self.head(x_BxD).astype(jnp.float32)

  def spans(
    self,
    ids_BxT: jax.Array,
    mask_BxT: jax.Array,
    types_BxT: jax.Array | None = None,
    key: Keys = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Logits (B, T) float32 of the first and the last token of a span.

    Padding and the question have logits too; the caller must mask them.
    """
    x_BxTxD = self(ids_BxT, mask_BxT, types_BxT, key)
    logits_BxTx2 = self.head(x_BxTxD).astype(jnp.float32)
    return logits_BxTx2[..., 0], logits_BxTx2[..., 1]


def mean_of_tokens(x_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
  """The mean hidden state (B, D) of each text, without its padding.

  Scaled to unit length, it is the sentence embedding of models that were
  trained for it, such as all-MiniLM-L6-v2.
  """
  weight_BxT = mask_BxT.astype(x_BxTxD.dtype)
  total_BxD = jnp.einsum("btd,bt->bd", x_BxTxD, weight_BxT)
  return total_BxD / jnp.maximum(weight_BxT.sum(axis=1, keepdims=True), 1)


def abstract(config: Config) -> tuple[nnx.GraphDef, nnx.State]:
  """The model's structure and the shapes of its parameters; no memory.

  Returns:
    The graph definition, and the parameters as boxes with shapes and logical
    axis names, as in `train.models.llama.abstract`.
  """
  model = layers.abstract(lambda rngs: Encoder(config, rngs=rngs))
  return nnx.split(model, nnx.Param)


def init(config: Config, seed: int | jax.Array) -> dict:
  """Random parameters as nested dicts: `layers/attn/q/kernel` and so on."""
  return layers.init(lambda rngs: Encoder(config, rngs=rngs), seed)


def hidden(
  graphdef: nnx.GraphDef,
  params: dict,
  ids: jax.Array,
  mask: jax.Array,
  types: jax.Array | None = None,
  key: Keys = None,
) -> jax.Array:
  """Hidden states (B, T, D) under `params`; see `Encoder`."""
  return nnx.merge(graphdef, params)(ids, mask, types, key)


def classify(
  graphdef: nnx.GraphDef,
  params: dict,
  ids: jax.Array,
  mask: jax.Array,
  types: jax.Array | None = None,
  key: Keys = None,
) -> jax.Array:
  """Logits (B, labels) float32 under `params`; see `Encoder.classify`."""
  return nnx.merge(graphdef, params).classify(ids, mask, types, key)


def spans(
  graphdef: nnx.GraphDef,
  params: dict,
  ids: jax.Array,
  mask: jax.Array,
  types: jax.Array | None = None,
  key: Keys = None,
) -> tuple[jax.Array, jax.Array]:
  """Logits (B, T), (B, T) float32 under `params`; see `Encoder.spans`."""
  return nnx.merge(graphdef, params).spans(ids, mask, types, key)
