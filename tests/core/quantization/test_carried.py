"""Codes as floats, on their way out of a backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_optax import quantize
from galore_optax.quantization import carried


def _codes(*shape, kind="int4"):
  return quantize(jax.random.normal(jax.random.key(0), shape), kind)


@pytest.mark.parametrize("shape", [(2, 5), (3, 6, 300), (2, 2, 4, 7)])
def test_comes_back_bit_by_bit(shape):
  q = _codes(*shape)
  x = carried.pack(q)
  assert x.pairs.dtype == jnp.bfloat16
  assert x.pairs.size == q.size // 2
  back = carried.unpack(x, jax.tree.map(jnp.zeros_like, q))
  assert back.shape == q.shape and back.kind == q.kind
  for a, b in zip(*map(jax.tree.leaves, (back, q)), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.astype(np.float32), b.astype(np.float32))


def test_all_pairs_of_codes():
  q = _codes(2, 256)
  codes = jnp.stack(jnp.divmod(jnp.arange(256), 16)) - 8
  q = type(q)(codes.astype(jnp.int4), q.scale, q.zero, "int4")
  x = carried.pack(q)
  np.testing.assert_array_equal(x.pairs[0].astype(int), np.arange(256))
  back = carried.unpack(x, q)
  np.testing.assert_array_equal(back.codes.astype(int), codes)


@pytest.mark.parametrize(
  "x",
  [
    _codes(3, 8),  # an odd number of rows
    _codes(4, 8, kind="int8"),
    _codes(4, 8, kind="nf4"),
    quantize(jnp.ones((4, 8)), "int4", symmetric=True),
    jnp.ones((4, 8)),
  ],
)
def test_takes_no_other_format(x):
  assert not carried.fits(x)
