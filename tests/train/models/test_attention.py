import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.common.errors import UserError
from train.config.schema import MeshConfig
from train.models import attention
from train.parallel.mesh import make_mesh


def arrays(length, heads=2, kv_heads=1, rows=1, width=8):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = (heads, kv_heads, kv_heads, heads)
  return [
    jax.random.normal(key, (rows, length, n, width))
    for key, n in zip(keys, shapes, strict=True)
  ]


def value_and_grads(form, q, k, v, weight):
  def weighted(q, k, v):
    out = form(q, k, v)
    return (out * weight).sum(), out

  run = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))
  grads, out = run(q, k, v)
  return [out, *grads]


plain = functools.partial(attention.attend, "xla")
splash = functools.partial(attention.splash, interpret=True)


def compare(found, expected):
  for a, b in zip(found, expected, strict=True):
    assert np.abs(b).max() > 0.1
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("length, window", [(100, None), (128, None), (100, 9)])
def test_splash_equals_xla_to_rounding(length, window):
  given = arrays(length)
  forms = (functools.partial(f, window=window) for f in (splash, plain))
  compare(*(value_and_grads(form, *given) for form in forms))


def test_a_window_is_of_so_many_positions_and_may_be_traced():
  q, k, v, _ = arrays(12, heads=1)
  scores = jnp.einsum("btnh,bsnh->ts", q, k) / math.sqrt(8)
  distance = np.arange(12)[:, None] - np.arange(12)
  seen = (distance >= 0) & (distance < 3)
  weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
  expected = weights @ v[0, :, 0]
  traced = jax.jit(lambda size: plain(q, k, v, window=size))(3)
  for found in (plain(q, k, v, window=3), traced):
    np.testing.assert_allclose(found[0, :, 0], expected, atol=1e-6)
  # Segments cut what the window leaves.
  apart = (np.arange(12) >= 6).astype(int)
  both = seen & (apart[:, None] == apart)
  weights = jax.nn.softmax(jnp.where(both, scores, -jnp.inf))
  found = plain(q, k, v, segments_BxT=apart[None], window=3)
  np.testing.assert_allclose(found[0, :, 0], weights @ v[0, :, 0], atol=1e-6)


def test_splash_on_a_mesh_equals_xla():
  given = arrays(128, heads=4, kv_heads=2, rows=2)
  mesh = make_mesh(MeshConfig(tensor=2), 2, jax.devices()[:4])
  with jax.set_mesh(mesh):
    found = value_and_grads(splash, *given)
  assert "tensor" in str(found[0].sharding.spec)
  compare(found, value_and_grads(plain, *given))


CPU, TPU, GPU = ("cpu", "cpu"), ("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H100")
AMD = ("gpu", "AMD Instinct MI300X")


@pytest.mark.parametrize(
  "device, shape, dtype, form",
  [
    (CPU, (1, 256, 2, 64), "bfloat16", "xla"),
    (AMD, (1, 256, 2, 64), "bfloat16", "xla"),
    (TPU, (1, 256, 2, 80), "float32", "splash"),
    (TPU, (1, 200, 2, 64), "bfloat16", "xla"),
    (GPU, (1, 200, 2, 64), "bfloat16", "cudnn"),
    (GPU, (1, 256, 2, 64), "float32", "xla"),
    (GPU, (1, 256, 2, 12), "bfloat16", "xla"),
    (GPU, (1, 256, 2, 256), "bfloat16", "xla"),
  ],
)
def test_auto_chooses_what_runs(monkeypatch, device, shape, dtype, form):
  monkeypatch.setattr(attention, "target", lambda: device)
  assert attention.choose("auto", jnp.zeros(shape, dtype)) == form


@pytest.mark.parametrize(
  "form, device, dtype, message",
  [
    ("splash", CPU, "float32", "runs on TPUs only, the device is cpu"),
    ("cudnn", TPU, "bfloat16", "runs on NVIDIA GPUs only, the device is TPU"),
    ("cudnn", AMD, "bfloat16", "runs on NVIDIA GPUs only, the device is AMD"),
    ("cudnn", GPU, "float32", "float32 heads of 64.*model.dtype=bfloat16"),
  ],
)
def test_a_named_implementation_that_cannot_run_is_refused(
  monkeypatch, form, device, dtype, message
):
  monkeypatch.setattr(attention, "target", lambda: device)
  with pytest.raises(UserError, match=message):
    attention.choose(form, jnp.zeros((1, 256, 2, 64), dtype))


def test_windows_that_vary_take_the_plain_form():
  q = jnp.zeros((1, 256, 2, 64))
  assert attention.choose("auto", q, varies=True) == "xla"
  with pytest.raises(UserError, match="attention=splash needs one window"):
    attention.choose("splash", q, varies=True)


def test_the_target_is_the_device_of_the_mesh():
  with jax.set_mesh(make_mesh(MeshConfig(), 8)):
    assert attention.target() == CPU
  assert attention.target() == CPU
