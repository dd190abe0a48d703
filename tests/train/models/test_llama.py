import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.conftest import TINY
from train.models import llama


@functools.cache
def build(**changes):
  config = dataclasses.replace(TINY, **changes)
  return llama.abstract(config)[0], llama.init(config, 0)


def logits(tokens, params=None, **changes):
  graphdef, fresh = build(**changes)
  return llama.apply(graphdef, params or fresh, tokens)


TOKENS = jax.random.randint(jax.random.key(3), (2, 9), 0, TINY.vocab_size)


def test_a_position_sees_itself_and_the_past_and_nothing_else():
  # Tokens are integers: so the embedding of each position is shifted, by
  # giving every position a token, and so a row of the table, of its own.
  graphdef, params = build()
  tokens = jnp.arange(9)[None]

  def per_position(table):
    changed = params | {"embed": {"embedding": table}}
    out = llama.apply(graphdef, changed, tokens)[0]
    return (out**2).sum(axis=-1)

  jacobian = jax.jacrev(per_position)(params["embed"]["embedding"])
  reach = np.abs(np.asarray(jacobian)[:, :9]).max(axis=-1)  # (t, s)
  future = np.triu(np.ones((9, 9), bool), k=1)
  assert (reach[future] == 0).all()
  assert (reach[~future] > 1e-9).all()


def test_rotary_products_depend_on_the_distance_only():
  q, k = jax.random.normal(jax.random.key(0), (2, 8))

  def at(vector, position):
    row = jnp.zeros((1, 12, 1, 8)).at[0, position, 0].set(vector)
    return llama.rotary(row, 10000.0)[0, position, 0]

  near = [at(q, i + 3) @ at(k, i) for i in range(9)]
  np.testing.assert_allclose(near, near[0], rtol=1e-5)
  assert abs(at(q, 5) @ at(k, 0) - near[0]) > 1e-3
  np.testing.assert_allclose(
    jnp.linalg.norm(at(q, 7)), jnp.linalg.norm(q), rtol=1e-6
  )


def test_rotary_keeps_the_dtype_and_the_precision_of_far_positions():
  x = jnp.ones((1, 600, 1, 8), jnp.bfloat16)
  turned = llama.rotary(x, 10000.0)
  assert turned.dtype == jnp.bfloat16
  assert (turned[0, 512] != turned[0, 513]).any()


def test_grouped_queries_equal_full_heads_with_repeated_keys():
  _, params = build(n_kv_heads=2)
  wide = jax.tree.map(lambda x: x, params)
  for name in ("k", "v"):
    kernel = params["layers"]["attn"][name]["kernel"]
    heads = kernel.reshape(*kernel.shape[:2], 2, -1)
    repeated = jnp.repeat(heads, 2, axis=2).reshape(*kernel.shape[:2], -1)
    wide["layers"]["attn"][name] = {"kernel": repeated}
  grouped = logits(TOKENS, params, n_kv_heads=2)
  np.testing.assert_allclose(logits(TOKENS, wide), grouped, atol=2e-6)
  swapped = jax.tree.map(lambda x: x[..., ::-1], wide)
  assert not np.allclose(logits(TOKENS, swapped), grouped, atol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_the_scan_equals_the_pieces_one_layer_after_the_other(tied):
  config = dataclasses.replace(TINY, tie_embeddings=tied)
  _, params = build(tie_embeddings=tied)
  rows, length = TOKENS.shape

  @jax.jit
  def walk(params):
    outside = {k: v for k, v in params.items() if k != "layers"}
    x = llama.embed(config, outside, TOKENS)
    for i in range(TINY.n_layers):
      layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
      x = llama.block(config, layer, x, length)
    return llama.head(config, outside, x, rows)

  together = logits(TOKENS, params, tie_embeddings=tied)
  np.testing.assert_allclose(walk(params), together, atol=1e-6)


@pytest.mark.parametrize(
  "changes", [{"remat": "full"}, {"remat": "dots"}, {"unroll": 2}]
)
def test_how_layers_are_run_changes_no_gradient(changes):
  _, params = build()

  def gradient(**how):
    return jax.grad(lambda p: (logits(TOKENS, p, **how) ** 2).sum())(params)

  plain, other = gradient(), gradient(**changes)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
    plain,
    other,
  )


def test_remat_keeps_less_for_the_backward_pass():
  _, params = build()

  def kept(remat):
    run = lambda p: logits(TOKENS, p, remat=remat)
    backward = jax.eval_shape(lambda p: jax.vjp(run, p)[1], params)
    return sum(x.size for x in jax.tree.leaves(backward))

  assert kept("full") < kept("dots") < kept("none")


def test_a_tied_head_is_the_embedding():
  _, tied = build(tie_embeddings=True)
  assert "lm_head" not in tied
  _, untied = build()
  table = tied["embed"]["embedding"]
  same = untied | tied | {"lm_head": {"kernel": table.T}}
  np.testing.assert_allclose(
    logits(TOKENS, tied, tie_embeddings=True), logits(TOKENS, same), atol=1e-6
  )


def test_compute_dtype_is_apart_from_the_parameters():
  _, params = build(dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  low, full = logits(TOKENS, params, dtype="bfloat16"), logits(TOKENS, params)
  assert low.dtype == jnp.float32
  error = np.abs(low - full).max()
  assert 0 < error < 0.02
  _, half = build(param_dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}


def test_kernels_are_stacked_and_named():
  paths = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(build()[1])
  }
  assert paths["layers/attn/q/kernel"] == (2, 32, 32)
  assert paths["layers/mlp/down/kernel"] == (2, 48, 32)
  assert paths["layers/attn_norm/scale"] == (2, 32)
  assert paths["embed/embedding"] == (300, 32)
  kernels = build()[1]["layers"]["attn"]["q"]["kernel"]
  assert not np.allclose(kernels[0], kernels[1])
