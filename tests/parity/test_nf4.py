"""NF4 has bitsandbytes' codes; double quantization has no larger error."""

import jax.numpy as jnp
import numpy as np
import pytest

from galore_optax import dequantize, quantize
from galore_optax.baselines import adapters
from galore_optax.quantization import nf4
from tests.parity import nf4_run


@pytest.fixture(scope="module")
def recorded():
  with np.load(nf4_run.RECORD) as file:
    return dict(file)


@pytest.fixture(scope="module")
def ours():
  return quantize(jnp.asarray(nf4_run.weight()), "nf4", block=nf4_run.BLOCK)


def test_code_book(recorded):
  np.testing.assert_array_equal(np.float32(nf4.VALUES), recorded["book"])


def test_codes_scales_and_values(recorded, ours):
  # bitsandbytes numbers the values from 0 upwards.
  np.testing.assert_array_equal(7 - np.int32(ours.codes), recorded["codes"])
  scales = np.asarray(ours.scale).T.reshape(-1)
  np.testing.assert_array_equal(scales, recorded["scales"])
  np.testing.assert_allclose(
    dequantize(ours), recorded["values_single"], rtol=1e-6
  )


def test_double_quantization_has_no_larger_error(recorded, ours):
  x, once = nf4_run.weight(), np.asarray(recorded["values_single"])
  values = dequantize(adapters.quantize_weight(jnp.asarray(x), double=True))
  size = lambda x: np.sqrt(np.mean(np.square(x)))
  added = [size(y - once) for y in (values, recorded["values_double"])]
  assert 0 < added[0] < added[1]
  total = [size(y - x) for y in (once, values)]
  assert total[1] < 1.005 * total[0]


def test_live_run_equals_the_recorded_one(recorded):
  pytest.importorskip(
    "bitsandbytes", reason="needs the extra `parity` (torch, bitsandbytes)"
  )
  live = nf4_run.run()
  assert live.keys() == recorded.keys()
  for name, x in live.items():
    np.testing.assert_allclose(x, recorded[name], rtol=1e-5, err_msg=name)
