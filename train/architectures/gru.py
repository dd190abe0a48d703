"""A GRU language model in Haiku.

To use it in a project of yours, give `make` any Optax optimizer:

  tx = galore_optax.galore_adamw(
    4e-3, rank=0.25, scale=0.25, residual="normalized", rules=RULES
  )
"""

import dataclasses
import functools

import haiku as hk
import jax
import optax

from train.architectures.speeches import VOCABULARY
from train.architectures.trainer import Batch, Trainer

# hk.GRU keeps w_i (inputs, 3 * width) and w_h (width, 3 * width), matrices as
# they are. Embedding and head stay at full rank because of their names.
RULES = ()


@dataclasses.dataclass(frozen=True)
class Config:
  """The sizes of the run."""

  width: int = 64
  depth: int = 2
  length: int = 64  # tokens of a row
  batch: int = 16
  steps: int = 600
  rank: float = 0.25  # of the shorter side of each matrix
  gap: int = 50


def forward(config: Config, tokens: jax.Array) -> jax.Array:
  """Tokens (n, length) to logits (n, length, vocabulary)."""
  x = hk.Embed(VOCABULARY, config.width, name="embed")(tokens)
  for i in range(config.depth):
    core = hk.GRU(config.width, name=f"gru_{i}")
    start = core.initial_state(len(tokens))
    y, _ = hk.dynamic_unroll(core, x, start, time_major=False)
    x = x + y
  x = hk.LayerNorm(-1, create_scale=True, create_offset=False, name="norm")(x)
  return hk.Linear(VOCABULARY, with_bias=False, name="head")(x)


def make(config: Config, tx: optax.GradientTransformation) -> Trainer:
  """The model with an optimizer."""
  model = hk.without_apply_rng(hk.transform(functools.partial(forward, config)))

  def loss(params: hk.Params, batch: Batch) -> jax.Array:
    tokens = batch["tokens"]
    logits = model.apply(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]
    ).mean()

  @functools.partial(jax.jit, donate_argnums=0)
  def step(
    state: tuple[hk.Params, optax.OptState], batch: Batch
  ) -> tuple[tuple[hk.Params, optax.OptState], jax.Array]:
    params, opt_state = state
    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value

  def start(seed: int) -> tuple[hk.Params, optax.OptState]:
    tokens = jax.numpy.zeros((1, config.length), int)
    params = jax.jit(model.init)(jax.random.key(seed), tokens)
    return params, jax.jit(tx.init)(params)

  return Trainer(
    start=start,
    step=step,
    evaluate=jax.jit(lambda state, batch: {"loss": loss(state[0], batch)}),
    params=lambda state: state[0],
    opt_state=lambda state: state[1],
  )
