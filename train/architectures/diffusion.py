"""A diffusion model of digits in Flax NNX: a small U-Net, and flow matching.

It learns the velocity `noise - image` on the straight line between them (Lipman
et al., 2210.02747; Liu et al., 2209.03003). To use it in a project of yours,
give `make` any Optax optimizer:

  tx = galore_optax.galore_adamw(
    4e-3, rank=0.25, scale=0.25, residual="normalized"
  )
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from train.architectures.trainer import Batch, Trainer

# A kernel (3, 3, inputs, outputs) is nine matrices of (inputs, outputs), each
# with a basis.
RULES = ()
KERNELS = "conv/kernel"  # to read them in another way
SAMPLING_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Config:
  """The sizes of the run."""

  channels: int = 24  # at 14 x 14; twice as many at 7 x 7
  batch: int = 32
  steps: int = 600
  rank: float = 0.25  # of the shorter side of each matrix
  gap: int = 50


class Block(nnx.Module):
  """A convolution that sees the time and the digit, with norm and swish."""

  def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
    self.conv = nnx.Conv(inputs, outputs, (3, 3), rngs=rngs)
    self.norm = nnx.GroupNorm(outputs, num_groups=8, rngs=rngs)
    self.condition = nnx.Linear(64, outputs, rngs=rngs)

  def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
    """Images (n, h, w, inputs), and what they depend on (n, 64)."""
    y = self.norm(self.conv(x)) + self.condition(condition)[:, None, None]
    y = nnx.swish(y)
    return x + y if x.shape == y.shape else y


class UNet(nnx.Module):
  """Works on 14 x 14 patches of 2 x 2 pixels, and on half of that."""

  def __init__(self, config: Config, rngs: nnx.Rngs):
    c = config.channels
    block = lambda i, o: Block(i, o, rngs)
    self.label_embed = nnx.Embed(10, 64, rngs=rngs)
    self.time = nnx.Linear(32, 64, rngs=rngs)
    self.first, self.down = block(4, c), block(c, 2 * c)
    self.middle = nnx.List([block(2 * c, 2 * c) for _ in range(2)])
    self.up = block(3 * c, c)
    self.head = nnx.Linear(
      c, 4, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
    )

  def __call__(
    self, x: jax.Array, time: jax.Array, label: jax.Array
  ) -> jax.Array:
    """Noisy images (n, 28, 28, 1) to velocities of that shape.

    Args:
      x: Images.
      time: (n,), 0 for an image and 1 for noise.
      label: (n,), the digits.
    """
    angles = time[:, None] * 2.0 ** jnp.arange(-2, 6, 0.5)
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    condition = nnx.swish(self.time(waves) + self.label_embed(label))
    x = x.reshape(-1, 14, 2, 14, 2).transpose(0, 1, 3, 2, 4)
    wide = self.first(x.reshape(-1, 14, 14, 4), condition)
    deep = self.down(nnx.avg_pool(wide, (2, 2), (2, 2)), condition)
    for block in self.middle:
      deep = block(deep, condition)
    deep = deep.repeat(2, axis=1).repeat(2, axis=2)
    wide = self.up(jnp.concatenate([wide, deep], axis=-1), condition)
    y = self.head(wide).reshape(-1, 14, 14, 2, 2).transpose(0, 1, 3, 2, 4)
    return y.reshape(-1, 28, 28, 1)


def loss(model: UNet, batch: Batch, key: jax.Array) -> jax.Array:
  """Mean squared error of the velocity, with times spaced over [0, 1]."""
  image = 2 * jnp.asarray(batch["image"]) - 1
  shift, noise = jax.random.split(key)
  count = len(image)
  time = (jnp.arange(count) + jax.random.uniform(shift)) / count
  noise = jax.random.normal(noise, image.shape)
  weight = time[:, None, None, None]
  noisy = (1 - weight) * image + weight * noise
  velocity = model(noisy, time, batch["label"])
  return jnp.mean((velocity - (noise - image)) ** 2)


@nnx.jit
def update(
  model: UNet, optimizer: nnx.Optimizer, rngs: nnx.Rngs, batch: Batch
) -> jax.Array:
  """Changes model, optimizer and generators in place."""
  value, grads = nnx.value_and_grad(loss)(model, batch, rngs.noise())
  optimizer.update(model, grads)
  return value


@nnx.jit
def score(model: UNet, batch: Batch) -> dict[str, jax.Array]:
  """The loss with noise that is the same for all models."""
  return {"loss": loss(model, batch, jax.random.key(0))}


@nnx.jit
def denoise(model: UNet, x: jax.Array, label: jax.Array) -> jax.Array:
  """Follows the velocities from noise to images, in Euler steps."""

  def one(x: jax.Array, time: jax.Array) -> tuple[jax.Array, None]:
    velocity = model(x, jnp.full(len(x), time), label)
    return x - velocity / SAMPLING_STEPS, None

  times = jnp.arange(SAMPLING_STEPS, 0, -1) / SAMPLING_STEPS
  return jax.lax.scan(one, x, times)[0]


def sample(model: UNet, seed: int) -> np.ndarray:
  """Ten images of each digit: (100, 28, 28) in [0, 1]."""
  label = jnp.tile(jnp.arange(10), 10)
  noise = jax.random.normal(jax.random.key(seed), (100, 28, 28, 1))
  images = denoise(model, noise, label)
  return np.clip(np.asarray(images[..., 0] + 1) / 2, 0, 1)


def make(config: Config, tx: optax.GradientTransformation) -> Trainer:
  """The model with an optimizer."""

  def start(seed: int) -> tuple[UNet, nnx.Optimizer, nnx.Rngs]:
    model = UNet(config, nnx.Rngs(seed))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param), nnx.Rngs(seed)

  def step(
    state: tuple[UNet, nnx.Optimizer, nnx.Rngs], batch: Batch
  ) -> tuple[tuple[UNet, nnx.Optimizer, nnx.Rngs], jax.Array]:
    model, optimizer, rngs = state
    return state, update(model, optimizer, rngs, batch)

  return Trainer(
    start=start,
    step=step,
    evaluate=lambda state, batch: score(state[0], batch),
    params=lambda state: nnx.state(state[0], nnx.Param),
    opt_state=lambda state: state[1].opt_state,
    sample=lambda state, seed: sample(state[0], seed),
  )
