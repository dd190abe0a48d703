"""Muon with momentum in eight or four bits."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax.quantization import qarray
from galore_optax.tree import sharding
from train.methods import transforms
from train.methods.options import OptimizerConfig
from train.methods.rivals import parts


def muon_8bit(c: OptimizerConfig, lr: optax.Schedule, shardings: Any = None):
  """Muon with momentum in eight bits, and 8-bit AdamW for the other leaves."""
  return _muon(c, lr, shardings, "dynamic", qarray.BLOCK)


def muon_4bit(c: OptimizerConfig, lr: optax.Schedule, shardings: Any = None):
  """Muon with momentum in four bits, and 8-bit AdamW for the other leaves."""
  # Of a low-rank matrix plus noise, rows and columns of different sizes, NF4
  # loses 11 % of the norm, and symmetric int4 16 % in the same blocks. Int4
  # has 15 levels at equal distances, of which small numbers get few.
  return _muon(c, lr, shardings, "nf4", 64)


def _muon(
  c: OptimizerConfig, lr: optax.Schedule, shardings: Any, kind: str, block: int
):
  matrices = parts.finished(
    c,
    lr,
    scale_by_quantized_muon(kind, block),
    optax.stateless(_scale_by_shape),
  )
  return parts.for_matrices(matrices, transforms.adamw_8bit(c, lr, shardings))


def scale_by_quantized_muon(
  kind: str, block: int
) -> optax.GradientTransformation:
  r"""Muon whose momentum is stored in blocks of a few bits.

  As `optax.contrib.scale_by_muon`, whose decay :math:`\mu` is 0.95, but the
  momentum is read, updated and written at each step:

  .. math::

    M_t &= \mu D(Z_{t-1}) + (1 - \mu) G_t, \quad Z_t = Q(M_t) \\
    U_t &= \operatorname{NS}_5\left( \mu \frac{M_t}{1 - \mu^{t+1}} +
      (1 - \mu) \frac{G_t}{1 - \mu^t} \right)

  with rounding Q, its inverse D and five Newton-Schulz iterations. The step
  uses the momentum before it is rounded.

  Args:
    kind: Format of the momentum, see :func:`galore_optax.quantize`.
    block: Elements that share a scale, at most.

  Returns:
    The gradient transformation, for matrices in the last two axes.

  References:
    Gupta et al., `Effective Quantization of Muon Optimizer States
    <https://arxiv.org/abs/2509.23106>`_, 2025, whose momentum is a sum in place
    of a mean.
  """
  # Any: Optax types the state as a tree of arrays, not as its `MuonState`.
  muon: Any = optax.contrib.scale_by_muon(weight_dimension_numbers=_dimensions)

  def zeros(like: Any) -> qarray.QArray:
    q = qarray.zeros(like.shape, kind, block=block)
    return sharding.shard_quantized_like(q, like, lambda spec: spec)

  def init(params: Any) -> Any:
    # Of an empty tree, so that no momentum of full precision is made.
    return muon.init({})._replace(mu=jax.tree.map(zeros, params))

  def update(updates: Any, state: Any, params: Any = None):
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
    read = _over_momentum(qarray.dequantize, state.mu)
    new, after = muon.update(wide, state._replace(mu=read), params)
    stored = _over_momentum(qarray.requantize, state.mu, after.mu)
    new = jax.tree.map(lambda u, g: u.astype(g.dtype), new, updates)
    return new, after._replace(mu=stored)

  return optax.GradientTransformation(init, update)


def _over_momentum(function: Any, *trees: Any) -> Any:
  return jax.tree.map(function, *trees, is_leaf=qarray.is_quantized)


def _dimensions(tree: Any) -> Any:
  axes = optax.contrib.MuonDimensionNumbers(-2, -1)
  return jax.tree.map(lambda _: axes, tree)


def _scale_by_shape(updates: Any, params: Any = None) -> Any:
  """Muon's factor for matrices whose output is wider than their input."""
  del params
  return jax.tree.map(
    lambda u: max(1, u.shape[-1] / u.shape[-2]) ** 0.5 * u, updates
  )
