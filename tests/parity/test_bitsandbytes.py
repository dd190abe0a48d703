"""8-bit Adam equals that of bitsandbytes, except where nu rounds to zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import QArray, adamw_8bit, dequantize
from tests.parity import bitsandbytes_run


@pytest.fixture(scope="module")
def recorded():
  with np.load(bitsandbytes_run.RECORD) as file:
    return dict(file)


@pytest.mark.parametrize(
  ("kind", "dtype", "name"),
  [("dynamic", "int8", "signed"), ("unsigned_dynamic", "uint8", "unsigned")],
)
def test_code_books(kind, dtype, name, recorded):
  codes = jnp.arange(256).astype(jnp.uint8).view(dtype)
  book = dequantize(QArray(codes, jnp.ones((1,)), None, kind))
  np.testing.assert_allclose(
    np.sort(book), np.sort(recorded[name]), rtol=3e-7, atol=0
  )


def ours():
  """Weights, first and second moments after each step."""
  tx = adamw_8bit(
    bitsandbytes_run.RATE, eps=bitsandbytes_run.EPS, weight_decay=0.0
  )
  weights = jnp.zeros(bitsandbytes_run.SHAPE)
  state, update, found = tx.init(weights), jax.jit(tx.update), []
  read = jax.jit(lambda s: (dequantize(s[0].mu), dequantize(s[0].nu)))
  for g in bitsandbytes_run.gradients():
    updates, state = update(g, state, weights)
    weights = optax.apply_updates(weights, updates)
    found.append((weights, *read(state)))
  return [np.stack(x) for x in zip(*found, strict=True)]


def _steps_apart(x, y, recorded, i):
  """The distance of two moments in codes, relative to the recorded scales."""
  book = np.sort(recorded["signed" if i == 1 else "unsigned"])
  scale = recorded[f"absmax{i}"].reshape(bitsandbytes_run.STEPS, -1, 1)
  index = lambda x: np.searchsorted(
    (book[1:] + book[:-1]) / 2,
    x.reshape(bitsandbytes_run.STEPS, -1, 256) / scale,
  )
  return np.abs(index(x) - index(y)).reshape(x.shape)


def test_recorded_run(recorded):
  moments = bitsandbytes_run.moments(recorded)
  weights, mu, nu = ours()
  # Where bitsandbytes rounds nu to zero, our updates are smaller.
  lost = (moments["nu"] == 0).any(0)
  assert 0 < lost.mean() < 0.05
  for i, x, y in ((1, mu, moments["mu"]), (2, nu, moments["nu"])):
    apart = _steps_apart(x, y, recorded, i)
    assert apart.max() <= 1
    assert (apart[:, ~lost] > 0).mean() < 1e-4  # ties, and rounding errors
  np.testing.assert_allclose(
    weights[-1][~lost], recorded["weights"][~lost], atol=2e-4
  )
  off = np.abs(weights[-1] - recorded["weights"])[~lost]
  assert np.mean(off) < 2e-6
  # There, the steps of bitsandbytes are many times the learning rate.
  assert np.abs(recorded["weights"][lost]).max() > 100 * bitsandbytes_run.RATE
  assert (
    np.abs(weights).max() < 1.5 * bitsandbytes_run.STEPS * bitsandbytes_run.RATE
  )


def test_a_live_run_equals_the_recorded_one(recorded):
  pytest.importorskip(
    "bitsandbytes", reason="needs the extra `parity` (torch, bitsandbytes)"
  )
  live = {
    **bitsandbytes_run.code_books(),
    **bitsandbytes_run.run(bitsandbytes_run.gradients()),
  }
  for name, x in live.items():
    if x.dtype == np.uint8:
      assert np.mean(x != recorded[name]) < 1e-4
    else:
      np.testing.assert_allclose(x, recorded[name], rtol=1e-4, atol=1e-6)
