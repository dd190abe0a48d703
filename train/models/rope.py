"""Rotary position embeddings (RoPE), and how their frequencies are scaled.

A model that was trained on short texts reads longer ones if its rotations are
slowed down. Each way to do so changes the frequencies alone:

    none    theta^(-2i/H) radians per position for pair i
    linear  all of them divided by the factor (arXiv 2306.15595)
    llama3  slow ones divided by the factor, fast ones kept, those between
            interpolated by the rotations in the original length
    yarn    likewise, interpolated by the number of the pair, and the rotated
            heads are enlarged (arXiv 2309.00071, sections 3.2 and 3.4)

Names of local arrays end in their shape; see `llama.py`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.config.schema import ModelConfig


class Rope(NamedTuple):
  """What rotations depend on: some fields of the model's config."""

  width: int  # features of a head
  theta: float = 10000.0
  scaling: str = "none"
  factor: float = 1.0
  original: int = 0  # positions that the model was trained on at first
  low: float = 1.0  # llama3: rotations in `original` below which is slow
  high: float = 4.0  # llama3: rotations from which is fast
  beta_fast: float = 32.0  # yarn: the same by its names
  beta_slow: float = 1.0
  attention_factor: float = 0.0  # yarn; 0: by the factor


def of(config: ModelConfig) -> Rope:
  """The rotations of a model."""
  return Rope(
    config.head_width,
    config.rope_theta,
    config.rope_scaling,
    config.rope_factor,
    config.rope_original_length,
    config.rope_low,
    config.rope_high,
    config.rope_beta_fast,
    config.rope_beta_slow,
    config.rope_attention_factor,
  )


@functools.cache
def frequencies(rope: Rope) -> np.ndarray:
  """Radians per position for each pair of features: (H / 2,) float32."""
  pairs = np.arange(0, rope.width, 2, dtype=np.float32)
  plain = rope.theta ** (-pairs / rope.width)
  if rope.scaling == "none":
    return plain
  slowed = plain / rope.factor
  if rope.scaling == "linear":
    return slowed
  kept = _kept_llama3(rope, plain)
  if rope.scaling == "yarn":
    kept = _kept_yarn(rope)
  return (kept * plain + (1 - kept) * slowed).astype(np.float32)


def _kept_llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
  """The share of each frequency that is kept: (H / 2,)."""
  rotations = rope.original * plain.astype(np.float64) / (2 * math.pi)
  return np.clip((rotations - rope.low) / (rope.high - rope.low), 0, 1)


def _kept_yarn(rope: Rope) -> np.ndarray:
  """The share of each frequency that is kept: (H / 2,)."""

  def pair(rotations: float) -> float:
    """The pair that makes so many rotations in the original length."""
    ratio = rope.original / (rotations * 2 * math.pi)
    return rope.width * math.log(ratio) / (2 * math.log(rope.theta))

  first = max(math.floor(pair(rope.beta_fast)), 0)
  last = min(math.ceil(pair(rope.beta_slow)), rope.width - 1)
  distance = max(last - first, 0.001)  # a step where they are the same
  return 1 - np.clip((np.arange(rope.width // 2) - first) / distance, 0, 1)


def enlargement(rope: Rope) -> float:
  """The factor on rotated queries and keys: 1 but for yarn."""
  if rope.scaling != "yarn":
    return 1.0
  return rope.attention_factor or 0.1 * math.log(rope.factor) + 1.0


@functools.cache
def _table(length: int, rope: Rope) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines of the angles of positions 0, 1, ...: (T, H / 2) each.

  They are constants of the program. XLA would otherwise put the functions into
  every loop that uses them, and compute each sine again for all rows and heads.
  """
  positions_T = np.arange(length, dtype=np.float32)
  angles_TxH = np.outer(positions_T, frequencies(rope))
  return np.cos(angles_TxH), np.sin(angles_TxH)


def rotate(
  x_BxTxNxH: jax.Array,
  rope: Rope,
  positions_BxT: jax.Array | None = None,
  rotates: jax.Array | None = None,
) -> jax.Array:
  """Rotates each head by an angle that grows with its position (RoPE).

  Features i and i + H/2 are a pair, which is rotated by position times
  frequency. The product of a query and a key therefore depends on their
  positions only through the difference.

  Args:
    x_BxTxNxH: queries or keys.
    rope: the frequencies.
    positions_BxT: their positions; None: 0, 1, ... Of shape (1, T) they apply
      to all rows.
    rotates: () bool: whether to rotate at all; None: yes.

  Returns:
    The rotated array, in the dtype of the input.
  """
  if positions_BxT is None:
    cos, sin = _table(x_BxTxNxH.shape[1], rope)
  else:
    # Angles stay in float32: bfloat16 cannot tell position 256 from 257.
    positions_BxTx1 = positions_BxT[..., None].astype(jnp.float32)
    angles_BxTxH = positions_BxTx1 * frequencies(rope)
    cos, sin = jnp.cos(angles_BxTxH), jnp.sin(angles_BxTxH)
  if (size := enlargement(rope)) != 1:
    cos, sin = cos * np.float32(size), sin * np.float32(size)
  if rotates is not None:
    cos, sin = jnp.where(rotates, cos, 1), jnp.where(rotates, sin, 0)
  cos, sin = cos[..., None, :], sin[..., None, :]  # all heads share the angles
  left, right = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
  rotated = (left * cos - right * sin, right * cos + left * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x_BxTxNxH.dtype)
