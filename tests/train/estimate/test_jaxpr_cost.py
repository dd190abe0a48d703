"""Counts from jaxprs, held to numpy's arithmetic and to the compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train.config import schema
from train.estimate import flops, jaxpr_cost
from train.models import llama

EXPERTS = schema.ModelConfig(
  family="mixtral",
  vocab_size=512,
  d_model=32,
  d_ff=24,
  n_layers=3,
  n_heads=2,
  n_experts=5,
  n_active_experts=2,
)
TOY = schema.ModelConfig(
  vocab_size=512, d_model=32, d_ff=88, n_layers=3, n_heads=2
)


def jaxpr_of(f, *shapes):
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.make_jaxpr(f)(*arrays).jaxpr


def shapes_of(model):
  graphdef, boxes = llama.abstract(model)
  return graphdef, nnx.to_pure_dict(boxes)


def test_products_count_their_multiplications_and_additions():
  batched = lambda a, b: jnp.einsum("bmk,bkn->bmn", a, b)
  jaxpr = jaxpr_of(batched, (3, 4, 5), (3, 5, 6))
  assert jaxpr_cost.count_flops(jaxpr) == 2 * 3 * 4 * 5 * 6


def test_a_scan_counts_as_often_as_it_runs():
  def run(a, b):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ b), None), a, length=7)[0]

  assert (
    jaxpr_cost.count_flops(jaxpr_of(run, (4, 8), (8, 8))) == 7 * 2 * 4 * 8 * 8
  )


def test_of_a_conditional_the_chosen_branch_counts():
  def run(a, b):
    return jax.lax.cond(a[0, 0] > 0, lambda: a @ b @ b, lambda: a)

  jaxpr = jaxpr_of(run, (4, 8), (8, 8))
  assert jaxpr_cost.count_flops(jaxpr) == 2 * 2 * 4 * 8 * 8
  assert jaxpr_cost.count_flops(jaxpr, min) == 0


def test_a_loop_of_unknown_length_counts_once_or_not_at_all():
  def run(a, b):
    more = lambda x: x[0, 0] < 1
    return jax.lax.while_loop(more, lambda x: x @ b, a)

  jaxpr = jaxpr_of(run, (4, 8), (8, 8))
  assert jaxpr_cost.count_flops(jaxpr) == 2 * 4 * 8 * 8
  assert jaxpr_cost.count_flops(jaxpr, min) == 0


def test_of_experts_those_count_that_a_token_takes():
  d, ff, length = EXPERTS.d_model, EXPERTS.d_ff, 16
  layer = 2 * (4 * d * d + 5 * d + 2 * 3 * d * ff) + 2 * 2 * length * d
  forward = 3 * (layer + 2 * 2 * d) + 2 * d * EXPERTS.vocab_size  # and a sum
  shapes = shapes_of(EXPERTS)
  assert flops.forward_per_token(*shapes, length) == forward
  assert flops.recompute_per_token(*shapes, length, forward) == 0
  backward = flops.trace_loss(*shapes, 1, length, gradient=True)
  assert jaxpr_cost.count_flops(backward) == 3 * forward * length


def test_a_models_flops_are_those_of_its_matrices():
  d, ff, length = TOY.d_model, TOY.d_ff, 16
  layer = 2 * (4 * d * d + 3 * d * ff) + 2 * 2 * length * d  # and attention
  forward = TOY.n_layers * layer + 2 * d * TOY.vocab_size
  shapes = shapes_of(TOY)
  assert flops.forward_per_token(*shapes, length) == forward
  assert flops.recompute_per_token(*shapes, length, forward) == 0


def test_recomputed_work_counts_apart():
  full = schema.ModelConfig(**{**vars(TOY), "remat": "full"})
  forward = flops.forward_per_token(*shapes_of(TOY), 16)
  again = flops.recompute_per_token(*shapes_of(full), 16, forward)
  # All but the last product of a layer, and the head not at all.
  head = 2 * TOY.d_model * TOY.vocab_size
  layers = forward - head
  assert 0.7 * layers < again <= layers


def test_an_elementwise_chain_needs_one_buffer_and_views_none():
  jaxpr = jaxpr_of(
    lambda x: jnp.exp(jnp.sin(x) + 1).T.reshape(-1).sum(), (8, 8)
  )
  assert jaxpr_cost.peak_bytes(jaxpr) == 4 * 64


def test_a_product_cannot_write_over_its_operands():
  jaxpr = jaxpr_of(lambda x: (jnp.sin(x) @ x).sum(), (8, 8))
  assert jaxpr_cost.peak_bytes(jaxpr) == 2 * 4 * 64


@pytest.mark.parametrize(
  "vocab_size, remat",
  [
    (512, "none"),
    pytest.param(512, "full", marks=pytest.mark.slow),
    pytest.param(4096, "dots", marks=pytest.mark.slow),
  ],
)
def test_activations_are_close_to_the_compilers_buffers(vocab_size, remat):
  changes = {"vocab_size": vocab_size, "remat": remat, "d_model": 64}
  model = schema.ModelConfig(**{**vars(TOY), **changes})
  jaxpr = flops.trace_loss(*shapes_of(model), 8, 64, gradient=True)
  shapes = [
    jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.invars
  ]
  tables = [np.zeros(v.aval.shape, v.aval.dtype) for v in jaxpr.constvars]
  closed = jax.extend.core.ClosedJaxpr(jaxpr, tables)
  run = jax.jit(jax.extend.core.jaxpr_as_fun(closed))
  # Optimized as users have it, whatever the tests are compiled with.
  options = {"xla_backend_optimization_level": 3}
  compiled = run.lower(*shapes).compile(options)
  buffers = compiled.memory_analysis().temp_size_in_bytes
  assert jaxpr_cost.peak_bytes(jaxpr) == pytest.approx(buffers, rel=0.12)
