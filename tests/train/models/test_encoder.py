import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_optax
from tests.marks import slow
from train.common.errors import UserError
from train.config.schema import MeshConfig
from train.methods import leaves
from train.models import attention, encoder
from train.parallel import mesh

BERT = encoder.Config(60, 16, 24, 2, 4, max_length=16, head="classify")
ROBERTA = dataclasses.replace(
  BERT, family="roberta", position_offset=2, n_types=1, pad_id=1
)
FAMILIES = {"bert": BERT, "roberta": ROBERTA}
IDS = jnp.arange(2, 20).reshape(2, 9)  # all tokens differ
MASK = jnp.array([[1] * 9, [1] * 5 + [0] * 4])
KEY = jax.random.key(3)
HOW = ("remat", "unroll")
RATES = ("dropout", "attention_dropout", "head_dropout")
CLASSIFY = jax.jit(encoder.classify, static_argnums=0)


@functools.cache
def structure(config):
  return encoder.abstract(config)[0]


@functools.cache
def large(config):
  """Parameters that are large enough to tell tokens apart."""
  params = jax.jit(encoder.init, static_argnums=(0, 1))(config, 0)
  return jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)


def params_of(config):
  """The same parameters for all configs of one shape."""
  same = {name: getattr(BERT, name) for name in ("pool", "dtype", *HOW, *RATES)}
  return large(dataclasses.replace(config, **same))


def classify(config, params=None, ids=IDS, mask=MASK, types=None, key=None):
  params = params or params_of(config)
  return CLASSIFY(structure(config), params, ids, mask, types, key)


def reach(config, function):
  """The largest derivative of each output of row 1 by each of its tokens."""
  graphdef, params = structure(config), params_of(config)

  def outputs(table):
    changed = params | {
      "embed": params["embed"] | {"words": {"embedding": table}}
    }
    return function(graphdef, changed, IDS, MASK)

  table = params["embed"]["words"]["embedding"]
  jacobian = jax.jit(jax.jacrev(outputs))(table)
  return np.abs(jacobian[:, IDS[1]]).max(axis=-1)  # (outputs, tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_attend_to_each_other_and_not_to_padding(family):
  config = dataclasses.replace(FAMILIES[family], head="none")

  def squares(*args):
    return (encoder.hidden(*args)[1, :, :7] ** 2).sum(axis=-1)

  found = reach(config, squares)
  assert (found[:5, :5] > 1e-6).all()
  assert (found[:5, 5:] == 0).all()


@pytest.mark.parametrize("pool", [slow("first"), "mean"])
def test_logits_depend_on_all_tokens_and_not_on_padding(pool):
  config = dataclasses.replace(BERT, pool=pool)
  found = reach(config, lambda *args: encoder.classify(*args)[1])
  assert (found[:, :5] > 1e-6).all() and (found[:, 5:] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_the_logits(family):
  config = FAMILIES[family]
  short = classify(config, ids=IDS[1:, :5], mask=MASK[1:, :5])
  np.testing.assert_allclose(classify(config)[1:], short, atol=1e-5)
  if family == "roberta":  # counts tokens, so they may begin anywhere
    shifted = [jnp.roll(x, 4, axis=1) for x in (IDS, MASK)]
    config = dataclasses.replace(config, pool="mean")
    left = classify(config, ids=shifted[0], mask=shifted[1])[1:]
    np.testing.assert_allclose(left, classify(config)[1:], atol=1e-5)


def test_a_row_of_padding_has_finite_gradients():
  config = dataclasses.replace(ROBERTA, pool="mean")
  mask = MASK.at[1].set(0)
  found = jax.grad(lambda p: classify(config, p, mask=mask).sum())(
    params_of(config)
  )
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_token_types_change_the_logits():
  types = jnp.zeros_like(IDS).at[:, 4:].set(1)
  plain, typed = classify(BERT), classify(BERT, types=types)
  assert np.abs(plain - typed).min() > 1e-3
  zeros = classify(BERT, types=jnp.zeros_like(IDS))
  np.testing.assert_array_equal(plain, zeros)


@functools.cache
def gradient(config):
  """The gradient of the logits' squares, with dropout."""
  loss = lambda p: (classify(config, p, key=KEY) ** 2).sum()
  return jax.jit(jax.grad(loss))(params_of(config))


@pytest.mark.parametrize(
  "how",
  [
    pytest.param({"remat": "full"}, marks=pytest.mark.slow),
    {"remat": "dots"},
    pytest.param({"unroll": 2}, marks=pytest.mark.slow),
  ],
)
def test_remat_and_unroll_do_not_change_the_gradient(how):
  """Nor the dropout masks."""
  plain, other = gradient(BERT), gradient(dataclasses.replace(BERT, **how))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3),
    plain,
    other,
  )


@pytest.mark.parametrize("rate", RATES)
def test_dropout_needs_a_key(rate):
  off = dict.fromkeys(RATES, 0.0)
  config = dataclasses.replace(BERT, **off | {rate: 0.5})
  plain = classify(config)
  np.testing.assert_array_equal(plain, classify(BERT))
  first, again = (classify(config, key=KEY) for _ in range(2))
  np.testing.assert_array_equal(first, again)
  other = classify(config, key=jax.random.key(4))
  for a, b in ((plain, first), (plain, other), (first, other)):
    assert np.abs(a - b).max() > 1e-3
  silent = dataclasses.replace(BERT, **off)
  np.testing.assert_allclose(classify(silent, key=KEY), plain, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_dtypes_are_as_in_the_config(family):
  config = FAMILIES[family]
  half = dataclasses.replace(config, dtype="bfloat16")
  full, low = classify(config), classify(half)
  assert low.dtype == jnp.float32
  assert 0 < np.abs(full - low).max() < 0.2
  stored = dataclasses.replace(half, param_dtype="bfloat16")
  params = jax.eval_shape(lambda: encoder.init(stored, 0))
  kinds = {x.dtype for x in jax.tree.leaves(params)}
  assert kinds == {jnp.dtype("bfloat16")}


def test_spans_have_a_start_and_an_end_for_each_position():
  config = dataclasses.replace(BERT, head="spans")
  run = jax.jit(encoder.spans, static_argnums=0)
  start, end = run(structure(config), params_of(config), IDS, MASK)
  assert start.shape == end.shape == IDS.shape
  assert start.dtype == jnp.float32
  assert np.abs(start - end).max() > 1e-2


def test_the_plan_projects_the_matrices_of_the_layers():
  params = jax.eval_shape(lambda: encoder.init(BERT, 0))
  chosen = leaves.block_matrices(params)
  tx = galore_optax.galore_adamw(1e-3, rank=4, rules=encoder.FULL_RANK)
  table = galore_optax.describe(tx, params)
  rows = [row.split() for row in str(table).splitlines()[2:-2]]
  projected = {row[0] for row in rows if "full rank" not in " ".join(row)}
  assert projected == {
    leaves.path_of(path)
    for path, is_chosen in jax.tree_util.tree_leaves_with_path(chosen)
    if is_chosen
  }
  assert projected == {
    *(f"layers/attn/{name}/kernel" for name in "qkvo"),
    *(f"layers/mlp/{name}/kernel" for name in ("up", "down")),
  }


def test_a_mesh_gives_the_same_logits():
  if jax.device_count() < 8:
    pytest.skip(f"needs 8 devices, found {jax.device_count()}")
  devices = mesh.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), batch=8)
  ids, mask = jnp.tile(IDS, (4, 1)), jnp.tile(MASK, (4, 1))
  graphdef, params = structure(BERT), params_of(BERT)
  expected = classify(BERT, ids=ids, mask=mask)
  boxes = encoder.abstract(BERT)[1]
  sharded = jax.device_put(params, mesh.param_shardings(boxes, devices))
  up = sharded["layers"]["mlp"]["up"]["kernel"]
  assert up.addressable_shards[0].data.size < up.size
  with jax.set_mesh(devices):
    batch = jax.device_put((ids, mask), mesh.batch_sharding(devices))
    found = CLASSIFY(graphdef, sharded, *batch)
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"n_heads": 3}, "16, which is not divisible by its n_heads, 3"),
    ({"labels": 0}, "labels is 0"),
    ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
  ],
)
def test_wrong_configs_are_refused(change, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(BERT, **change)


def test_cudnn_is_used_for_even_lengths_on_its_gpus(monkeypatch):
  config = dataclasses.replace(BERT, d_model=32, dtype="bfloat16")

  def chosen(length, **how):
    q = jax.ShapeDtypeStruct((1, length, 4, 8), jnp.bfloat16)
    return encoder._implementation(dataclasses.replace(config, **how), q)

  assert chosen(8) == "xla"  # no GPU here
  monkeypatch.setattr(attention, "target", lambda: ("gpu", "NVIDIA H100"))
  assert (chosen(8), chosen(9)) == ("cudnn", "xla")
  assert chosen(8, attention="xla") == "xla"
  with pytest.raises(UserError, match="an even length, not 9"):
    chosen(9, attention="cudnn")


def test_texts_longer_than_the_position_table_are_refused():
  ids = jnp.zeros((1, 17), int)
  with pytest.raises(UserError, match="have 17 tokens, but the model has 16"):
    classify(BERT, ids=ids, mask=jnp.ones_like(ids))
