"""Reverse mode through several steps, and state that differs by device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  Refresh,
  adamw_8bit,
  galore_adamw,
  galore_adamw_8bit,
  gum,
  ldadam,
  q_galore_adamw_8bit,
  sumo,
)

LOW = {"rank": 2, "update_proj_gap": 2}
_galore = functools.partial(galore_adamw, **LOW)
SMOOTH = {
  "adamw": optax.adamw,
  "galore": _galore,
  "synchronous": functools.partial(_galore, refresh="synchronous"),
  "svd": functools.partial(_galore, refresh=Refresh(finder="svd")),
  "burst": functools.partial(_galore, refresh=Refresh(burst=1)),
  "adaptive": functools.partial(_galore, refresh="adaptive"),
  "normalized": functools.partial(_galore, residual="normalized"),
  "fira": functools.partial(_galore, residual="fira"),
  "sumo": functools.partial(sumo, **LOW),
  "ldadam": functools.partial(ldadam, **LOW),
}
ROUNDED = {
  "adamw_8bit": functools.partial(adamw_8bit, min_size=0),
  "galore_8bit": functools.partial(galore_adamw_8bit, **LOW, min_size=0),
  "q_galore": functools.partial(q_galore_adamw_8bit, **LOW, min_size=0),
  "gum": functools.partial(gum, **LOW),
}


def _normal(seed, shape=(3, 6, 8)):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


# Variants of the others, with `-m slow`.
SLOW = (
  "synchronous",
  "svd",
  "burst",
  "normalized",
  "fira",
  "galore_8bit",
  "q_galore",
)


def _names(names):
  return pytest.mark.parametrize(
    "name",
    [
      pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
      for name in names
    ],
  )


@_names(SMOOTH)
def test_a_learning_rate_has_a_gradient_through_three_steps(name):
  """That of forward mode; bases count as constants in both."""

  def loss(rate):
    tx = SMOOTH[name](rate)
    target = _normal(0)

    def step(carry, scale):
      params, state = carry
      g = jax.tree.map(lambda x: scale * (x - target), params)
      updates, state = tx.update(g, state, params)
      return (optax.apply_updates(params, updates), state), None

    params = {"w": _normal(1)}
    carry = params, tx.init(params)
    (params, _), _ = jax.lax.scan(step, carry, jnp.array([1.0, 0.7, 1.3]))
    return jnp.sum((params["w"] - target) ** 2)

  found = jax.jit(jax.grad(loss))(0.05)
  _, wanted = jax.jit(lambda rate: jax.jvp(loss, (rate,), (1.0,)))(0.05)
  assert abs(wanted) > 1
  np.testing.assert_allclose(found, wanted, rtol=1e-4)


@_names([*SMOOTH, *ROUNDED])
def test_state_may_differ_by_device(name):
  """In the body of `shard_map`, each device has an optimizer of its own."""
  tx = (SMOOTH | ROUNDED)[name](0.1)
  params = {"w": jnp.stack([_normal(0), _normal(1)])}
  grads = {"w": jnp.stack([_normal(2), _normal(3)])}

  def steps(params, g):
    params, g = jax.tree.map(lambda x: x[0], (params, g))
    state = tx.init(params)
    for _ in range(2):
      updates, state = tx.update(g, state, params)
      params = optax.apply_updates(params, updates)
    return jax.tree.map(lambda x: x[None], params)

  mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,))
  found = jax.jit(
    jax.shard_map(steps, mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P("d"))
  )(params, grads)["w"]
  alone = jax.jit(steps)
  for k in range(2):
    part = jax.tree.map(lambda x, k=k: x[k : k + 1], (params, grads))
    np.testing.assert_allclose(found[k], alone(*part)["w"][0], atol=1e-5)
