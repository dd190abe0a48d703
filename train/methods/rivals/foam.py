"""FOAM: Adam whose moments are means over blocks of neighbours."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax.tree import sharding
from train.methods import transforms
from train.methods.options import OptimizerConfig
from train.methods.rivals import parts

BLOCK = 4  # neighbours that share their moments


def foam(c: OptimizerConfig, lr: optax.Schedule, shardings: Any = None):
  """FOAM for the block matrices, AdamW for the rest.

  `optimizer.scale` is its factor α.
  """
  folded = scale_by_foam(c.b1, c.b2, c.eps)
  matrices = parts.finished(c, lr, folded, optax.scale(c.scale))
  return parts.for_matrices(matrices, transforms.adamw(c, lr, shardings))


class ScaleByFoamState(NamedTuple):
  """State of :func:`scale_by_foam`.

  Attributes:
    count: Updates so far.
    mu: First moments of blocks.
    nu: Second moments of blocks.
  """

  count: Any  # shape=(), dtype=jnp.int32
  mu: Any
  nu: Any


def scale_by_foam(b1: Any, b2: Any, eps: Any) -> optax.GradientTransformation:
  r"""Adam with moments of blocks, and with what blocks do not show.

  A block is four successive inputs of one output. With A for the mean of each
  block, and E for writing a block's number to all of its elements,

  .. math::

    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) A(G_t), \quad
    v_t = \beta_2 v_{t-1} + (1 - \beta_2) A(G_t^2) \\
    R_t &= G_t - E(A(G_t)), \quad U_t = \frac{\sqrt{1 - \beta_2^t}}
      {1 - \beta_1^t} \frac{E(m_t) + R_t}{\sqrt{E(v_t) + R_t^2} + \varepsilon}

  The residual R is that of the step, and not kept. This is what the authors'
  code does; summaries of the paper have :math:`A(G_t)^2` for
  :math:`A(G_t^2)`.

  Args:
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Term added to the root.

  Returns:
    The gradient transformation, for matrices in the last two axes.

  References:
    Wen et al., `FOAM: Blocked State Folding for Memory-Efficient LLM Training
    <https://arxiv.org/abs/2512.07112>`_, 2025, and its code, zqOuO/FOAM.
  """

  def zeros(like: Any) -> jax.Array:
    *lead, m, n = like.shape
    blocks = jnp.zeros((*lead, -(-m // BLOCK), n), jnp.float32)
    return sharding.shard_divisible_like(blocks, like, lambda spec: spec)

  def init(params: Any) -> ScaleByFoamState:
    moments = lambda: jax.tree.map(zeros, params)
    return ScaleByFoamState(jnp.zeros([], jnp.int32), moments(), moments())

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    count = optax.safe_increment(state.count)
    factor = jnp.sqrt(1 - b2**count) / (1 - b1**count)

    def update_leaf(g: jax.Array, mu: jax.Array, nu: jax.Array) -> tuple:
      wide, unfold = g.astype(jnp.float32), lambda x: _unfold(x, g.shape[-2])
      folded = _fold(wide)
      mu = b1 * mu + (1 - b1) * folded
      nu = b2 * nu + (1 - b2) * _fold(wide**2)
      residual = wide - unfold(folded)
      step = unfold(mu) + residual
      step /= jnp.sqrt(unfold(nu) + residual**2) + eps
      return (factor * step).astype(g.dtype), mu, nu

    new, mu, nu = parts.map_leaves(update_leaf, updates, state.mu, state.nu)
    return new, ScaleByFoamState(count, mu, nu)

  return optax.GradientTransformation(init, update)


def _fold(x: jax.Array) -> jax.Array:
  """Means of blocks of rows; the last block is filled up with zeros."""
  *lead, m, n = x.shape
  width = [(0, 0)] * len(lead) + [(0, -m % BLOCK), (0, 0)]
  return jnp.pad(x, width).reshape(*lead, -1, BLOCK, n).mean(-2)


def _unfold(x: jax.Array, rows: int) -> jax.Array:
  """Each block's number in all of its rows."""
  return jnp.repeat(x, BLOCK, axis=-2)[..., :rows, :]
