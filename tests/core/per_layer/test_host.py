"""Optimizer state in host memory changes where it lives, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  Layered,
  galore,
  galore_adamw_8bit,
  host_shardings,
  layerwise,
)
from tests.marks import moves_arrays

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
MODEL = Layered(
  first=lambda params, batch: batch @ params["inner"],
  layer=lambda w, x: x + jnp.tanh(x @ w),
  last=lambda params, x, batch: jnp.mean((x @ params["outer"]) ** 2),
)


def parameters():
  normal = np.random.default_rng(0).normal
  make = lambda *shape: jnp.asarray(0.1 * normal(size=shape), jnp.float32)
  return {
    "inner": make(64, 64),
    "layers": make(3, 64, 64),
    "outer": make(64, 1),
  }


def run(tx, offload, **options):
  """Parameters and state after some steps, with two refreshes in them."""
  init, step = layerwise(tx, MODEL, **options)
  params = parameters()
  state = jax.jit(init)(params)
  where = jax.tree.map(lambda x: HERE, state)
  if offload:
    where = host_shardings(state, where)
    state = jax.device_put(state, where)
  step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(HERE, where, HERE))
  batches = np.random.default_rng(1).normal(size=(5, 8, 64)).astype(np.float32)
  for batch in batches:
    params, state, _ = step(params, state, batch)
  return params, state


@moves_arrays
@pytest.mark.parametrize(
  ("tx", "options", "moved"),
  [
    # Basis, and both moments.
    (galore(optax.adam(0.1), rank=8, update_proj_gap=3), {}, 3),
    # The same, of the embedding too, whose moments are updated in chunks.
    pytest.param(
      optax.adam(0.1), {"chunks": {"inner": 4}}, 4, marks=pytest.mark.slow
    ),
    # The basis, and the codes of the moments; their scales are too small.
    (galore_adamw_8bit(0.1, rank=32, update_proj_gap=3), {}, 3),
    pytest.param(
      galore(optax.adam(0.1), rank=8, update_proj_gap=3),
      {"projected": True, "clip_norm": 1.0},
      3,
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_state_in_host_memory_is_the_same(tx, options, moved):
  wanted, found = run(tx, False, **options), run(tx, True, **options)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  kinds = [x.sharding.memory_kind for x in jax.tree.leaves(found)]
  assert kinds.count("pinned_host") == moved


def test_other_states_are_refused():
  state = optax.adam(0.1).init(parameters())
  with pytest.raises(TypeError, match=r"state of `layerwise`.*tuple"):
    host_shardings(state, jax.tree.map(lambda x: HERE, state))
