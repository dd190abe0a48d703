"""SCALE against its equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_optax
from tests.train.methods.rivals import reference
from train.common.errors import UserError
from train.config import presets, schema

DECAY = reference.B1


def normalized(x):
  return x / np.sqrt(np.mean(x**2, axis=-2, keepdims=True))


def with_momentum(grads):
  m, found = np.zeros_like(grads[0]), []
  for g in grads:
    m = DECAY * m + (1 - DECAY) * g
    found.append(-reference.RATE * normalized(m))
  return found


def without(grads):
  return [-reference.RATE * normalized(g) for g in grads]


@pytest.fixture(scope="module")
def grads():
  return reference.gradients(4)


def check(found, grads, module, leaf, rule):
  leaves = lambda trees: [tree[module][leaf] for tree in trees]
  reference.check(leaves(found), rule(leaves(grads)))


def test_the_updates_are_those_of_the_equations(grads):
  found, state = reference.run(reference.make("scale"), grads)
  check(found, grads, "lm_head", "kernel", with_momentum)
  check(found, grads, "embed", "embedding", without)
  check(found, grads, "norm", "scale", reference.adam)
  for name in ("up", "down"):
    kernels = reference.kernels(grads, name)
    reference.check(reference.kernels(found, name), without(kernels))
  # One moment of the head, two of the norm, and counters.
  assert galore_optax.state_bytes(state) < 4 * (8 * 5 + 2 * 8 + 8)


def test_an_embedding_that_is_the_head_has_the_momentum(grads):
  tied = [{k: v for k, v in g.items() if k != "lm_head"} for g in grads]
  found, _ = reference.run(reference.make("scale"), tied)
  check(found, tied, "embed", "embedding", with_momentum)


def test_columns_without_a_gradient_stay_as_they_are():
  grads = reference.gradients(1)
  grads[0]["embed"]["embedding"][:, 3] = 0
  found, _ = reference.run(reference.make("scale"), grads)
  update = found[0]["embed"]["embedding"]
  assert not update[:, 3].any() and update[:, :3].all()


def test_weights_decay_in_proportion_to_the_rate(grads):
  params = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32), grads[0])
  zero = jax.tree.map(jnp.zeros_like, params)
  tx = reference.make("scale", weight_decay=0.5)
  updates, _ = tx.update(zero, tx.init(params), params)
  np.testing.assert_allclose(updates["layers"]["up"]["kernel"], -0.05)
  np.testing.assert_allclose(updates["lm_head"]["kernel"], -0.05)
  assert not updates["norm"]["scale"].any()


def test_updates_in_chunks_of_the_embedding_are_refused():
  with pytest.raises(UserError, match="whole columns"):
    schema.override(
      presets.make("sotu_small", "scale"), ["train.layerwise=true"]
    )
