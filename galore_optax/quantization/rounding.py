"""Codes and scales of blocks, rounded to the nearest or at random."""

import jax
import jax.numpy as jnp

from galore_optax.quantization import dynamic_code, nf4
from galore_optax.quantization.blocks import Blocks

# Formats with uniform steps, and the bits of their codes.
BITS = {"int4": 4, "int8": 8}


def asymmetric(
  blocks: Blocks, x: jax.Array, bits: int, key: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Codes of uniform steps from the smallest to the largest element.

  Args:
    blocks: The division into blocks.
    x: The array in blocks.
    bits: Bits of a code.
    key: Random key; None rounds to the nearest.

  Returns:
    Codes, in blocks; scales; and the codes that mean 0.
  """
  low = jnp.minimum(blocks.reduce(jnp.min, x), 0)
  high = jnp.maximum(blocks.reduce(jnp.max, x), 0)
  # With random rounding one level is left unused. The zero is a whole number of
  # steps, and without the spare level codes at the ends would have to be
  # clipped, which would bias them.
  steps = 2**bits - (1 if key is None else 2)
  scale = high / steps - low / steps  # high - low may be out of range
  divisor = safe_divisor(scale)
  zero = -low / divisor
  zero = jnp.round(zero) if key is None else jnp.ceil(zero - 1e-4)
  codes = round_to_integers(x / blocks.expand(divisor), key)
  codes += blocks.expand(zero)
  offset = 2 ** (bits - 1)  # the codes are signed
  codes = jnp.clip(codes, 0, 2**bits - 1) - offset
  return codes, scale, (zero - offset).astype(jnp.int8)


def symmetric(
  blocks: Blocks, x: jax.Array, kind: str, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Codes relative to the largest magnitude of each block.

  Args:
    blocks: The division into blocks.
    x: The array in blocks.
    kind: The format.
    key: Random key; None rounds to the nearest.

  Returns:
    Codes, in blocks, and scales.
  """
  largest = blocks.reduce(jnp.max, jnp.abs(x))
  top = {"int4": 7.0, "int8": 127.0, "float8": 448.0}.get(kind, 1.0)
  scale = largest / top
  x = jnp.clip(x / blocks.expand(safe_divisor(scale)), -top, top)
  if kind == "dynamic":
    return dynamic_code.signed_code(x), scale
  if kind == "unsigned_dynamic":
    return dynamic_code.unsigned_code(x), scale
  if kind == "nf4":
    return nf4.code(x), scale
  return (x if kind == "float8" else round_to_integers(x, key)), scale


def safe_divisor(scale: jax.Array) -> jax.Array:
  """The scale, or 1 where its reciprocal, which XLA computes, is infinite."""
  return jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 1)


def round_to_integers(x: jax.Array, key: jax.Array | None) -> jax.Array:
  """Rounds to the nearest integer, or with a key at random without bias."""
  if key is None:
    return jnp.round(x)
  bits = jax.random.bits(key, x.shape, "uint16").astype(jnp.float32)
  return jnp.floor(x + (bits + 0.5) * 2.0**-16)
