"""The NormalFloat code: QLoRA's values, and the error of rounding to them."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_optax import QArray, dequantize, quantize, state_bytes
from galore_optax.baselines import adapters
from galore_optax.quantization import nf4, qarray
from tests.marks import slow


def normal(shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def test_values_are_quantiles_of_a_normal_distribution():
  """As in section 3 of the paper: seven below zero and eight above."""
  offset, inverse = 0.9677083, statistics.NormalDist().inv_cdf
  above = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
  below = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
  values = np.sort([*above, 0.0, *below]) / max(above)
  np.testing.assert_allclose(nf4.VALUES, values, atol=3e-7)


def test_each_code_is_the_nearest_to_its_value_and_zero_is_zero():
  codes = jnp.arange(-8, 8)
  values = nf4.value(codes)
  np.testing.assert_array_equal(np.sort(values), np.float32(nf4.VALUES))
  np.testing.assert_array_equal(nf4.code(values), codes)
  assert nf4.code(jnp.float32(0)) == 0 and nf4.value(jnp.int32(0)) == 0
  x = np.linspace(-1, 1, 4001)
  nearest = np.abs(x[:, None] - np.asarray(values)).argmin(1) - 8
  np.testing.assert_array_equal(nf4.code(jnp.asarray(x)), nearest)


@pytest.mark.parametrize(
  "shape", [slow((512, 8)), (8, 500), (3, 96, 40), slow((70,))]
)
def test_errors_stay_within_half_a_gap(shape):
  x = normal(shape) * 10.0 ** np.arange(shape[-1]) ** 0.5
  q = quantize(x, "nf4", block=64)
  assert q.codes.dtype == jnp.int4 and q.shape == x.shape and q.zero is None
  found, scale = dequantize(q), qarray.elementwise_scale(q)
  gaps = np.diff(nf4.VALUES)
  part = np.abs(x) / scale
  widest = np.where(part > nf4.VALUES[-2], gaps.max(), gaps[:-1].max())
  assert np.all(np.abs(found - x) <= widest / 2 * scale * (1 + 1e-6))
  # The largest magnitude of a block is exact: 1 and -1 are both values.
  assert np.all((np.abs(found) == np.abs(x))[part == 1])


def test_normal_weights_have_a_smaller_error_than_with_uniform_steps():
  """Both formats have four bits."""
  x = normal((64, 4096))
  error = lambda q: float(jnp.mean((dequantize(q) - x) ** 2))
  code = error(quantize(x, "nf4", block=64))
  assert code < 0.8 * error(quantize(x, "int4", block=64, symmetric=True))
  assert code < 0.009


def test_zeros_and_blocks_of_zeros_are_exact():
  x = normal((256, 4)).at[::3].set(0).at[64:128].set(0)
  found = dequantize(quantize(x, "nf4", block=64))
  assert jnp.all(jnp.where(x == 0, found == 0, True))
  empty = dequantize(qarray.zeros((256, 4), "nf4", block=64))
  np.testing.assert_array_equal(empty, 0)


def test_scales_can_be_quantized_themselves():
  x = normal((3, 512, 256)) * jnp.exp(normal((3, 512, 1), 1))
  single = quantize(x, "nf4", block=64)
  double = jax.jit(adapters.quantize_weight, static_argnums=1)(x, True)
  assert state_bytes(single) == x.size * 4.5 / 8
  assert state_bytes(double) == x.size * (4 + 8 / 64) / 8 + 4 * 3 * 8
  error = (
    qarray.elementwise_scale(double) / qarray.elementwise_scale(single) - 1
  )
  assert np.abs(error).max() < 0.08 and np.sqrt(np.mean(error**2)) < 0.01
  np.testing.assert_array_equal(double.codes, single.codes)
  part = jax.tree.map(lambda y: y[1], double)
  np.testing.assert_array_equal(dequantize(part), dequantize(double)[1])


def test_codes_are_not_rounded_at_random():
  with pytest.raises(ValueError, match="'nf4' does not have"):
    quantize(normal((64, 4)), "nf4", key=jax.random.key(0))


def test_half_precision_inputs_and_outputs():
  x = normal((128, 4)).astype(jnp.bfloat16)
  found = dequantize(quantize(x, "nf4", block=64), jnp.bfloat16)
  assert found.dtype == jnp.bfloat16
  codes = jnp.zeros((1,), jnp.int4)
  book = dequantize(QArray(codes - 8, jnp.full((1,), 3.0), None, "nf4"))
  assert book == 3
