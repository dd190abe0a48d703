"""The 8-bit dynamic codes of bitsandbytes, by arithmetic instead of a table.

Magnitudes up to 1 fall into seven decades. The i-th decade is divided into 2^i
equal cells (2^(i + 1) without a sign), and a code stands for the middle of its
cell. Look-ups in a table of 256 entries would be slow on TPUs.

The functions are compiled ones, so that they are traced once a shape and not
once a leaf.

Dettmers et al., `8-bit Optimizers via Block-wise Quantization
<https://arxiv.org/abs/2110.02861>`_, 2022, section 1.3.
"""

from typing import Any

import jax
import jax.numpy as jnp

_DECADES = 7


def _power_of_ten(decade: jax.Array) -> jax.Array:
  """10^(decade - 6), correctly rounded, without a table in memory."""
  powers = [float(f"1e{i - 6}") for i in range(_DECADES)]
  like = jnp.broadcast_to
  return jax.lax.select_n(
    decade, *(like(jnp.float32(p), decade.shape) for p in powers)
  )


def _decade(magnitude: jax.Array) -> jax.Array:
  """The decade 0 ... 6 of a magnitude in [0, 1]."""
  decade = jnp.zeros(magnitude.shape, jnp.int32)
  for i in range(1, _DECADES):
    decade += magnitude >= jnp.float32(f"1e{i - _DECADES}")
  return decade


def _middle(decade: jax.Array, j: jax.Array, cells: jax.Array) -> jax.Array:
  """Middle of cell j of a decade."""
  middle = 0.1 + 0.9 * (j.astype(jnp.float32) + 0.5) / cells
  return middle * _power_of_ten(decade)


@jax.jit
def signed_value(code: jax.Array) -> jax.Array:
  """The values of signed codes: ±1 ... ±127 in decades, 0, and -128 for 1."""
  k = jnp.abs(jnp.clip(code, -127, 127))
  decade = 31 - jax.lax.clz(jnp.maximum(k, 1))
  cells = jnp.left_shift(1, decade)
  value = _middle(decade, k - cells, cells)
  value = jnp.where(code < 0, -value, value)
  return jnp.where(code == 0, 0.0, jnp.where(code == -128, 1.0, value))


@jax.jit
def unsigned_value(code: jax.Array) -> jax.Array:
  """The values of unsigned codes: 1 ... 254 in decades, 0, and 255 for 1."""
  k = jnp.clip(code, 1, 254) + 1
  octave = 31 - jax.lax.clz(k)
  cells = jnp.left_shift(1, octave)
  value = _middle(octave - 1, k - cells, cells)
  return jnp.where(code == 0, 0.0, jnp.where(code == 255, 1.0, value))


def _cell(magnitude: jax.Array, decade: jax.Array, cells: jax.Array):
  """The cell of a decade that a magnitude lies in."""
  part = magnitude / _power_of_ten(decade)
  cell = jnp.floor((part - 0.1) / 0.9 * cells.astype(jnp.float32))
  return jnp.clip(cell.astype(jnp.int32), 0, cells - 1)


@jax.jit
def signed_code(x: jax.Array) -> jax.Array:
  """The nearest signed dynamic code of x in [-1, 1]."""
  magnitude = jnp.abs(x)
  decade = _decade(magnitude)
  cells = jnp.left_shift(1, decade)
  k = cells + _cell(magnitude, decade, cells)
  k = _nearest(magnitude, k, 127, signed_value)
  last = signed_value(jnp.int32(127))
  k = jnp.where(x < 0, -k, k)
  return jnp.where(x > (1 + last) / 2, -128, k)


@jax.jit
def unsigned_code(x: jax.Array) -> jax.Array:
  """The nearest unsigned dynamic code of x in [0, 1]."""
  x = jnp.maximum(x, 0)
  decade = _decade(x)
  cells = jnp.left_shift(2, decade)
  k = cells + _cell(x, decade, cells) - 1
  return _nearest(x, k, 255, unsigned_value)


def _nearest(x: jax.Array, k: jax.Array, top: int, value: Any) -> jax.Array:
  """The code whose value is nearest to x, out of a code and its neighbours.

  Within a decade this is the code of the cell itself; at the border of two
  decades it may be a neighbour.
  """
  distance = lambda k: jnp.abs(value(k) - x)
  below, above = jnp.maximum(k - 1, 0), jnp.minimum(k + 1, top)
  best = jnp.where(distance(below) < distance(k), below, k)
  return jnp.where(distance(above) < distance(best), above, best)
