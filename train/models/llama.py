"""A LLaMA decoder in Flax NNX: RMSNorm, rotary positions, SwiGLU.

By its config it is also a Mistral, Mixtral, Qwen or SmolLM3: with biases,
normalized queries and keys, sliding windows, layers without rotations, or
mixtures of experts (see `train/models/experts.py`).

    graphdef, boxes = llama.abstract(config)        # shapes, no memory
    params = llama.init(config, seed)               # nested dicts
    llama.apply(graphdef, params, tokens)           # logits (B, T, V)

The layers are stacked (see `train/models/layers.py`), so every kernel in them
is (L, rows, columns).

Names of local arrays end in their shape: B rows, T positions, M = B * T
tokens, D d_model, N query heads, K key/value heads, H head width, V
vocabulary. Outside the attention, rows and positions are one flat axis M: the
gradient of a weight is then one plain matrix product, which the CPU compiler
runs two to three times faster than one that contracts two axes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from train.config.schema import ModelConfig
from train.models import attention, experts, layer_kinds, layers, rope
from train.models.layer_kinds import LayerKind
from train.parallel.mesh import constrain_batch

Cache = tuple[jax.Array, jax.Array]  # keys and values of earlier positions


def _linear(
  config: ModelConfig,
  fan_in: int,
  fan_out: int,
  axes: tuple[str, str],
  rngs: nnx.Rngs,
  use_bias: bool = False,
) -> nnx.Linear:
  return layers.linear(config, fan_in, fan_out, axes, rngs, use_bias=use_bias)


def _norm(config: ModelConfig, width: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
  return nnx.RMSNorm(
    width,
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
    d, bias = config.d_model, config.attention_bias
    inward, outward = ("embed", "heads"), ("heads", "embed")
    self.q = _linear(config, d, queries, inward, rngs, bias != "none")
    self.k = _linear(config, d, keys, inward, rngs, bias != "none")
    self.v = _linear(config, d, keys, inward, rngs, bias != "none")
    self.o = _linear(config, queries, d, outward, rngs, bias == "all")
    if config.qk_norm:
      self.q_norm = _norm(config, width, rngs)
      self.k_norm = _norm(config, width, rngs)

  def __call__(
    self,
    x_MxD: jax.Array,
    length: int,
    segments_BxT: jax.Array | None = None,
    kind: LayerKind | None = None,
  ) -> jax.Array:
    """Attends within rows of `length` and segments; (M, D) to (M, D)."""
    heads = self._heads(x_MxD, length, kind)
    size = layer_kinds.window(self.config, length, kind)
    out = attention.attend(self.config.attention, *heads, segments_BxT, size)
    return self.o(out.reshape(len(x_MxD), -1))

  def extend(
    self,
    x_MxD: jax.Array,
    positions_BxT: jax.Array,
    cache: Cache,
    kind: LayerKind | None = None,
  ) -> tuple[jax.Array, Cache]:
    """Attends to the cached positions and to the new ones.

    Args:
      x_MxD: T new positions of each row.
      positions_BxT: their indices in the cache, ascending within a row.
      cache: keys and values (B, S, K, H). Entries after a position are not
        read, so they need not be cleared.
      kind: of the layer, if layers differ.

    Returns:
      (M, D), and the cache with the keys and values of the new positions.
    """
    q, *new = self._heads(x_MxD, positions_BxT.shape[1], kind, positions_BxT)
    row_Bx1 = jnp.arange(len(positions_BxT))[:, None]
    keys, values = (
      old.at[row_Bx1, positions_BxT].set(x)
      for old, x in zip(cache, new, strict=True)
    )
    index_S, now_BxTx1 = jnp.arange(keys.shape[1]), positions_BxT[..., None]
    seen_BxTxS = index_S <= now_BxTx1
    size = layer_kinds.window(self.config, keys.shape[1], kind)
    if size is not None:
      seen_BxTxS &= index_S > now_BxTx1 - size
    out = jax.nn.dot_product_attention(
      q, keys, values, mask=seen_BxTxS[:, None]
    )
    return self.o(out.reshape(len(x_MxD), -1)), (keys, values)

  def _heads(
    self,
    x_MxD: jax.Array,
    length: int,
    kind: LayerKind | None,
    positions_BxT: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries (B, T, N, H), keys and values (B, T, K, H)."""
    config, width = self.config, self.config.head_width
    heads = (-1, length, config.n_heads, width)
    kv_heads = (-1, length, config.kv_heads, width)
    q, k, v = self.q(x_MxD), self.k(x_MxD), self.v(x_MxD)
    q, k = q.reshape(heads), k.reshape(kv_heads)
    if config.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    rotates = kind.rotates if kind and config.layers_without_rope else None
    rotate = functools.partial(
      rope.rotate,
      rope=rope.of(config),
      positions_BxT=positions_BxT,
      rotates=rotates,
    )
    return rotate(q), rotate(k), v.reshape(kv_heads)


class Mlp(nnx.Module):
  """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    d, ff, bias = config.d_model, config.d_ff, config.mlp_bias
    self.gate = _linear(config, d, ff, ("embed", "mlp"), rngs, bias)
    self.up = _linear(config, d, ff, ("embed", "mlp"), rngs, bias)
    self.down = _linear(config, ff, d, ("mlp", "embed"), rngs, bias)

  def __call__(self, x_MxD: jax.Array) -> jax.Array:
    """(M, D) to (M, D)."""
    return self.down(jax.nn.silu(self.gate(x_MxD)) * self.up(x_MxD))


class Block(nnx.Module):
  """One decoder layer: attention and feed-forward, each pre-normalized."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.attn_norm = _norm(config, config.d_model, rngs)
    self.attn = Attention(config, rngs=rngs)
    self.mlp_norm = _norm(config, config.d_model, rngs)
    if config.n_experts:
      self.experts = experts.Experts(config, rngs=rngs)
    else:
      self.mlp = Mlp(config, rngs=rngs)

  def __call__(
    self,
    x_MxD: jax.Array,
    length: int,
    segments_BxT: jax.Array | None = None,
    kind: LayerKind | None = None,
    counted_BxT: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """(M, D) to (M, D), where M = B * length; and what `Experts` counts."""
    rows = len(x_MxD) // length
    x_MxD = constrain_batch(x_MxD, rows)
    normed_MxD = self.attn_norm(x_MxD)
    x_MxD = x_MxD + self.attn(normed_MxD, length, segments_BxT, kind)
    return self._feed_forward(x_MxD, rows, counted_BxT)

  def _feed_forward(
    self, x_MxD: jax.Array, rows: int, counted_BxT: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array | None]:
    normed_MxD = self.mlp_norm(x_MxD)
    if not hasattr(self, "experts"):
      return x_MxD + self.mlp(normed_MxD), None
    counted_M = None if counted_BxT is None else counted_BxT.reshape(-1)
    y_MxD, sums_2xE = self.experts(normed_MxD, rows, counted_M)
    return x_MxD + y_MxD, sums_2xE

  def extend(
    self,
    x_MxD: jax.Array,
    positions_BxT: jax.Array,
    cache: Cache,
    kind: LayerKind | None = None,
  ) -> tuple[jax.Array, Cache]:
    """The same layer on positions that follow those in the cache."""
    normed_MxD = self.attn_norm(x_MxD)
    mixed, cache = self.attn.extend(normed_MxD, positions_BxT, cache, kind)
    return self._feed_forward(x_MxD + mixed, len(positions_BxT))[0], cache


class Llama(nnx.Module):
  """Token ids (B, T) int32 to next-token logits (B, T, V) float32."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.embed = layers.embedding(config, config.vocab_size, "table", rngs)
    self.layers = layers.stack(
      lambda rngs: Block(config, rngs=rngs), config.n_layers, rngs
    )
    self.norm = _norm(config, config.d_model, rngs)
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
      segments_BxT: numbers of the texts that share a row and do not attend to
        each other; None: a row is one text. Positions do not restart with a
        text, which changes nothing: only their differences matter.
    """
    return self.with_balance(tokens_BxT, segments_BxT)[0]

  def with_balance(
    self,
    tokens_BxT: jax.Array,
    segments_BxT: jax.Array | None = None,
    counted_BxT: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Logits, and the loss that balances the experts, if there are any.

    Args:
      tokens_BxT: token ids.
      segments_BxT: numbers of the texts that share a row.
      counted_BxT: 1 for tokens that count for the balance, 0 for padding; None:
        all do.
    """
    rows, length = tokens_BxT.shape
    x_MxD = self.embed(tokens_BxT.reshape(-1))
    x_MxD, sums_2xE = self._scan_layers(
      x_MxD, length, segments_BxT, counted_BxT
    )
    logits_BxTxV = self.head(x_MxD, rows)
    if sums_2xE is None:
      return logits_BxTxV, None
    count = jnp.asarray(rows * length)
    count = count if counted_BxT is None else counted_BxT.sum()
    return logits_BxTxV, experts.balance_loss(self.config, sums_2xE, count)

  def head(self, x_MxD: jax.Array, rows: int) -> jax.Array:
    """Logits (B, T, V) float32 of the last layer's output (B * T, D)."""
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
    segments_BxT: jax.Array | None,
    counted_BxT: jax.Array | None,
  ) -> tuple[jax.Array, jax.Array | None]:
    def body(carry: tuple, layer: Block, *kinds: LayerKind) -> tuple:
      x_MxD, before = carry
      kind = kinds[0] if kinds else None
      x_MxD, sums_2xE = layer(x_MxD, length, segments_BxT, kind, counted_BxT)
      return x_MxD, None if sums_2xE is None else before + sums_2xE

    found = layer_kinds.stacked(self.config)
    each = () if found is None else (jax.tree.map(jnp.asarray, found),)
    carry = (x_MxD, no_sums(self.config))
    return layers.scan(self.config, body, carry, self.layers, *each)


def no_sums(config: ModelConfig) -> jax.Array | None:
  """What the layers add their experts' sums to; None: they have no experts."""
  if not config.n_experts:
    return None
  return jnp.zeros((2, config.n_experts), jnp.float32)


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
  """The model's structure and the shapes of its parameters; no memory.

  Returns:
    The graph definition, and the parameters as `nnx.Param` boxes that hold
    `jax.ShapeDtypeStruct`s and the logical names of their axes.
  """
  return nnx.split(abstract_model(config), nnx.Param)


def abstract_model(config: ModelConfig) -> Llama:
  """The model as a module, with shapes instead of parameters."""
  return layers.abstract(lambda rngs: Llama(config, rngs=rngs))


def init(config: ModelConfig, seed: int | jax.Array) -> dict:
  """Random parameters as nested dicts: `layers/attn/q/kernel` and so on."""
  return layers.init(lambda rngs: Llama(config, rngs=rngs), seed)


def apply(
  graphdef: nnx.GraphDef,
  params: dict,
  tokens: jax.Array,
  segments: jax.Array | None = None,
) -> jax.Array:
  """Logits (B, T, V) of token ids (B, T) under `params`; see `Llama`."""
  return nnx.merge(graphdef, params)(tokens, segments)


def apply_with_balance(
  graphdef: nnx.GraphDef,
  params: dict,
  tokens: jax.Array,
  segments: jax.Array | None = None,
  counted: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """The same, and the balance of the experts; see `Llama.with_balance`."""
  model = nnx.merge(graphdef, params)
  return model.with_balance(tokens, segments, counted)


# The model in three pieces, for callers that loop over the layers themselves:
#   x = embed(config, params, tokens)
#   for i, layer in the slices of params["layers"]:
#     x, _ = block(config, layer, x, T, i)
#   logits = head(config, params, x, B)


def embed(config: ModelConfig, params: dict, tokens: jax.Array) -> jax.Array:
  """The embeddings of token ids: (B, T) to (B * T, D).

  Args:
    config: of the model.
    params: all parameters, or those outside `layers`.
    tokens: token ids (B, T).
  """
  return _outer(config, params).embed(tokens.reshape(-1))


def block(
  config: ModelConfig,
  layer: dict,
  x: jax.Array,
  length: int,
  number: Any,
  counted: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """One layer: (B * T, D) to (B * T, D), and what its experts count.

  Args:
    config: of the model.
    layer: parameters of one layer, a slice of `params["layers"]`.
    x: activations of rows of `length` positions, one row after another.
    length: T.
    number: the layer's, from 0; it may be traced. It is read only if the
      layers differ.
    counted: (B, T), 1 for tokens that count for the balance of the experts;
      None: all do.
  """
  run = nnx.merge(_structures(config)[1], layer)
  kind = layer_kinds.one(config, number)
  return run(x, length, kind=kind, counted_BxT=counted)


def head(
  config: ModelConfig, params: dict, x: jax.Array, rows: int
) -> jax.Array:
  """The last norm and the head: (B * T, D) to logits (B, T, V) float32.

  Args:
    config: of the model.
    params: all parameters, or those outside `layers`.
    x: the output of the last layer.
    rows: B.
  """
  return _outer(config, params).head(x, rows)


def empty_cache(config: ModelConfig, rows: int, length: int) -> Cache:
  """A cache for the keys and values of all layers, each (L, B, S, K, H)."""
  shape = (config.n_layers, rows, length, config.kv_heads, config.head_width)
  return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)


def extend(
  config: ModelConfig,
  params: dict,
  tokens: jax.Array,
  positions: jax.Array,
  cache: Cache,
) -> tuple[jax.Array, Cache]:
  """Applies all layers to tokens that follow those in the cache.

  Args:
    config: of the model.
    params: all parameters.
    tokens: token ids (B, T).
    positions: (B, T), their indices in the cache, ascending within a row.
    cache: from `empty_cache` or an earlier call.

  Returns:
    The output of the last layer, (B * T, D), for `head`; and the cache with
    the keys and values of these tokens.
  """
  structure = _structures(config)[1]

  def body(x: jax.Array, slices: tuple) -> tuple[jax.Array, Cache]:
    layer, layer_cache, layer_kind = slices
    run = nnx.merge(structure, layer)
    return run.extend(x, positions, layer_cache, layer_kind)

  x = embed(config, params, tokens)
  kinds = layer_kinds.stacked(config)
  return jax.lax.scan(body, x, (params["layers"], cache, kinds))


def _outer(config: ModelConfig, params: dict) -> Llama:
  """The model without its layers, with parameters."""
  rest = {name: part for name, part in params.items() if name != "layers"}
  return nnx.merge(_structures(config)[0], rest)


@functools.cache
def _structures(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.GraphDef]:
  """Graph definitions of the model without its layers, and of one layer."""
  model = abstract_model(config)
  layer, _ = nnx.split(model.layers, nnx.Param)
  del model.layers
  return nnx.split(model, nnx.Param)[0], layer
