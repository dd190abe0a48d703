"""Muon with its momentum in few bits, against its equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_optax
from galore_optax.quantization import nf4
from tests.train.methods.rivals import reference

KINDS = {"muon_8bit": "dynamic", "muon_4bit": "nf4"}
DECAY = 0.95


def levels(kind: str) -> np.ndarray:
  """All values of a format between -1 and 1."""
  if kind == "nf4":
    return np.array(nf4.VALUES)
  codes = jnp.arange(-128, 128, dtype=jnp.int8)
  q = galore_optax.QArray(codes, jnp.ones(1), None, kind)
  return np.asarray(galore_optax.dequantize(q), np.float64)


def rounded(x: np.ndarray, kind: str) -> np.ndarray:
  """The nearest levels; a block is a whole row or column of these matrices."""
  scale = np.abs(x).max(axis=np.argmax(x.shape), keepdims=True)
  distance = np.abs((x / scale)[..., None] - levels(kind))
  return levels(kind)[distance.argmin(-1)] * scale


def orthogonalized(x: np.ndarray) -> np.ndarray:
  """Five Newton-Schulz iterations."""
  if x.shape[0] > x.shape[1]:
    return orthogonalized(x.T).T
  x = x / (np.linalg.norm(x) + 1e-8)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x


def muon(grads: list[np.ndarray], kind: str) -> list[np.ndarray]:
  stored, found = np.zeros_like(grads[0]), []
  for t, g in enumerate(grads, 1):
    m = DECAY * stored + (1 - DECAY) * g
    stored = rounded(m, kind)
    ahead = DECAY * m / (1 - DECAY ** (t + 1))
    ahead += (1 - DECAY) * g / (1 - DECAY**t)
    factor = max(1, g.shape[1] / g.shape[0]) ** 0.5
    found.append(-reference.RATE * factor * orthogonalized(ahead))
  return found


@pytest.mark.parametrize("name", KINDS)
def test_the_updates_are_those_of_the_equations(name):
  grads = reference.gradients(6)
  found, _ = reference.run(reference.make(name), grads)
  for kernel in ("up", "down"):
    expected = reference.by_layer(
      lambda g: muon(g, KINDS[name]), reference.kernels(grads, kernel)
    )
    reference.check(reference.kernels(found, kernel), expected, 1e-3)
  # Leaves of this size have moments in float32.
  reference.check(
    [u["lm_head"]["kernel"] for u in found],
    reference.adam([g["lm_head"]["kernel"] for g in grads]),
  )


def test_rounding_makes_a_difference_that_the_comparison_above_would_see():
  grads = reference.kernels(reference.gradients(6), "up")
  one = [g[0] for g in grads]
  eight, four = muon(one, "dynamic")[-1], muon(one, "nf4")[-1]
  assert np.abs(eight - four).max() > 0.05 * np.abs(four).max()


@pytest.mark.parametrize(
  ("name", "size"), [("muon_8bit", 1), ("muon_4bit", 0.5)]
)
def test_the_momentum_takes_eight_or_four_bits_and_scales(name, size):
  m, n = 128, 512
  params = {
    "layers": {"up": {"kernel": jax.ShapeDtypeStruct((2, m, n), "float32")}}
  }
  state = jax.eval_shape(reference.make(name).init, params)
  block = {"muon_8bit": 256, "muon_4bit": 64}[name]
  rest = galore_optax.state_bytes(state) - 2 * m * n * (size + 4 / block)
  assert 0 < rest < 64  # counters, and the coefficients of the iteration


def test_nf4_loses_less_of_a_momentum_than_symmetric_int4():
  rng = np.random.default_rng(0)
  low = rng.normal(size=(64, 4)) @ rng.normal(size=(4, 128))
  noise = 2 * rng.normal(size=low.shape)
  sizes = np.exp(rng.normal(size=(64, 1))) * np.exp(rng.normal(size=128))
  x = jnp.asarray((low + noise) * sizes, jnp.float32)

  def loss(kind, **options):
    q = galore_optax.quantize(x, kind, block=64, **options)
    return float(jnp.linalg.norm(galore_optax.dequantize(q) - x))

  assert loss("nf4") < 0.8 * loss("int4", symmetric=True)
