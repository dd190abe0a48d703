"""A LLaMA decoder in Flax NNX: RMSNorm, rotary positions, SwiGLU, no biases.

The layers are one stacked module that `nnx.scan` walks, so a block is traced
and compiled once whatever the depth, and every kernel has a leading layer
axis: (L, rows, columns).

Names of local arrays end in their shape: B rows, T positions, M = B * T
tokens, D d_model, N query heads, K key/value heads, H head width, V
vocabulary. Between the attentions, rows and positions are one flat axis M: a
weight's gradient is then one plain matrix product, which the CPU compiler
runs two to three times faster than one that contracts two axes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.config.schema import ModelConfig
from train.models import attention
from train.parallel.mesh import RULES, constrain_batch

# What a layer keeps for its backward pass beside its input. `full`: nothing,
# a third more compute for L times fewer activations. `dots`: the outputs of
# the projections, so that only the attention and what is elementwise is
# computed twice.
REMAT = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

Cache = tuple[jax.Array, jax.Array]  # keys and values of earlier positions


def _frequencies(width: int, theta: float) -> np.ndarray:
  """Radians a position, of each pair of features: (H / 2,)."""
  return theta ** (-np.arange(0, width, 2, dtype=np.float32) / width)


@functools.cache
def _turns(length: int, width: int, theta: float) -> tuple[np.ndarray, ...]:
  """Cosines and sines of positions 0, 1, ...: (T, H / 2) each.

  A table, for XLA would put the functions into every loop that uses them, and
  take each sine anew for all rows and heads.
  """
  positions_T = np.arange(length, dtype=np.float32)
  angles_TxH = np.outer(positions_T, _frequencies(width, theta))
  return np.cos(angles_TxH), np.sin(angles_TxH)


def rotary(
  x_BxTxNxH: jax.Array, theta: float, positions_BxT: jax.Array | None = None
) -> jax.Array:
  """Rotates each head by its position: the rotary embedding.

  Feature i is paired with feature i + H/2 and the pair is turned by
  position * theta^(-2i/H), so the product of a query and a key depends on
  their positions only through the difference.

  Args:
    x_BxTxNxH: queries or keys.
    theta: base of the geometric series of wavelengths.
    positions_BxT: their places; 0, 1, ... by default. (1, T) serves all rows.

  Returns:
    The rotated array, in the dtype it came in.
  """
  length, width = x_BxTxNxH.shape[1], x_BxTxNxH.shape[3]
  if positions_BxT is None:
    cos, sin = _turns(length, width, theta)
  else:
    # Angles stay in float32: bfloat16 cannot tell position 256 from 257.
    places_BxTx1 = positions_BxT[..., None].astype(jnp.float32)
    angles_BxTxH = places_BxTx1 * _frequencies(width, theta)
    cos, sin = jnp.cos(angles_BxTxH), jnp.sin(angles_BxTxH)
  cos, sin = cos[..., None, :], sin[..., None, :]  # one turn for all heads
  left, right = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
  turned = (left * cos - right * sin, right * cos + left * sin)
  return jnp.concatenate(turned, axis=-1).astype(x_BxTxNxH.dtype)


def _linear(
  config: ModelConfig, fan_in: int, fan_out: int, axes: tuple, rngs: nnx.Rngs
) -> nnx.Linear:
  return nnx.Linear(
    fan_in,
    fan_out,
    use_bias=False,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    kernel_init=nnx.initializers.normal(config.init_std),
    kernel_metadata={"out_sharding": axes},
    rngs=rngs,
  )


def _norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
  return nnx.RMSNorm(
    config.d_model,
    epsilon=config.norm_eps,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    scale_metadata={"out_sharding": ("norm",)},
    rngs=rngs,
  )


class Attention(nnx.Module):
  """Causal self-attention with rotary positions and grouped queries."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    width = config.head_width
    queries, keys = config.n_heads * width, config.kv_heads * width
    d = config.d_model
    self.q = _linear(config, d, queries, ("embed", "heads"), rngs)
    self.k = _linear(config, d, keys, ("embed", "heads"), rngs)
    self.v = _linear(config, d, keys, ("embed", "heads"), rngs)
    self.o = _linear(config, queries, d, ("heads", "embed"), rngs)

  def __call__(
    self,
    x_MxD: jax.Array,
    length: int,
    segments_BxT: jax.Array | None = None,
  ) -> jax.Array:
    """Attends within rows of `length`, and segments; (M, D) to (M, D)."""
    heads = self._heads(x_MxD, length)
    out = attention.attend(self.config.attention, *heads, segments_BxT)
    return self.o(out.reshape(len(x_MxD), -1))

  def extend(
    self, x_MxD: jax.Array, positions_BxT: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """Attends to what the cache holds and to `x_MxD`, which it takes in.

    Args:
      x_MxD: T new positions a row.
      positions_BxT: their places in the cache, ascending within a row.
      cache: keys and values (B, S, K, H); what lies behind a position is
        not read, so it need not be cleared.

    Returns:
      (M, D), and the cache with the new keys and values.
    """
    q, *new = self._heads(x_MxD, positions_BxT.shape[1], positions_BxT)
    row_Bx1 = jnp.arange(len(positions_BxT))[:, None]
    keys, values = (
      old.at[row_Bx1, positions_BxT].set(x)
      for old, x in zip(cache, new, strict=True)
    )
    past_BxTxS = jnp.arange(keys.shape[1]) <= positions_BxT[..., None]
    out = jax.nn.dot_product_attention(
      q, keys, values, mask=past_BxTxS[:, None]
    )
    return self.o(out.reshape(len(x_MxD), -1)), (keys, values)

  def _heads(
    self, x_MxD: jax.Array, length: int, positions_BxT: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries (B, T, N, H), keys and values (B, T, K, H)."""
    config, width = self.config, self.config.head_width
    heads = (-1, length, config.n_heads, width)
    kv_heads = (-1, length, config.kv_heads, width)
    q, k, v = self.q(x_MxD), self.k(x_MxD), self.v(x_MxD)
    return (
      rotary(q.reshape(heads), config.rope_theta, positions_BxT),
      rotary(k.reshape(kv_heads), config.rope_theta, positions_BxT),
      v.reshape(kv_heads),
    )


class Mlp(nnx.Module):
  """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    d, ff = config.d_model, config.d_ff
    self.gate = _linear(config, d, ff, ("embed", "mlp"), rngs)
    self.up = _linear(config, d, ff, ("embed", "mlp"), rngs)
    self.down = _linear(config, ff, d, ("mlp", "embed"), rngs)

  def __call__(self, x_MxD: jax.Array) -> jax.Array:
    """(M, D) to (M, D)."""
    return self.down(jax.nn.silu(self.gate(x_MxD)) * self.up(x_MxD))


class Block(nnx.Module):
  """One decoder layer: attention and feed-forward, each pre-normalised."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.attn_norm = _norm(config, rngs)
    self.attn = Attention(config, rngs=rngs)
    self.mlp_norm = _norm(config, rngs)
    self.mlp = Mlp(config, rngs=rngs)

  def __call__(
    self,
    x_MxD: jax.Array,
    length: int,
    segments_BxT: jax.Array | None = None,
  ) -> jax.Array:
    """(M, D) to (M, D), where M = B * length."""
    x_MxD = constrain_batch(x_MxD, len(x_MxD) // length)
    x_MxD = x_MxD + self.attn(self.attn_norm(x_MxD), length, segments_BxT)
    return x_MxD + self.mlp(self.mlp_norm(x_MxD))

  def extend(
    self, x_MxD: jax.Array, positions_BxT: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """The same for positions that follow those in the cache."""
    mixed, cache = self.attn.extend(self.attn_norm(x_MxD), positions_BxT, cache)
    x_MxD = x_MxD + mixed
    return x_MxD + self.mlp(self.mlp_norm(x_MxD)), cache


def _stack(config: ModelConfig, rngs: nnx.Rngs) -> Block:
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


class Llama(nnx.Module):
  """Token ids (B, T) int32 to next-token logits (B, T, V) float32."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.embed = nnx.Embed(
      config.vocab_size,
      config.d_model,
      dtype=jnp.dtype(config.dtype),
      param_dtype=jnp.dtype(config.param_dtype),
      embedding_init=nnx.initializers.normal(config.init_std),
      embedding_metadata={"out_sharding": ("table", "features")},
      rngs=rngs,
    )
    self.layers = _stack(config, rngs)
    self.norm = _norm(config, rngs)
    if not config.tie_embeddings:
      axes = ("embed", "vocab")
      size = (config.d_model, config.vocab_size)
      self.lm_head = _linear(config, *size, axes, rngs)

  def __call__(
    self, tokens_BxT: jax.Array, segments_BxT: jax.Array | None = None
  ) -> jax.Array:
    """Logits (B, T, V) float32 of token ids (B, T).

    Args:
      tokens_BxT: token ids.
      segments_BxT: numbers of the texts that share a row, which do not see
        each other; None: a row is one text. That positions go on counting
        makes no difference, as only their distances matter.
    """
    rows, length = tokens_BxT.shape
    x_MxD = self.embed(tokens_BxT.reshape(-1))
    return self.head(self._scan_layers(x_MxD, length, segments_BxT), rows)

  def head(self, x_MxD: jax.Array, rows: int) -> jax.Array:
    """Logits (B, T, V) float32 of what the last layer gives, (B * T, D)."""
    x_MxD = constrain_batch(self.norm(x_MxD), rows)
    if self.config.tie_embeddings:
      logits_MxV = self.embed.attend(x_MxD)
    else:
      logits_MxV = self.lm_head(x_MxD)
    return logits_MxV.astype(jnp.float32).reshape(rows, len(x_MxD) // rows, -1)

  def _scan_layers(
    self,
    x_MxD: jax.Array,
    length: int,
    segments_BxT: jax.Array | None = None,
  ) -> jax.Array:
    def body(x: jax.Array, layer: Block) -> jax.Array:
      return layer(x, length, segments_BxT)

    if self.config.remat != "none":
      body = nnx.remat(body, policy=REMAT[self.config.remat])
    scan = nnx.scan(
      body,
      in_axes=(nnx.Carry, 0),
      out_axes=nnx.Carry,
      unroll=self.config.unroll,
    )
    return scan(x_MxD, self.layers)


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
  """The model's structure and its parameters' shapes, without memory.

  Returns:
    The graph definition, and the parameters as `nnx.Param` boxes that hold
    `jax.ShapeDtypeStruct`s and the logical names of their axes.
  """
  return nnx.split(abstract_model(config), nnx.Param)


def abstract_model(config: ModelConfig) -> Llama:
  """The model with shapes in place of its parameters."""
  # Eagerly sharded variables would ask for a mesh here, where none is needed:
  # `mesh.param_shardings` reads the names. The rules are for eval_shape,
  # which translates the names if there is a mesh.
  with nnx.use_eager_sharding(False), nnx.logical_axis_rules(RULES):
    return nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))


def init(config: ModelConfig, seed: int | jax.Array) -> dict:
  """Fresh parameters as nested dicts: `layers/attn/q/kernel` and so on."""
  with nnx.use_eager_sharding(False):
    model = Llama(config, rngs=nnx.Rngs(seed))
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def apply(
  graphdef: nnx.GraphDef,
  params: dict,
  tokens: jax.Array,
  segments: jax.Array | None = None,
) -> jax.Array:
  """Logits (B, T, V) of token ids (B, T) under `params`; see `Llama`."""
  return nnx.merge(graphdef, params)(tokens, segments)


# The model in three pieces, for those who walk the layers themselves:
#   x = embed(config, params, tokens)
#   for layer in the slices of params["layers"]: x = block(config, layer, x, T)
#   logits = head(config, params, x, B)


def embed(config: ModelConfig, params: dict, tokens: jax.Array) -> jax.Array:
  """Rows of the embedding: ids (B, T) to (B * T, D).

  Args:
    config: the model's.
    params: all parameters, or those outside `layers`.
    tokens: token ids (B, T).
  """
  return _outer(config, params).embed(tokens.reshape(-1))


def block(
  config: ModelConfig, layer: dict, x: jax.Array, length: int
) -> jax.Array:
  """One layer: (B * T, D) to (B * T, D).

  Args:
    config: the model's.
    layer: one layer's parameters, a slice of `params["layers"]`.
    x: activations, rows of `length` positions one after the other.
    length: T.
  """
  return nnx.merge(_structures(config)[1], layer)(x, length)


def head(
  config: ModelConfig, params: dict, x: jax.Array, rows: int
) -> jax.Array:
  """The last norm and the head: (B * T, D) to logits (B, T, V) float32.

  Args:
    config: the model's.
    params: all parameters, or those outside `layers`.
    x: what the last layer gives.
    rows: B.
  """
  return _outer(config, params).head(x, rows)


def empty_cache(config: ModelConfig, rows: int, length: int) -> Cache:
  """Room for the keys and values of all layers, each (L, B, S, K, H)."""
  shape = (config.n_layers, rows, length, config.kv_heads, config.head_width)
  return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)


def extend(
  config: ModelConfig,
  params: dict,
  tokens: jax.Array,
  positions: jax.Array,
  cache: Cache,
) -> tuple[jax.Array, Cache]:
  """All layers on tokens that follow those in the cache.

  Args:
    config: the model's.
    params: all parameters.
    tokens: token ids (B, T).
    positions: (B, T), their places in the cache, ascending within a row.
    cache: from `empty_cache` or an earlier call.

  Returns:
    What `head` takes, (B * T, D), and the cache with the tokens in it.
  """
  structure = _structures(config)[1]

  def body(x: jax.Array, slices: tuple) -> tuple[jax.Array, Cache]:
    layer, kept = slices
    return nnx.merge(structure, layer).extend(x, positions, kept)

  x = embed(config, params, tokens)
  return jax.lax.scan(body, x, (params["layers"], cache))


def _outer(config: ModelConfig, params: dict) -> Llama:
  """The model without its layers."""
  rest = {name: part for name, part in params.items() if name != "layers"}
  return nnx.merge(_structures(config)[0], rest)


@functools.cache
def _structures(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.GraphDef]:
  """Graph definitions of the model without its layers, and of one layer."""
  model = abstract_model(config)
  layer, _ = nnx.split(model.layers, nnx.Param)
  del model.layers
  return nnx.split(model, nnx.Param)[0], layer
