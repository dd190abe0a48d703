"""A vision transformer in Flax NNX: `nnx.Optimizer`, DenseGeneral kernels.

To use it in a project of yours, give `make` any Optax optimizer:

  tx = galore_optax.galore_adamw(
    4e-3, rank=0.25, scale=0.25, residual="normalized", rules=RULES
  )
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from galore_optax import Projection
from train.architectures.trainer import Batch, Trainer

# The kernels of nnx.MultiHeadAttention have three axes. By default the last two
# would be the matrix; these rules make one of (width, heads * size).
RULES = (
  ("attention/(query|key|value)/kernel", Projection(rows=0, cols=(1, 2))),
  ("attention/out/kernel", Projection(rows=(0, 1), cols=2)),
)


@dataclasses.dataclass(frozen=True)
class Config:
  """The sizes of the run."""

  width: int = 48
  depth: int = 2
  heads: int = 4
  patch: int = 7  # pixels along a side
  batch: int = 32
  steps: int = 1090  # five epochs
  rank: float = 0.25  # of the shorter side of each matrix
  gap: int = 50


class Block(nnx.Module):
  """Attention and an MLP, each with a norm before it and a sum after it."""

  def __init__(self, config: Config, rngs: nnx.Rngs):
    width = config.width
    self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      config.heads, width, decode=False, rngs=rngs
    )
    self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
    self.up = nnx.Linear(width, 4 * width, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Rows of patches (n, patches, width)."""
    x = x + self.attention(self.attention_norm(x))
    return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class ViT(nnx.Module):
  """Patches, position embeddings, blocks, the mean over patches, a head."""

  def __init__(self, config: Config, rngs: nnx.Rngs):
    patch, width = config.patch, config.width
    self.patch = patch
    self.patch_embed = nnx.Linear(patch * patch, width, rngs=rngs)
    self.position_embed = nnx.Param(
      0.02 * rngs.params.normal(((28 // patch) ** 2, width))
    )
    self.blocks = nnx.List([Block(config, rngs) for _ in range(config.depth)])
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.head = nnx.Linear(width, 10, rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Images (n, 28, 28, 1) to logits (n, 10)."""
    side = 28 // self.patch
    x = images.reshape(-1, side, self.patch, side, self.patch)
    x = x.transpose(0, 1, 3, 2, 4).reshape(-1, side**2, self.patch**2)
    x = self.patch_embed(x) + self.position_embed[...]
    for block in self.blocks:
      x = block(x)
    return self.head(self.norm(x.mean(axis=1)))


def loss(model: ViT, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Mean cross-entropy, and the logits."""
  logits = model(batch["image"])
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch["label"]
  )
  return losses.mean(), logits


@nnx.jit
def update(model: ViT, optimizer: nnx.Optimizer, batch: Batch) -> jax.Array:
  """Changes model and optimizer in place."""
  gradient = nnx.value_and_grad(loss, has_aux=True)
  (value, _), grads = gradient(model, batch)
  optimizer.update(model, grads)
  return value


@nnx.jit
def score(model: ViT, batch: Batch) -> dict[str, jax.Array]:
  """Loss and the share of wrong answers."""
  value, logits = loss(model, batch)
  wrong = jnp.argmax(logits, axis=-1) != batch["label"]
  return {"loss": value, "error": wrong.mean()}


def make(config: Config, tx: optax.GradientTransformation) -> Trainer:
  """The model with an optimizer."""

  def start(seed: int) -> tuple[ViT, nnx.Optimizer]:
    model = ViT(config, nnx.Rngs(seed))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

  def step(
    state: tuple[ViT, nnx.Optimizer], batch: Batch
  ) -> tuple[tuple[ViT, nnx.Optimizer], jax.Array]:
    model, optimizer = state
    return state, update(model, optimizer, batch)

  return Trainer(
    start=start,
    step=step,
    evaluate=lambda state, batch: score(state[0], batch),
    params=lambda state: nnx.state(state[0], nnx.Param),
    opt_state=lambda state: state[1].opt_state,
  )
