r"""Rounds float32 numbers to bfloat16 at random, without bias.

bfloat16 keeps 8 bits of a float32 number's 24. A running mean that is rounded
to the nearest stops where a step is below half of the last bit: with a decay of
0.999 at once. Rounded at random, up with the probability of the bits that are
dropped, it arrives in the mean.

The random bits are a hash of the element's index in the array, of the step and
of the leaf. Nothing has to be stored for them. They do not depend on how the
array is divided over devices, and each device computes those of its own part.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio; odd

_MAGNITUDE = 0x7FFFFFFF  # all bits but the sign
_INFINITY = 0x7F800000
_QUIET = 0x00400000  # set in NaN
_LARGEST = 0x7F7F0000  # bits of the largest bfloat16 number


def store(
  x: jax.Array, dtype: Any, key: jax.Array, start: Any = 0
) -> jax.Array:
  """An array in the dtype in which it is stored.

  Args:
    x: The array.
    dtype: The dtype. Only to bfloat16 numbers are rounded at random.
    key: uint32 scalar, see :func:`leaf_key`.
    start: Index of the first element, where it is a part of a larger array.

  Returns:
    The array in that dtype.
  """
  if x.dtype == dtype:
    return x
  if dtype != jnp.bfloat16 or x.dtype not in (jnp.float32, jnp.float64):
    return x.astype(dtype)
  bits = random_bits(key, x.shape, start)
  return round_at_random(x.astype(jnp.float32), bits)


def step_key(use: str, seed: Any, *numbers: Any) -> jax.Array:
  """A key that differs between uses, seeds and steps.

  Args:
    use: What the bits are for.
    seed: An integer.
    *numbers: Integers such as the step, which may be traced scalars.

  Returns:
    uint32 scalar.
  """
  key = jnp.uint32(zlib.crc32(use.encode()))
  for number in (seed, *numbers):
    number = jnp.asarray(number).astype(jnp.uint32)
    key = _mix(key * jnp.uint32(_GOLDEN) + number)
  return key


def leaf_key(key: jax.Array, name: str) -> jax.Array:
  """The key of one leaf, given that of the step."""
  # One operation, because it is compiled for every leaf: hashing is for bits.
  return key ^ jnp.uint32(zlib.crc32(name.encode()))


def random_bits(
  key: jax.Array, shape: tuple[int, ...], start: Any = 0
) -> jax.Array:
  """16 random bits for each element of an array.

  Args:
    key: uint32 scalar, see :func:`leaf_key`.
    shape: Shape of the array.
    start: Index of its first element, where it is a part of a larger array.

  Returns:
    Integers below 65536, uint32 of that shape.
  """
  index = jnp.asarray(start).astype(jnp.uint32)
  stride = 1
  for axis in reversed(range(len(shape))):
    along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    index = index + along * jnp.uint32(stride % 2**32)
    stride *= shape[axis]
  return _mix(index ^ key, key * jnp.uint32(_GOLDEN)) >> 16


def _mix(x: jax.Array, key: Any = 0) -> jax.Array:
  """A hash of 32 bits to 32 bits, one to one for each key.

  Shifts and factors are those of https://github.com/skeeto/hash-prospector
  (public domain). The key is added inside, so that the bits of one step are not
  those of another one in another sequence.
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD) + key
  x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
  return x ^ (x >> 15)


@jax.custom_jvp
def round_at_random(x: jax.Array, bits: jax.Array) -> jax.Array:
  """Rounds to bfloat16, up or down at random.

  The expectation is the number itself, and numbers of bfloat16 stay as they
  are. NaN and infinity stay, too; no finite number becomes infinite.

  Args:
    x: float32 of any shape.
    bits: See :func:`random_bits`.

  Returns:
    bfloat16 of the same shape. Its derivative is that of a cast.

  Example:
    >>> x = jnp.full(4096, 1 + 2**-9)  # a quarter from 1 to the next number
    >>> low = round_at_random(x, random_bits(step_key("", 0), x.shape))
    >>> sorted(set(low.tolist())), bool(abs(low.mean() - x[0]) < 3e-4)
    ([1.0, 1.0078125], True)
  """
  raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
  magnitude = raw & jnp.uint32(_MAGNITUDE)
  # Dropping low bits must not turn NaN into infinity.
  raw = jnp.where(magnitude > _INFINITY, raw | jnp.uint32(_QUIET), raw)
  up = jnp.where(magnitude < _LARGEST, bits, 0)
  high = ((raw + up) >> 16).astype(jnp.uint16)
  return jax.lax.bitcast_convert_type(high, jnp.bfloat16)


@round_at_random.defjvp
def _round_jvp(primals: tuple, tangents: tuple) -> tuple:
  x, bits = primals
  return round_at_random(x, bits), tangents[0].astype(jnp.bfloat16)
