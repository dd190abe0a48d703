"""Rounding to bfloat16 at random, and its random bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from galore_optax.quantization import bfloat16

LARGEST = float(jnp.finfo(jnp.bfloat16).max)


def wide(x):
  return np.asarray(x.astype(jnp.float32), np.float64)


@pytest.mark.parametrize(
  "x",
  [
    1 + 2**-9,
    1.9999999,  # carries into the exponent
    -0.1,
    3.1e-39,  # below the smallest normal number
    2.0**127 * 1.99,
    -1e-45,
  ],
)
def test_expectation_is_the_number_exactly(x):
  """Over all values that the random bits can have."""
  x = np.float32(x)
  every = jnp.arange(2**16, dtype=jnp.uint32)
  found = wide(bfloat16.round_at_random(jnp.full(2**16, x), every))
  assert found.mean() == np.float64(x)
  assert len(set(found)) == 2


@pytest.mark.parametrize(
  "x", [0.0, -0.0, 1.0, -1.375, 2.0**-133, LARGEST, -LARGEST, jnp.inf, -jnp.inf]
)
def test_numbers_of_bfloat16_stay(x):
  every = jnp.arange(2**16, dtype=jnp.uint32)
  found = wide(bfloat16.round_at_random(jnp.full(2**16, x), every))
  assert (found == x).all()
  assert (np.signbit(found) == np.signbit(x)).all()


def test_nan_stays_and_finite_numbers_stay_finite():
  raw = jnp.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], jnp.uint32)
  nan = jax.lax.bitcast_convert_type(raw, jnp.float32)
  largest = jnp.array([1.0, -1.0]) * jnp.finfo(jnp.float32).max
  for bits in (0, 1, 0x8000, 0xFFFF):
    bits = jnp.uint32(bits)
    found = bfloat16.round_at_random(nan, jnp.full(4, bits))
    assert jnp.isnan(found).all()
    found = bfloat16.round_at_random(largest, jnp.full(2, bits))
    np.testing.assert_array_equal(wide(found), [LARGEST, -LARGEST])


def test_derivative_is_that_of_a_cast():
  x = jnp.linspace(-2.0, 2.0, 7)
  key = bfloat16.step_key("", 0)
  store = lambda x: bfloat16.store(x, jnp.bfloat16, key).astype(jnp.float32)
  grads = jax.grad(lambda x: (store(x) ** 2).sum())(x)
  np.testing.assert_array_equal(grads, (2 * store(x)).astype(jnp.bfloat16))


def test_only_wide_floats_are_rounded_at_random():
  key, x = bfloat16.step_key("", 0), jnp.linspace(-1.0, 1.0, 64)
  half = bfloat16.store(x, jnp.float16, key)
  np.testing.assert_array_equal(half, x.astype(jnp.float16))
  assert bfloat16.store(x, jnp.float32, key) is x
  found = bfloat16.store(x, jnp.bfloat16, key)
  assert (found != x.astype(jnp.bfloat16)).any()


def draws(steps, size, leaf="w"):
  """Random bits of one leaf at several steps, scaled to [0, 1)."""

  def draw(step):
    key = bfloat16.leaf_key(bfloat16.step_key("moments", 3, step), leaf)
    return bfloat16.random_bits(key, (size // 8, 8))

  bits = jax.jit(jax.vmap(draw))(jnp.arange(steps))
  return np.asarray(bits, np.float64).reshape(steps, size) / 2**16


def test_random_bits_are_uniform_and_independent():
  """Within five standard deviations of what independent bits would do."""
  x = draws(64, 4096) - 0.5 + 2.0**-17
  count = x.size
  assert abs(x.mean()) < 5 * (1 / 12 / count) ** 0.5
  # Each of the 256 bins of the upper bits, and of the lower ones.
  whole = np.round((x + 0.5) * 2**16 - 0.5).astype(int)
  for bins in (whole >> 8, whole & 255):
    seen = np.bincount(bins.ravel(), minlength=256)
    chi = ((seen - count / 256) ** 2).sum() / (count / 256)
    assert abs(chi - 255) < 5 * (2 * 255) ** 0.5
  # Correlations: along the array, between steps, between rows, between leaves.
  other = draws(64, 4096, "v") - 0.5 + 2.0**-17
  for a, b in (
    *((x[:, :-lag], x[:, lag:]) for lag in (1, 2, 8, 64)),
    *((x[:-lag], x[lag:]) for lag in (1, 2, 7)),
    (x[1:, :-1], x[:-1, 1:]),
    (x, other),
  ):
    assert abs((a * b).mean() * 12) < 5 / a.size**0.5
  # Means over steps and over elements vary as those of independent draws do.
  for axis in (0, 1):
    spread = x.mean(axis).var() * 12 * x.shape[axis]
    assert abs(spread - 1) < 5 * (2 / x.shape[1 - axis]) ** 0.5


def test_keys_differ():
  keys = [
    bfloat16.leaf_key(bfloat16.step_key(use, seed, *numbers), name)
    for use in ("moments", "sums")
    for seed in (0, 1, -1)
    for numbers in ((0,), (1,), (0, 1), (1, 0))
    for name in ("a", "b")
  ]
  assert len({int(x) for x in keys}) == len(keys)


def test_bits_of_a_part_are_those_of_the_whole():
  key = bfloat16.step_key("", 0)
  whole = bfloat16.random_bits(key, (3, 4, 5))
  for i in range(3):
    part = bfloat16.random_bits(key, (4, 5), 20 * i)
    np.testing.assert_array_equal(part, whole[i])
  np.testing.assert_array_equal(
    bfloat16.random_bits(key, ()), whole.reshape(-1)[0]
  )


@pytest.mark.parametrize("spec", [("x",), (None, "y"), ("y", "x")])
def test_bits_do_not_depend_on_the_sharding(spec):
  mesh = jax.make_mesh((4, 2), ("x", "y"))
  x = jax.random.normal(jax.random.key(0), (8, 16))
  key = bfloat16.step_key("", 5)
  wanted = bfloat16.store(x, jnp.bfloat16, key)
  x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
  compiled = jax.jit(
    lambda x, key: bfloat16.store(x, jnp.bfloat16, key),
    out_shardings=x.sharding,
  )
  np.testing.assert_array_equal(wide(compiled(x, key)), wide(wanted))
  text = compiled.lower(x, key).compile().as_text()
  assert "all-" not in text
  assert "collective" not in text
