"""SCALE: SGD with normalized columns, and momentum in the last layer alone."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.methods import transforms
from train.methods.leaves import path_of
from train.methods.options import OptimizerConfig
from train.methods.rivals import parts


def scale(c: OptimizerConfig, lr: optax.Schedule, shardings: Any = None):
  r"""SCALE: column-normalized SGD with momentum in the last layer.

  .. math::

    M_t &= \beta_1 M_{t-1} + (1 - \beta_1) G_t \text{ in the head}, \quad
    M_t = G_t \text{ elsewhere} \\
    U_{t,ij} &= \frac{M_{t,ij}}{\sqrt{\tfrac{1}{m} \sum_k M_{t,kj}^2}}

  for all matrices, where column j holds the m weights into output j; for the
  embedding, the m tokens' weights of feature j. The paper divides by the norms
  of columns; its authors' code divides by their root mean squares, as here, so
  that the rate does not depend on the width. Norms get AdamW.

  Args:
    c: Options; `b1` is the decay.
    lr: The learning rate.
    shardings: Not used.

  Returns:
    The gradient transformation.

  References:
    Glentis et al., `A Minimalist Optimizer Design for LLM Pretraining
    <https://arxiv.org/abs/2506.16659>`_, 2025, Algorithm 1, and their code,
    OptimAI-Lab/Minimalist_LLM_Pretraining.
  """
  columns = optax.stateless(_normalize_columns)
  momentum = optax.ema(c.b1, debias=False)
  return optax.partition(
    {
      "matrix": parts.finished(c, lr, columns),
      "last": parts.finished(c, lr, momentum, columns),
      "other": transforms.adamw(c, lr, shardings),
    },
    _labels,
  )


def _labels(params: Any) -> Any:
  """Which part of SCALE updates a leaf."""
  # A model whose embedding is its head, too, has no other last layer.
  last = "lm_head" if "lm_head" in params else "embed"

  def label(path: tuple, leaf: Any) -> str:
    del leaf
    name = path_of(path)
    if not name.endswith(("/kernel", "/embedding")):
      return "other"
    return "last" if name.startswith(f"{last}/") else "matrix"

  return jax.tree_util.tree_map_with_path(label, params)


def _normalize_columns(updates: Any, params: Any = None) -> Any:
  """Divides columns by their root mean square, or by 1e-8 if that is larger."""
  del params

  def normalize(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(wide**2, axis=-2, keepdims=True))
    return (wide / jnp.maximum(size, 1e-8)).astype(x.dtype)

  return jax.tree.map(normalize, updates)
