"""A LLaMA with mixtures of experts in Flax Linen: `nn.scan` over the layers.

To use it in a project of yours, give `make` any Optax optimizer:

  tx = galore_optax.galore_adamw(
    4e-3, rank=0.25, scale=0.25, residual="normalized", rules=RULES
  )
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from train.architectures.speeches import VOCABULARY
from train.architectures.trainer import Batch, Trainer

# Expert kernels are (layers, experts, inputs, outputs): without a rule, one
# matrix with a basis of its own for each expert of each layer. The router is a
# matrix too, but small, and a column of it belongs to one expert: it stays at
# full rank.
RULES = (("router", None),)


@dataclasses.dataclass(frozen=True)
class Config:
  """The sizes of the run."""

  width: int = 64
  depth: int = 2
  heads: int = 4
  experts: int = 4
  active: int = 2  # experts of a token
  expert_width: int = 64
  balance: float = 0.01  # weight of the loss that balances the experts
  length: int = 64  # tokens of a row
  batch: int = 8
  steps: int = 600
  rank: float = 0.25  # of the shorter side of each matrix
  gap: int = 50


def rotate(x: jax.Array) -> jax.Array:
  """Rotary position embeddings of queries or keys (n, length, heads, size)."""
  half = x.shape[-1] // 2
  angles = jnp.outer(jnp.arange(x.shape[1]), 1e4 ** -(jnp.arange(half) / half))
  sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Attention(nn.Module):
  """Causal attention with rotary positions."""

  config: Config

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Rows of tokens (n, length, width)."""
    width, heads = self.config.width, self.config.heads
    project = lambda name: nn.Dense(width, use_bias=False, name=name)
    split = lambda y: y.reshape(*y.shape[:2], heads, width // heads)
    query, key, value = (split(project(name)(x)) for name in "qkv")
    y = jax.nn.dot_product_attention(
      rotate(query), rotate(key), value, is_causal=True
    )
    return project("o")(y.reshape(x.shape))


class Experts(nn.Module):
  """SwiGLU experts. All are computed, and those chosen by the router added."""

  config: Config

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What to add to rows of tokens, and how unbalanced the experts are."""
    c = self.config
    chances = nn.softmax(nn.Dense(c.experts, False, name="router")(x))
    best, chosen = jax.lax.top_k(chances, c.active)
    one_hot = nn.one_hot(chosen, c.experts)
    weights = jnp.einsum("nlk,nlke->nle", best, one_hot)
    weights /= weights.sum(-1, keepdims=True)
    init = nn.initializers.lecun_normal(batch_axis=0)
    kernel = lambda name, *shape: self.param(name, init, (c.experts, *shape))
    up = jnp.einsum("nld,edf->nlef", x, kernel("up", c.width, c.expert_width))
    gate = kernel("gate", c.width, c.expert_width)
    up *= nn.silu(jnp.einsum("nld,edf->nlef", x, gate))
    down = kernel("down", c.expert_width, c.width)
    y = jnp.einsum("nlef,efd,nle->nld", up, down, weights)
    # Switch Transformer (2101.03961), section 2.2: 1 if experts are balanced.
    share = one_hot.sum(2).mean((0, 1)) / c.active
    return y, c.experts * (share * chances.mean((0, 1))).sum()


class Block(nn.Module):
  """A layer in the form that `nn.scan` wants."""

  config: Config

  @nn.compact
  def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
    """The carry of the scan, and what it stacks."""
    norm = lambda name: nn.RMSNorm(name=name)
    x = x + Attention(self.config, name="attention")(norm("attention_norm")(x))
    y, balance = Experts(self.config, name="experts")(norm("experts_norm")(x))
    return x + y, balance


class MoE(nn.Module):
  """Embedding, stacked layers, norm, head."""

  config: Config

  @nn.compact
  def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens (n, length) to logits, and how unbalanced the experts are."""
    layers = nn.scan(
      Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.config.depth,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    x = nn.Embed(VOCABULARY, self.config.width, name="embed")(tokens)
    x, balance = layers(self.config, name="layers")(x, None)
    x = nn.RMSNorm(name="norm")(x)
    logits = nn.Dense(VOCABULARY, use_bias=False, name="head")(x)
    return logits, balance.mean()


def losses(
  state: train_state.TrainState, params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
  """Mean cross-entropy, and how unbalanced the experts are."""
  tokens = batch["tokens"]
  logits, balance = state.apply_fn({"params": params}, tokens[:, :-1])
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels(
    logits, tokens[:, 1:]
  )
  return cross_entropy.mean(), balance


def make(config: Config, tx: optax.GradientTransformation) -> Trainer:
  """The model with an optimizer."""
  model = MoE(config)

  def start(seed: int) -> train_state.TrainState:
    tokens = jnp.zeros((1, config.length), int)
    params = jax.jit(model.init)(jax.random.key(seed), tokens)["params"]
    return train_state.TrainState.create(
      apply_fn=model.apply, params=params, tx=tx
    )

  @jax.jit
  def step(
    state: train_state.TrainState, batch: Batch
  ) -> tuple[train_state.TrainState, jax.Array]:
    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
      value, balance = losses(state, params, batch)
      return value + config.balance * balance, value

    grads, value = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), value

  @jax.jit
  def evaluate(
    state: train_state.TrainState, batch: Batch
  ) -> dict[str, jax.Array]:
    value, balance = losses(state, state.params, batch)
    return {"loss": value, "balance": balance}

  return Trainer(
    start=start,
    step=step,
    evaluate=evaluate,
    params=lambda state: state.params,
    opt_state=lambda state: state.opt_state,
  )
