"""RACS: SGD whose rows and columns are scaled."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train.methods import transforms
from train.methods.options import OptimizerConfig
from train.methods.rivals import parts

DECAY = 0.9  # of the scales
ITERATIONS = 5


def racs(c: OptimizerConfig, lr: optax.Schedule, shardings: Any = None):
  """RACS for the block matrices, AdamW for the rest.

  `optimizer.scale` is its factor α.
  """
  matrices = parts.finished(c, lr, scale_by_racs(), optax.scale(c.scale))
  return parts.for_matrices(matrices, transforms.adamw(c, lr, shardings))


class ScaleByRacsState(NamedTuple):
  """State of :func:`scale_by_racs`.

  Attributes:
    rows: Scales q of the rows.
    columns: Scales s of the columns.
    norm: Norms φ of the last updates.
  """

  rows: Any
  columns: Any
  norm: Any


def scale_by_racs() -> optax.GradientTransformation:
  r"""Divides rows and columns of gradients by the roots of their scales.

  The scales are the diagonals of the Kronecker product of two diagonal
  matrices that is nearest to the gradient's outer product with itself. From
  :math:`\hat q = 1`, five times in turn,

  .. math::

    \hat s_j = \frac{\sum_i \hat q_i G_{ij}^2}{\sum_i \hat q_i^2}, \quad
    \hat q_i = \frac{\sum_j \hat s_j G_{ij}^2}{\sum_j \hat s_j^2}

  and then

  .. math::

    s_t &= \beta s_{t-1} + (1 - \beta) \hat s, \quad
    q_t = \beta q_{t-1} + (1 - \beta) \hat q \\
    \tilde G_{ij} &= \frac{G_{ij}}{\sqrt{q_{t,i}\, s_{t,j}}}, \quad
    U_t = \frac{\gamma}{\max(\|\tilde G\| / \varphi_{t-1}, \gamma)} \tilde G,
    \quad \varphi_t = \|U_t\|

  with β = 0.9 and γ = 1.01; the first update is not limited.

  Returns:
    The gradient transformation, for matrices in the last two axes.

  References:
    Gong et al., `Towards Efficient Optimizer Design for LLM via Structured
    Fisher Approximation with a Low-Rank Extension
    <https://arxiv.org/abs/2502.07752>`_, 2025, equation 16 and Algorithm 1.
  """

  def init(params: Any) -> ScaleByRacsState:
    zeros = lambda cut: jax.tree.map(
      lambda p: jnp.zeros(cut(p.shape), jnp.float32), params
    )
    return ScaleByRacsState(
      rows=zeros(lambda shape: shape[:-1]),
      columns=zeros(lambda shape: shape[:-2] + shape[-1:]),
      norm=zeros(lambda shape: shape[:-2]),
    )

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    new, *kept = parts.map_leaves(_update_leaf, updates, *state)
    return new, ScaleByRacsState(*kept)

  return optax.GradientTransformation(init, update)


def _update_leaf(
  g: jax.Array, rows: jax.Array, columns: jax.Array, norm: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """The update of a leaf, and its state."""
  wide = g.astype(jnp.float32)
  q, s = _scales(wide)
  rows = DECAY * rows + (1 - DECAY) * q
  columns = DECAY * columns + (1 - DECAY) * s
  scaled = wide * _inverse_root(rows)[..., None]
  scaled *= _inverse_root(columns)[..., None, :]
  limited, norm = parts.limited(scaled, norm)
  return limited.astype(g.dtype), rows, columns, norm


def _scales(g: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The scales of the rows and of the columns of one gradient."""
  # Fourth powers of small gradients would be below float32's range.
  size = jnp.max(jnp.abs(g), axis=(-2, -1), keepdims=True)
  squares = (g / jnp.where(size > 0, size, 1)) ** 2
  q = jnp.ones(g.shape[:-1], jnp.float32)
  s = jnp.zeros(g.shape[:-2] + g.shape[-1:], jnp.float32)
  for _ in range(ITERATIONS):
    s = _divide(jnp.einsum("...ij,...i->...j", squares, q), q)
    q = _divide(jnp.einsum("...ij,...j->...i", squares, s), s)
  return q, s * size[..., 0] ** 2


def _divide(x: jax.Array, by: jax.Array) -> jax.Array:
  """Divides by the square of a norm; zeros stay zero."""
  square = jnp.sum(by**2, axis=-1, keepdims=True)
  return x / jnp.where(square > 0, square, 1)


def _inverse_root(x: jax.Array) -> jax.Array:
  """1 / √x, and 0 for rows or columns that never had a gradient."""
  return jnp.where(x > 0, jax.lax.rsqrt(jnp.where(x > 0, x, 1)), 0)
