"""Codes of 4 bits as floats: what a derivative can carry.

`jax.grad` hands out no integers. So the codes of a new basis leave a backward
pass in pairs, as whole numbers in bfloat16, which holds those up to 256.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from galore_optax.quantization import qarray

_LOWEST, _LEVELS = -8, 16


class Carried(NamedTuple):
  """An `int4` array as floats.

  Attributes:
    pairs: Two codes in each number, (..., m / 2, n), bfloat16.
    scale: Scale of each block, float32.
    zero: Code of zero of each block, float32.
  """

  pairs: Any
  scale: Any
  zero: Any


def fits(x: Any) -> bool:
  """Whether an array is one that :func:`pack` takes.

  Args:
    x: An array, or a quantized one.
  """
  return (
    qarray.is_quantized(x)
    and x.kind == "int4"
    and x.zero is not None
    and x.shape[-2] % 2 == 0
  )


def pack(q: qarray.QArray) -> Carried:
  """An `int4` array with an even number of rows, as floats."""
  codes = q.codes.astype(jnp.int32) - _LOWEST
  first, second = jnp.split(codes, 2, axis=-2)
  zero: Any = q.zero
  return Carried(
    (_LEVELS * first + second).astype(jnp.bfloat16),
    q.scale,
    zero.astype(jnp.float32),
  )


def unpack(x: Carried, like: qarray.QArray) -> qarray.QArray:
  """Undoes :func:`pack`.

  Args:
    x: What it returned.
    like: An array in the format of the one that it was given.
  """
  pairs = x.pairs.astype(jnp.int32)
  parts = pairs // _LEVELS, pairs % _LEVELS
  codes = jnp.concatenate(parts, axis=-2) + _LOWEST
  zero: Any = like.zero
  return dataclasses.replace(
    like,
    codes=codes.astype(like.codes.dtype),
    scale=x.scale,
    zero=x.zero.astype(zero.dtype),
  )
