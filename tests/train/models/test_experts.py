import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.conftest import EXPERTS, weights
from train.config.schema import MeshConfig
from train.models import experts, llama
from train.parallel import mesh as mesh_lib

TOKENS = jax.random.randint(jax.random.key(3), (4, 8), 0, EXPERTS.vocab_size)


def arrays(router=None, count=3):
  """Tokens (M, D), a router, and kernels of three experts."""
  keys = jax.random.split(jax.random.key(0), 5)
  shapes = ((7, 4), (4, count), (count, 4, 6), (count, 4, 6), (count, 6, 4))
  drawn = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
  return drawn if router is None else [drawn[0], router, *drawn[2:]]


def route(x, router, active, norm):
  best, chosen = jax.lax.top_k(jax.nn.softmax(x @ router), active)
  return best / best.sum(-1, keepdims=True) if norm else best, chosen


def by_einsum(active, norm, x, router, gate, up, down):
  """All experts on all tokens, weighted by 0 where they are not chosen."""
  best, chosen = route(x, router, active, norm)
  given = (jax.nn.one_hot(chosen, len(gate)) * best[..., None]).sum(1)
  hidden = jax.nn.silu(jnp.einsum("md,edf->emf", x, gate))
  hidden *= jnp.einsum("md,edf->emf", x, up)
  return jnp.einsum("emf,efd,me->md", hidden, down, given)


def sorted_by_expert(active, norm, x, router, *kernels):
  return experts._mix(x, *route(x, router, active, norm), *kernels)


@pytest.mark.parametrize(
  ("active", "norm", "router"),
  [
    (1, True, None),
    (2, False, None),
    (3, True, None),
    # All tokens take the same two experts, and no token takes the third.
    (2, True, jnp.zeros((4, 3))),
  ],
)
def test_no_token_is_dropped(active, norm, router):
  given = arrays(router)

  def both(f):
    run = functools.partial(f, active, norm)
    value = lambda *given: (run(*given) ** 2).sum()
    everything = jax.jit(
      lambda *given: (run(*given), jax.grad(value, range(5))(*given))
    )
    return everything(*given)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4),
    both(sorted_by_expert),
    both(by_einsum),
  )


@functools.cache
def structure(config=EXPERTS):
  return llama.abstract(config)[0]


def test_a_mesh_computes_what_one_device_does():
  """Rows over two axes, and units over the third."""
  if jax.device_count() < 8:
    pytest.skip(f"needs 8 devices, found {jax.device_count()}")
  mesh = mesh_lib.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 4)
  where = mesh_lib.param_shardings(llama.abstract(EXPERTS)[1], mesh)
  of_gate = where["layers"]["experts"]["gate"]["kernel"]
  assert of_gate.spec == jax.P(None, None, "fsdp", "tensor")

  x, router, *kernels = arrays()
  x = jnp.tile(x[:4], (4, 1)) * jnp.arange(16)[:, None] / 16  # rows of four
  best, chosen = route(x, router, 2, True)
  given = (x, best, *kernels)

  def gradient(make):
    def loss(x, best, *kernels):
      return (make()(x, best, chosen, *kernels) ** 2).sum()

    return jax.jit(jax.value_and_grad(loss, range(5)))(*given)

  expected = gradient(lambda: experts._mix)
  with jax.set_mesh(mesh):
    # The units are 6, which two devices divide; the row of a sample is one.
    for rows in (4, 1):
      found = gradient(lambda rows=rows: experts._compute(EXPERTS, rows))
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4),
        found,
        expected,
      )


def test_padding_does_not_count_for_the_balance():
  params = weights(EXPERTS)
  run = jax.jit(llama.apply_with_balance, static_argnums=0)
  counted = jnp.ones_like(TOKENS, float).at[:, 5:].set(0)
  _, whole = run(structure(), params, TOKENS[:, :5])
  _, padded = run(structure(), params, TOKENS, None, counted)
  np.testing.assert_allclose(padded, whole, rtol=1e-5)
  assert whole > EXPERTS.n_active_experts
