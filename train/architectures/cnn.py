"""A convolutional network in Flax Linen, trained through a `TrainState`.

To use it in a project of yours, give `make` any Optax optimizer:

  tx = galore_optax.galore_adamw(
    4e-3, rank=0.25, scale=0.25, residual="normalized"
  )
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from train.architectures.trainer import Batch, Trainer

# A kernel (3, 3, inputs, outputs) is nine matrices of (inputs, outputs), each
# with a basis. The first kernel has one input: it has 144 numbers, and bases
# would not save anything.
RULES = ()
KERNELS = "conv_[1-9][0-9]*/kernel"  # to read them in another way


@dataclasses.dataclass(frozen=True)
class Config:
  """The sizes of the run."""

  channels: int = 16  # of the first convolution; doubled by each other one
  depth: int = 3
  batch: int = 32
  steps: int = 1090  # five epochs
  rank: float = 0.25  # of the shorter side of each matrix
  gap: int = 50


class CNN(nn.Module):
  """Convolutions of stride two, the mean over the image, a head."""

  config: Config

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Images (n, 28, 28, 1) to logits (n, 10)."""
    for i in range(self.config.depth):
      channels = self.config.channels * 2**i
      x = nn.Conv(channels, (3, 3), strides=2, name=f"conv_{i}")(x)
      x = nn.GroupNorm(num_groups=8, name=f"norm_{i}")(x)
      x = nn.relu(x)
    return nn.Dense(10, name="head")(x.mean(axis=(1, 2)))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Mean over the batch."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.mean()


@jax.jit
def step(
  state: train_state.TrainState, batch: Batch
) -> tuple[train_state.TrainState, jax.Array]:
  """The next state and the loss."""

  def loss(params: Any) -> jax.Array:
    logits = state.apply_fn({"params": params}, batch["image"])
    return cross_entropy(logits, batch["label"])

  value, grads = jax.value_and_grad(loss)(state.params)
  return state.apply_gradients(grads=grads), value


@jax.jit
def score(state: train_state.TrainState, batch: Batch) -> dict[str, jax.Array]:
  """Loss and the share of wrong answers."""
  logits = state.apply_fn({"params": state.params}, batch["image"])
  wrong = jnp.argmax(logits, axis=-1) != batch["label"]
  value = cross_entropy(logits, batch["label"])
  return {"loss": value, "error": wrong.mean()}


def make(config: Config, tx: optax.GradientTransformation) -> Trainer:
  """The model with an optimizer."""
  model = CNN(config)

  def start(seed: int) -> train_state.TrainState:
    images = jnp.zeros((1, 28, 28, 1))
    params = jax.jit(model.init)(jax.random.key(seed), images)["params"]
    return train_state.TrainState.create(
      apply_fn=model.apply, params=params, tx=tx
    )

  return Trainer(
    start=start,
    step=step,
    evaluate=score,
    params=lambda state: state.params,
    opt_state=lambda state: state.opt_state,
  )
