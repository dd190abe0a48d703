"""Which leaves are projected, on which side, at which rank."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from galore_optax import Projection, galore, state_bytes
from galore_optax.tree import matrix_view, paths, sides
from train.bench import trees

FAST = hypothesis.settings(max_examples=60, deadline=None)


def projected(params, **options):
  state = jax.eval_shape(galore(optax.adam(1.0), **options).init, params)
  return {
    path: {side: basis.shape for side, basis in bases.items()}
    for path, bases in state.projector.items()
  }


def arrays(**shapes):
  return {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in shapes.items()
  }


@pytest.mark.filterwarnings("ignore:galore projects none")
@pytest.mark.parametrize(
  "path",
  [
    "embed/embedding", "tok_embeddings/weight", "wte", "wpe/embedding",
    "lm_head/kernel", "head", "output/weight", "logits/kernel", "unembed/w",
    "layers/attn_norm/scale", "layers/ln_1/g", "norm/weight", "layers/q/bias",
    "layers/LayerNorm_0/scale", "lm_head.weight", "transformer.wte.weight",
    "model.ln_f.weight", "blocks.0.ln_1.scale", "h.0.attn.bias",
    "to_logits/w", "logits_dense/kernel", "tok_emb/weight", "pos_embs",
    "layer_1/offset", "ln/beta",
    "up/bias/0", "head/weight/0",
  ],
)  # fmt: skip
def test_full_rank_paths(path):
  assert not projected({path: arrays(x=(64, 64))["x"]}, rank=4)


@pytest.mark.parametrize(
  "path",
  [
    "layers/attn/q/kernel", "mlp/down", "encoder/layer/0/output/dense/kernel",
    "w", "heads/kernel", "layers/self_attn/o_proj/kernel",
    "encoder.layer.0.output.dense.weight", "model.layers.0.mlp.up_proj.weight",
    "b", "up/b", "ember/w", "logits_mix/w",
    "output/0", "up/weight/0", "bias/up/0",
  ],
)  # fmt: skip
def test_projected_paths(path):
  assert projected({path: arrays(x=(64, 64))["x"]}, rank=4)


def test_a_bias_of_haiku_is_a_vector_in_every_layer():
  """A `b` beside a `w` with one more axis, and no other `b`."""
  stacked = arrays(w=(3, 12, 256), b=(12, 256))
  assert set(
    projected({"up/w": stacked["w"], "up/b": stacked["b"]}, rank=4)
  ) == {"up/w"}
  factors = arrays(w=(64, 64), b=(64, 64))
  assert set(projected({"x/w": factors["w"], "x/b": factors["b"]}, rank=4)) == {
    "x/w",
    "x/b",
  }
  ruled = {"rank": 4, "rules": [("up/b", Projection(rank=2))]}
  leaves = {"up/w": stacked["w"], "up/b": stacked["b"]}
  assert "up/b" in projected(leaves, **ruled)


def test_a_state_of_another_rank_is_refused():
  params = {"up": jnp.zeros((16, 24)), "down": jnp.zeros((24, 16))}
  state = galore(optax.adam(1.0), rank=4).init(params)
  other = galore(optax.adam(1.0), rank=8)
  with pytest.raises(
    ValueError, match=r"'(up|down)' has rank 4, but .* rank 8"
  ):
    other.update(params, state, params)
  ruled = galore(optax.adam(1.0), rank=4, rules=[("up", Projection(rank=0.5))])
  with pytest.raises(ValueError, match=r"'up' has rank 4, but .* rank 8"):
    ruled.update(params, state, params)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_leaves_of_too_few_bits_are_refused_by_name(dtype):
  leaf = jax.ShapeDtypeStruct((64, 64), dtype)
  with pytest.raises(TypeError, match=f"'up/kernel' is {dtype}.*16 bits"):
    projected({"up/kernel": leaf}, rank=4)


def test_first_matching_rule_decides():
  params = arrays(q=(32, 48), k=(32, 48), up=(32, 48), lm_head=(32, 99))
  rules = [
    ("^q$", Projection(rank=2, proj_type="right")),
    ("^q$|^up$", None),
    ("lm_head", Projection(rank=0.25)),
  ]
  assert projected(params, rank=4, rules=rules) == {
    "k": {"left": (32, 4)},
    "lm_head": {"left": (32, 8)},
    "q": {"right": (48, 2)},
  }


def test_rules_may_be_an_iterator():
  rules = zip(["q", "k"], [None, Projection(rank=2)], strict=True)
  found = projected(arrays(q=(32, 48), k=(32, 48)), rank=4, rules=rules)
  assert found == {"k": {"left": (32, 2)}}


def test_rules_reach_gap_and_scale():
  params = {"a": jnp.zeros((8, 12)), "c": jnp.zeros((8, 12))}
  grads = jax.tree.map(jnp.ones_like, params)
  tx = galore(
    optax.identity(),
    rank=1,
    scale=1.0,
    rules=[("a", Projection(scale=3.0))],
  )
  updates, _ = tx.update(grads, tx.init(params), params)
  # A constant gradient has rank 1, so the projection loses nothing.
  np.testing.assert_allclose(updates["a"], 3.0, rtol=1e-5)
  np.testing.assert_allclose(updates["c"], 1.0, rtol=1e-5)


@pytest.mark.parametrize(
  ("proj_type", "wide", "tall"),
  [
    ("std", {"left": (8, 2)}, {"right": (8, 2)}),
    ("reverse_std", {"right": (20, 2)}, {"left": (20, 2)}),
    ("auto", {"right": (20, 2)}, {"left": (20, 2)}),
    ("left", {"left": (8, 2)}, {"left": (20, 2)}),
    ("right", {"right": (20, 2)}, {"right": (8, 2)}),
    ("full", {"left": (8, 2), "right": (20, 2)},
     {"left": (20, 2), "right": (8, 2)}),
  ],
)  # fmt: skip
def test_sides(proj_type, wide, tall):
  found = projected(
    arrays(wide=(8, 20), tall=(20, 8)), rank=2, proj_type=proj_type
  )
  assert found == {"wide": wide, "tall": tall}


@pytest.mark.filterwarnings("ignore:galore projects none")
def test_matrices_without_savings_are_projected_only_by_a_rule():
  params = arrays(w=(8, 8), x=(8, 8))
  assert not projected(params, rank=6)
  assert list(projected(params, rank=6, rules=[("x", Projection())])) == ["x"]


def test_axes():
  params = arrays(
    heads=(16, 4, 8), out=(4, 8, 16), conv=(3, 3, 8, 16), experts=(5, 16, 24)
  )
  rules = [
    ("heads", Projection(rows=0, cols=(1, 2))),
    ("out", Projection(rows=(0, 1), cols=2)),
    ("conv", Projection(rows=(0, 1, 2), cols=-1)),
  ]
  assert projected(params, rank=2, rules=rules) == {
    "conv": {"right": (16, 2)},
    "experts": {"left": (5, 16, 2)},
    "heads": {"left": (16, 2)},
    "out": {"right": (16, 2)},
  }


@FAST
@hypothesis.given(data=st.data())
def test_matrix_view_is_a_bijection(data):
  ndim = data.draw(st.integers(2, 5))
  shape = data.draw(st.tuples(*[st.integers(1, 4)] * ndim))
  order = data.draw(st.permutations(range(ndim)))
  cut = data.draw(st.integers(1, ndim - 1))
  end = data.draw(st.integers(cut + 1, ndim))
  view = matrix_view.matrix_view(shape, order[:cut], order[cut:end])
  x = np.arange(np.prod(shape)).reshape(shape)
  y = view.as_stack(x)
  assert y.shape == (*view.stack, view.m, view.n)
  assert view.m == np.prod([shape[i] for i in order[:cut]])
  np.testing.assert_array_equal(view.from_stack(y), x)


@FAST
@hypothesis.given(
  m=st.integers(2, 60),
  n=st.integers(2, 60),
  rank=st.integers(1, 60),
  proj_type=st.sampled_from(sides.PROJ_TYPES),
)
def test_state_has_the_computed_number_of_elements(m, n, rank, proj_type):
  params = arrays(w=(m, n))
  rules = [("w", Projection(rank=rank, proj_type=proj_type))]
  state = jax.eval_shape(galore(optax.adam(1.0), rules=rules).init, params)
  r, short, long = min(rank, m, n), min(m, n), max(m, n)
  rows, cols = m, n
  elements = {
    "std": short * r + 2 * long * r,
    "reverse_std": long * r + 2 * short * r,
    "left": rows * r + 2 * cols * r,
    "right": cols * r + 2 * rows * r,
    "full": (rows + cols) * r + 2 * r * r,
    "auto": long * r + 2 * short * r,
  }[proj_type]
  counters = 2 * 4
  assert state_bytes(state) == 4 * elements + counters


def llama_60m(stacked):
  shapes = trees.llama_tree(512, 1376, 8, 32000, stacked=stacked)
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


@pytest.mark.parametrize("stacked", [False, True])
def test_llama_60m_has_exactly_the_computed_state(stacked):
  params = llama_60m(stacked)
  full = 2 * 32000 * 512 + 512 + 2 * 8 * 512  # embedding, head, norms
  low = 8 * 128 * (4 * (512 + 2 * 512) + 3 * (512 + 2 * 1376))
  state = jax.eval_shape(galore(optax.adam(1.0), rank=128).init, params)
  matrices = sum(
    np.prod(next(iter(bases.values())).shape[:-2], dtype=int)
    for bases in state.projector.values()
  )
  assert matrices == 56
  assert state_bytes(state) == 4 * (2 * full + low) + 8


def test_auto_is_not_larger_than_contrib_on_the_same_leaves():
  params = llama_60m(stacked=False)
  ours = galore(optax.adamw(1.0), rank=128, proj_type="auto")
  theirs = trees.contrib_galore(128, 200)
  ours, theirs = (
    state_bytes(jax.eval_shape(tx.init, params)) for tx in (ours, theirs)
  )
  assert ours <= theirs


@pytest.mark.parametrize(
  ("rank", "expected"),
  [(5, 5), (99, 32), (0.25, 8), (1.0, 32), (0.001, 1), (np.int64(3), 3)],
)
def test_ranks(rank, expected):
  shape = projected(arrays(w=(32, 48)), rules=[("w", Projection(rank=rank))])
  assert shape == {"w": {"left": (32, expected)}}


def test_two_leaves_with_the_same_path_are_refused():
  with pytest.raises(ValueError, match="Two leaves have the path 'a/b'"):
    paths.leaves_by_path({"a/b": 1.0, "a": {"b": 2.0}})


def test_a_layer_of_a_partitioned_stack_has_the_partition_of_its_matrix():
  view = matrix_view.matrix_view((16, 32))
  assert view is not None
  assert view.spec((None, "fsdp", None)) == view.spec(("fsdp", None))
  assert view.spec((None, "fsdp", None)) == ("fsdp", None)


def test_paths_of_bare_arrays_and_sequences():
  assert list(paths.leaves_by_path(jnp.ones(2))) == ["param"]
  assert list(paths.leaves_by_path([1.0, {"a": (2.0,)}])) == ["0", "1/a/0"]
