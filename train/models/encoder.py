"""A BERT-family encoder in Flax NNX: BERT or RoBERTa, by its config.

What the two differ in is said by `train/models/encoder_config.py`: where
positions start, whether there are two token types, and where the head drops
out. The masked-language-model head is left out.

    graphdef, boxes = encoder.abstract(config)        # shapes, no memory
    params = encoder.init(config, seed)               # nested dicts
    encoder.hidden(graphdef, params, ids, mask, types)          (B, T, D)
    encoder.classify(graphdef, params, ids, mask, types)        (B, labels)
    encoder.spans(graphdef, params, ids, mask, types)           2 x (B, T)

`ids` (B, T) int32, `mask` (B, T) true where a token stands and false on
padding, `types` (B, T) the segment of each token, or None: all of the first.
A `key` switches dropout on. Regression is `classify` with labels=1. Weights
and tokenizers come from `train.pretrained.encoder_checkpoint.load`.

As in `train/models/llama.py` the layers are one stacked module that `nnx.scan`
walks, so every kernel of theirs is (L, rows, columns), and rows and positions
are one flat axis between the attentions. Names of local arrays end in their
shape: B rows, T positions, M = B * T tokens, D d_model, N heads, H head width.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from train.common.errors import UserError
from train.models import attention
from train.models.encoder_config import Config
from train.models.llama import REMAT
from train.parallel.mesh import RULES, constrain_batch

ACTIVATIONS = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
}
# GaLore's rules for this model's leaves, for who does not name the matrices
# himself: the papers leave the pooler and the heads at full rank.
FULL_RANK = ((r"^(pooler|head)/", None),)

Keys = jax.Array | None  # of dropout; None: nothing is dropped


def _split(key: Keys, count: int) -> list[Keys]:
  return [None] * count if key is None else list(jax.random.split(key, count))


def _drop(rate: float, x: jax.Array, key: Keys) -> jax.Array:
  return nnx.Dropout(rate)(x, deterministic=key is None, rngs=key)


def _linear(
  config: Config, fan_in: int, fan_out: int, axes: tuple, rngs: nnx.Rngs
) -> nnx.Linear:
  return nnx.Linear(
    fan_in,
    fan_out,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    kernel_init=nnx.initializers.normal(config.init_std),
    kernel_metadata={"out_sharding": axes},
    bias_metadata={"out_sharding": ("norm",)},
    rngs=rngs,
  )


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


def _table(
  config: Config, rows: int, first_axis: str, rngs: nnx.Rngs
) -> nnx.Embed:
  return nnx.Embed(
    rows,
    config.d_model,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    embedding_init=nnx.initializers.normal(config.init_std),
    embedding_metadata={"out_sharding": (first_axis, "features")},
    rngs=rngs,
  )


class Embeddings(nnx.Module):
  """Words, positions and token types added up, and normalised."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    places = config.max_length + config.position_offset
    self.words = _table(config, config.vocab_size, "table", rngs)
    self.positions = _table(config, places, "norm", rngs)
    self.types = _table(config, config.n_types, "norm", rngs)
    self.norm = _norm(config, rngs)

  def __call__(
    self, ids_BxT: jax.Array, mask_BxT: jax.Array, types_BxT: jax.Array
  ) -> jax.Array:
    """Token ids (B, T) to (B * T, D)."""
    x_BxTxD = self.words(ids_BxT) + self.types(types_BxT)
    x_BxTxD = x_BxTxD + self.positions(self._places(mask_BxT))
    return self.norm(x_BxTxD.reshape(-1, self.config.d_model))

  def _places(self, mask_BxT: jax.Array) -> jax.Array:
    """Rows of the position table."""
    if self.config.family == "bert":
      return jnp.arange(mask_BxT.shape[1])[None]
    # RoBERTa counts tokens, and gives all padding the row before the first.
    counted = jnp.cumsum(mask_BxT, axis=1) * mask_BxT
    return counted + self.config.position_offset - 1


def _library(config: Config, q_BxTxNxH: jax.Array) -> Literal["cudnn", "xla"]:
  """What computes the attention; splash gains nothing at such lengths."""
  if attention.choose(config.attention, q_BxTxNxH) != "cudnn":
    return "xla"
  # With a mask cuDNN has a backward pass for even lengths only.
  length = q_BxTxNxH.shape[1]
  if length % 2 and config.attention == "cudnn":
    raise UserError(
      f"model.attention=cudnn takes texts of an even length, not {length}; pad"
      " them by one, or use auto"
    )
  return "xla" if length % 2 else "cudnn"


class Attention(nnx.Module):
  """Self-attention in which every token sees every other, padding excepted."""

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
    # The fused form on GPUs wants all of (T, T).
    mask_Bx1xTxT = jnp.broadcast_to(
      mask_BxT[:, None, None], (rows, 1, length, length)
    )
    if key is not None and config.attention_dropout:
      # No fused form can drop weights that it never holds.
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
        q, k, v, mask=mask_Bx1xTxT, implementation=_library(config, q)
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
  """One layer: attention and feed-forward, each normalised after its sum."""

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


def _stack(config: Config, rngs: nnx.Rngs) -> Block:
  """All layers as one Block whose parameters have a leading layer axis."""

  @nnx.split_rngs(splits=config.n_layers)
  @nnx.vmap(
    in_axes=(0,),
    out_axes=0,
    transform_metadata={nnx.PARTITION_NAME: "layers"},
  )
  def make(rngs: nnx.Rngs) -> Block:
    return Block(config, rngs=rngs)

  return make(rngs)


class Encoder(nnx.Module):
  """Token ids (B, T) int32 to hidden states, and those to a head's logits."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    d = config.d_model
    self.embed = Embeddings(config, rngs=rngs)
    self.layers = _stack(config, rngs)
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
      mask_BxT: true (or 1) where a token stands; padding may hold any id.
      types_BxT: the segment of each token; None: all of the first.
      key: of dropout; None: nothing is dropped.

    Raises:
      UserError: there are more positions than the model has embeddings.
    """
    length, most = ids_BxT.shape[1], self.config.max_length
    if length > most:
      raise UserError(
        f"texts of {length} tokens, but the model has {most} positions; cut"
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

    if self.config.remat != "none":
      body = nnx.remat(body, policy=REMAT[self.config.remat])
    scan = nnx.scan(
      body,
      in_axes=(nnx.Carry, 0, 0),
      out_axes=nnx.Carry,
      unroll=self.config.unroll,
    )
    count = self.config.n_layers
    keys = None if key is None else jax.random.split(key, count)
    return scan(x_MxD, self.layers, keys)

  def classify(
    self,
    ids_BxT: jax.Array,
    mask_BxT: jax.Array,
    types_BxT: jax.Array | None = None,
    key: Keys = None,
  ) -> jax.Array:
    """Logits (B, labels) float32 of each text or pair of texts."""
    body, before, after = _split(key, 3)
    rate, roberta = self.config.head_dropout, self.config.family == "roberta"
    x_BxTxD = self(ids_BxT, mask_BxT, types_BxT, body)
    x_BxD = (
      x_BxTxD[:, 0]
      if self.config.pool == "first"
      else mean_of_tokens(x_BxTxD, mask_BxT)
    )
    # RoBERTa's head drops on both sides of its dense layer, BERT's on one.
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
    """Logits (B, T) float32 of a span's first and of its last token.

    Positions that cannot be either (padding, the question) have logits too:
    who decodes leaves them out.
    """
    x_BxTxD = self(ids_BxT, mask_BxT, types_BxT, key)
    logits_BxTx2 = self.head(x_BxTxD).astype(jnp.float32)
    return logits_BxTx2[..., 0], logits_BxTx2[..., 1]


def mean_of_tokens(x_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
  """The mean (B, D) of the hidden states of each text's tokens.

  Scaled to length one it is the embedding of a sentence in the models that
  were trained so, such as all-MiniLM-L6-v2.
  """
  weight_BxT = mask_BxT.astype(x_BxTxD.dtype)
  total_BxD = jnp.einsum("btd,bt->bd", x_BxTxD, weight_BxT)
  return total_BxD / jnp.maximum(weight_BxT.sum(axis=1, keepdims=True), 1)


def abstract(config: Config) -> tuple[nnx.GraphDef, nnx.State]:
  """The model's structure, and its parameters as boxes without memory.

  As `train.models.llama.abstract`: each box holds a shape and the axes' names.
  """
  with nnx.use_eager_sharding(False), nnx.logical_axis_rules(RULES):
    model = nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0)))
  return nnx.split(model, nnx.Param)


def init(config: Config, seed: int | jax.Array) -> dict:
  """Fresh parameters as nested dicts: `layers/attn/q/kernel` and so on."""
  with nnx.use_eager_sharding(False):
    model = Encoder(config, rngs=nnx.Rngs(seed))
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


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
