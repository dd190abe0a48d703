"""Sums in eight bits, against NumPy's."""

import functools

import jax
import numpy as np
import pytest

from train.parallel import quantized_sum

_DEVICES = 4
_ALONG = {"rows": -1, "cols": -2, "vector": -1}
_DRAWS = 64


@functools.cache
def _summed(devices=_DEVICES):
  """A jitted function: what each device has, and draws, to each one's sums."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), "data")

  def of_device(tree, keys):
    tree = jax.tree.map(lambda x: x[0], tree)
    sums = jax.lax.map(
      lambda k: quantized_sum.psum_int8(tree, _ALONG, "data", k), keys
    )
    return jax.tree.map(lambda x: x[None], sums)

  return jax.jit(
    jax.shard_map(
      of_device,
      mesh=mesh,
      in_specs=(jax.P("data"), jax.P()),
      out_specs=jax.P("data"),
      check_vma=False,
    )
  )


@pytest.fixture(scope="module")
def tree():
  """Arrays (devices, ...) whose directions are of very different sizes."""
  draws = np.random.default_rng(0)
  sizes = 10.0 ** -np.arange(4)
  rows = draws.normal(size=(_DEVICES, 2, 4, 256)) * sizes[:, None]
  cols = draws.normal(size=(_DEVICES, 256, 4)) * sizes
  vector = draws.normal(size=(_DEVICES, 300))
  found = {"rows": rows, "cols": cols, "vector": vector}
  return {k: x.astype(np.float32) for k, x in found.items()}


@pytest.fixture(scope="module")
def sums(tree):
  """(devices, draws, ...) of each array."""
  keys = jax.random.split(jax.random.key(1), _DRAWS)
  return jax.device_get(_summed()(tree, keys))


def _blocks(x, name):
  """An array (devices, ...) in blocks of 256, (devices, blocks, 256)."""
  x = x.swapaxes(-1, -2) if _ALONG[name] == -2 else x
  x = x.reshape(len(x), -1)
  return np.pad(x, ((0, 0), (0, -x.shape[1] % 256))).reshape(len(x), -1, 256)


def _bound(tree, name):
  """Largest error of a block's sums: a step of each device's, and the sum's."""
  largest = np.abs(_blocks(tree[name], name)).max(-1)
  of_parts = largest.sum(0) / 127
  total = np.abs(_blocks(tree[name], name).sum(0)).max(-1)
  return (of_parts + (total + of_parts) / 127)[:, None] * 1.001


@pytest.mark.parametrize("name", _ALONG)
def test_the_error_is_less_than_a_step_of_each_rounding(name, tree, sums):
  assert sums[name].dtype == np.float32
  exact = _blocks(tree[name], name).sum(0)
  errors = _blocks(sums[name][0], name) - exact
  bound = _bound(tree, name)
  assert (np.abs(errors) <= bound).all()
  assert np.abs(errors / bound).max() > 0.2  # it does round


@pytest.mark.parametrize("name", _ALONG)
def test_the_expectation_is_the_sum(name, tree, sums):
  errors = _blocks(sums[name][0], name) - _blocks(tree[name], name).sum(0)
  relative = errors / _bound(tree, name)
  count = relative.size // _DRAWS
  # A rounding's standard deviation is half a step at most.
  assert np.abs(relative.mean(0)).max() < 5 * 0.5 / np.sqrt(_DRAWS)
  assert abs(relative.mean()) < 5 * 0.5 / np.sqrt(_DRAWS * count)


def test_all_devices_have_the_same_bits(sums):
  for x in jax.tree.leaves(sums):
    np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
    assert not np.array_equal(x[0, 0], x[0, 1])  # other draws, other codes


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(value, tree, sums):
  broken = tree["rows"].copy()
  broken[2, 1, 3, 7] = value  # on one device
  keys = jax.random.split(jax.random.key(1), _DRAWS)
  found = _summed()({**tree, "rows": broken}, keys)["rows"]
  finite = np.isfinite(found)
  assert not finite[:, :, 1, 3].any()  # in the whole block, on all devices
  finite[:, :, 1, 3] = True
  assert finite.all()
  np.testing.assert_array_equal(found[:, :, 0], sums["rows"][:, :, 0])


def test_a_sum_out_of_range_is_infinite(tree):
  huge = jax.tree.map(lambda x: np.full_like(x, 3e38), tree)
  found = _summed()(huge, jax.random.split(jax.random.key(1), _DRAWS))
  assert not any(np.isfinite(x).any() for x in jax.tree.leaves(found))


def test_zeros_stay_zero(tree):
  zero = jax.tree.map(np.zeros_like, tree)
  found = _summed()(zero, jax.random.split(jax.random.key(1), _DRAWS))
  assert not any(np.any(x) for x in jax.tree.leaves(found))


def test_one_device_rounds_nothing(tree):
  own = jax.tree.map(lambda x: x[:1], tree)
  found = _summed(1)(own, jax.random.split(jax.random.key(1), 1))
  for a, b in zip(*map(jax.tree.leaves, (found, own)), strict=True):
    np.testing.assert_array_equal(a[:, 0], b)


def test_bytes_that_are_sent_have_eight_bits(tree):
  keys = jax.random.split(jax.random.key(1), _DRAWS)
  text = _summed().lower(tree, keys).as_text()
  moved = [
    x for x in text.splitlines() if "all_to_all" in x or "all_gather" in x
  ]
  assert len(moved) == 2 * 2 * len(tree)  # two rounds of codes and scales
  assert sum("i8>" in x for x in moved) == len(moved) // 2
  assert "all_reduce" not in text
