import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.marks import slow
from tests.train.conftest import QWEN, TINY
from train.models import llama, rope

INIT = jax.jit(llama.init, static_argnums=(0, 1))
APPLY = jax.jit(llama.apply, static_argnums=0)


@functools.cache
def structure(**changes):
  return llama.abstract(dataclasses.replace(TINY, **changes))[0]


@functools.cache
def fresh(**changes):
  return INIT(dataclasses.replace(TINY, **changes), 0)


def logits(tokens, params, **changes):
  return APPLY(structure(**changes), params, tokens)


TOKENS = jax.random.randint(jax.random.key(3), (2, 9), 0, TINY.vocab_size)


def test_a_position_depends_on_itself_and_earlier_ones_only():
  # Tokens are integers, so the derivative is taken by their embeddings: each
  # position has a token, and so a row of the table, of its own.
  params = fresh()
  tokens = jnp.arange(9)[None]

  def per_position(table):
    changed = params | {"embed": {"embedding": table}}
    out = logits(tokens, changed)[0]
    return (out**2).sum(axis=-1)

  jacobian = jax.jit(jax.jacrev(per_position))(params["embed"]["embedding"])
  reach = np.abs(np.asarray(jacobian)[:, :9]).max(axis=-1)  # (t, s)
  future = np.triu(np.ones((9, 9), bool), k=1)
  assert (reach[future] == 0).all()
  assert (reach[~future] > 1e-9).all()


def test_rotary_products_depend_on_the_distance_only():
  q, k = jax.random.normal(jax.random.key(0), (2, 8))

  def at(vector, position):
    row = jnp.zeros((1, 12, 1, 8)).at[0, position, 0].set(vector)
    return rope.rotate(row, rope.Rope(8))[0, position, 0]

  near = [at(q, i + 3) @ at(k, i) for i in range(9)]
  np.testing.assert_allclose(near, near[0], rtol=1e-5)
  assert abs(at(q, 5) @ at(k, 0) - near[0]) > 1e-3
  np.testing.assert_allclose(
    jnp.linalg.norm(at(q, 7)), jnp.linalg.norm(q), rtol=1e-6
  )


def test_rotary_keeps_the_dtype_and_the_precision_of_far_positions():
  x = jnp.ones((1, 600, 1, 8), jnp.bfloat16)
  rotated = rope.rotate(x, rope.Rope(8))
  assert rotated.dtype == jnp.bfloat16
  assert (rotated[0, 512] != rotated[0, 513]).any()


def test_grouped_queries_equal_full_heads_with_repeated_keys():
  params = fresh(n_kv_heads=2)
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


@pytest.mark.parametrize(
  "config",
  [TINY, dataclasses.replace(TINY, tie_embeddings=True), QWEN],
  ids=["plain", "tied", "layers that differ"],
)
def test_the_scan_equals_a_loop_over_the_layers(config):
  params = INIT(config, 0)
  rows, length = TOKENS.shape

  @jax.jit
  def loop(params):
    outside = {k: v for k, v in params.items() if k != "layers"}
    x = llama.embed(config, outside, TOKENS)
    for i in range(TINY.n_layers):
      layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
      x, _ = llama.block(config, layer, x, length, i)
    return llama.head(config, outside, x, rows)

  together = APPLY(llama.abstract(config)[0], params, TOKENS)
  np.testing.assert_allclose(loop(params), together, atol=1e-6)


@functools.cache
def gradient(**changes):
  loss = lambda p: (logits(TOKENS, p, **changes) ** 2).sum()
  return jax.jit(jax.grad(loss))(fresh())


@pytest.mark.parametrize(
  "changes", [slow({"remat": "full"}), {"remat": "dots"}, {"unroll": 2}]
)
def test_remat_and_unroll_do_not_change_the_gradient(changes):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
    gradient(),
    gradient(**changes),
  )


def test_remat_stores_less_for_the_backward_pass():
  def stored(remat):
    graphdef = structure(remat=remat)
    run = lambda p: llama.apply(graphdef, p, TOKENS)
    backward = jax.eval_shape(lambda p: jax.vjp(run, p)[1], fresh())
    return sum(x.size for x in jax.tree.leaves(backward))

  assert stored("full") < stored("dots") < stored("none")


def test_a_tied_head_is_the_embedding():
  tied = fresh(tie_embeddings=True)
  assert "lm_head" not in tied
  untied = fresh()
  table = tied["embed"]["embedding"]
  same = untied | tied | {"lm_head": {"kernel": table.T}}
  np.testing.assert_allclose(
    logits(TOKENS, tied, tie_embeddings=True), logits(TOKENS, same), atol=1e-6
  )


def test_the_compute_dtype_is_independent_of_the_parameters():
  params = fresh(dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  low, full = logits(TOKENS, params, dtype="bfloat16"), logits(TOKENS, params)
  assert low.dtype == jnp.float32
  error = np.abs(low - full).max()
  assert 0 < error < 0.02
  half = fresh(param_dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}


def test_kernels_are_stacked_and_named():
  paths = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(fresh())
  }
  assert paths["layers/attn/q/kernel"] == (2, 32, 32)
  assert paths["layers/mlp/down/kernel"] == (2, 48, 32)
  assert paths["layers/attn_norm/scale"] == (2, 32)
  assert paths["embed/embedding"] == (300, 32)
  kernels = fresh()["layers"]["attn"]["q"]["kernel"]
  assert not np.allclose(kernels[0], kernels[1])
