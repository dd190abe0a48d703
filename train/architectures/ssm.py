"""A selective state-space model (Mamba's block) in Equinox.

The recurrence is that of Gu and Dao, 2312.00752, section 3. To use it in a
project of yours, give `make` any Optax optimizer:

  tx = galore_optax.galore_adamw(
    4e-3, rank=0.25, scale=0.25, residual="normalized", rules=RULES
  )
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from train.architectures.speeches import VOCABULARY
from train.architectures.trainer import Batch, Trainer

# Decay rates (width, states) and the filters of the convolution (width, taps)
# have two axes, but each number acts on a channel of its own: they are no
# matrices, and stay at full rank.
RULES = (("log_decay|filters", None),)


@dataclasses.dataclass(frozen=True)
class Config:
  """The sizes of the run."""

  width: int = 64
  inner: int = 64
  states: int = 4  # of a channel
  taps: int = 4  # tokens that the convolution sees
  step_rank: int = 8
  depth: int = 2
  length: int = 64  # tokens of a row
  batch: int = 8
  steps: int = 600
  rank: float = 0.25  # of the shorter side of each matrix
  gap: int = 50


class Block(eqx.Module):
  """Norm, convolution, selective recurrence, gate, and a sum."""

  norm: eqx.nn.RMSNorm
  into: eqx.nn.Linear
  filters: jax.Array
  select: eqx.nn.Linear
  step_size: eqx.nn.Linear
  log_decay: jax.Array
  skip: jax.Array
  out_of: eqx.nn.Linear
  sizes: tuple[int, int] = eqx.field(static=True)

  def __init__(self, config: Config, key: jax.Array):
    keys = jax.random.split(key, 5)
    width, inner, states = config.width, config.inner, config.states
    linear = lambda i, o, key: eqx.nn.Linear(i, o, use_bias=False, key=key)
    self.norm = eqx.nn.RMSNorm(width, use_bias=False)
    self.into = linear(width, 2 * inner, keys[0])
    self.filters = jax.random.normal(keys[1], (inner, config.taps)) / 2
    self.select = linear(inner, config.step_rank + 2 * states, keys[2])
    self.step_size = eqx.nn.Linear(config.step_rank, inner, key=keys[3])
    decays = jnp.arange(1.0, states + 1)
    self.log_decay = jnp.log(jnp.tile(decays, (inner, 1)))
    self.skip = jnp.ones(inner)
    self.out_of = linear(inner, width, keys[4])
    self.sizes = config.step_rank, states

  def __call__(self, x: jax.Array) -> jax.Array:
    """One row (length, width)."""
    u, gate = jnp.split(jax.vmap(self.into)(jax.vmap(self.norm)(x)), 2, axis=1)
    u = jax.nn.silu(self._convolve(u))
    u = (self._recur(u) + self.skip * u) * jax.nn.silu(gate)
    return x + jax.vmap(self.out_of)(u)

  def _convolve(self, u: jax.Array) -> jax.Array:
    """Causal, and each channel by itself."""
    taps = self.filters.shape[1]
    padded = jnp.pad(u, ((taps - 1, 0), (0, 0)))
    shifted = [padded[i : i + len(u)] * self.filters[:, i] for i in range(taps)]
    return sum(shifted, jnp.zeros_like(u))

  def _recur(self, u: jax.Array) -> jax.Array:
    rank, states = self.sizes
    selected = jax.vmap(self.select)(u)
    low, write, read = jnp.split(selected, [rank, rank + states], axis=1)
    step = jax.nn.softplus(jax.vmap(self.step_size)(low) - 3)[..., None]
    keep = jnp.exp(-step * jnp.exp(self.log_decay))  # (length, inner, states)
    add = step * write[:, None] * u[..., None]

    def join(first: tuple, second: tuple) -> tuple:
      return first[0] * second[0], second[0] * first[1] + second[1]

    _, hidden = jax.lax.associative_scan(join, (keep, add))
    return jnp.einsum("lis,ls->li", hidden, read)


class Mamba(eqx.Module):
  """Embedding, blocks, norm, head."""

  embed: eqx.nn.Embedding
  blocks: list[Block]
  norm: eqx.nn.RMSNorm
  head: eqx.nn.Linear

  def __init__(self, config: Config, key: jax.Array):
    first, last, *keys = jax.random.split(key, config.depth + 2)
    width = config.width
    self.embed = eqx.nn.Embedding(VOCABULARY, width, key=first)
    self.blocks = [Block(config, key) for key in keys]
    self.norm = eqx.nn.RMSNorm(width, use_bias=False)
    self.head = eqx.nn.Linear(width, VOCABULARY, use_bias=False, key=last)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Tokens (length,) to logits (length, vocabulary)."""
    x = jax.vmap(self.embed)(tokens)
    for block in self.blocks:
      x = block(x)
    return jax.vmap(self.head)(jax.vmap(self.norm)(x))


def loss(model: Mamba, batch: Batch) -> jax.Array:
  """Mean cross-entropy."""
  tokens = jnp.asarray(batch["tokens"])
  logits = jax.vmap(model)(tokens[:, :-1])
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, tokens[:, 1:]
  ).mean()


def trained(model: Mamba) -> Mamba:
  """The floating-point arrays of a model, with None in place of the rest."""
  return eqx.filter(model, eqx.is_inexact_array)


def make(config: Config, tx: optax.GradientTransformation) -> Trainer:
  """The model with an optimizer."""

  def start(seed: int) -> tuple[Mamba, optax.OptState]:
    model = eqx.filter_jit(Mamba)(config, jax.random.key(seed))
    return model, tx.init(trained(model))

  @eqx.filter_jit
  def step(
    state: tuple[Mamba, optax.OptState], batch: Batch
  ) -> tuple[tuple[Mamba, optax.OptState], jax.Array]:
    model, opt_state = state
    value, grads = eqx.filter_value_and_grad(loss)(model, batch)
    updates, opt_state = tx.update(grads, opt_state, trained(model))
    return (eqx.apply_updates(model, updates), opt_state), value

  score = eqx.filter_jit(lambda model, batch: {"loss": loss(model, batch)})
  return Trainer(
    start=start,
    step=step,
    evaluate=lambda state, batch: score(state[0], batch),
    params=lambda state: trained(state[0]),
    opt_state=lambda state: state[1],
  )
