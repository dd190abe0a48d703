"""Updates inside the backward pass have the results of the usual step."""

import collections
import functools
import re
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  Adaptive,
  Layered,
  Projection,
  Refresh,
  apply_updates,
  dequantize_params,
  describe,
  galore,
  galore_adamw,
  layerwise,
  q_galore_adamw_8bit,
  quantize_params,
  quantized_shardings,
  stack,
  state_bytes,
  state_shardings,
  unstack,
)
from tests.marks import slow

LAYERS, WIDTH, VOCAB, STEPS = 3, 8, 24, 30
SHAPES = {
  "embed": (VOCAB, WIDTH),
  "head": (WIDTH, VOCAB),
  "layers": {
    "experts": (LAYERS, 2, WIDTH, 12),
    "mix": [(LAYERS, WIDTH, WIDTH), (LAYERS, WIDTH, WIDTH)],
    "scale": (LAYERS, WIDTH),
  },
}


def _layer(w, x):
  x = x + jnp.tanh(x * w["scale"] @ w["mix"][0]) @ w["mix"][1]
  hidden = jnp.einsum("bm,emn->ben", x, w["experts"])
  return x + jnp.einsum("ben,emn->bm", jnp.tanh(hidden), w["experts"]) / 4


def _loss(logits, batch):
  chosen = jax.nn.log_softmax(logits.astype(jnp.float32))
  return -jnp.mean(jnp.take_along_axis(chosen, batch[:, 1:], axis=1))


MODEL = Layered(
  first=lambda params, batch: params["embed"][batch[:, 0]],
  layer=_layer,
  last=lambda params, x, batch: _loss(x @ params["head"], batch),
  first_keys=("embed",),
)


def parameters():
  rng = np.random.default_rng(0)
  normal = lambda shape: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)
  params = jax.tree.map(normal, SHAPES, is_leaf=lambda x: type(x) is tuple)
  params["layers"]["scale"] += 1
  return params


def batches(steps=STEPS):
  """Pairs of a token and the next one, which is a function of it."""
  tokens = np.random.default_rng(1).integers(VOCAB, size=(steps, 16, 1))
  following = (tokens * 5 + 1) % VOCAB
  return jnp.asarray(np.concatenate([tokens, following], axis=-1))


def usual(tx, model):
  """The usual step, with the same signature."""

  def step(params, state, batch):
    wide = dequantize_params(params)
    loss, grads = jax.value_and_grad(model.loss)(wide, batch)
    updates, state = tx.update(grads, state, wide)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return apply_updates(params, updates, None), state, metrics

  return (lambda params: tx.init(dequantize_params(params))), step


def train(run, params, data):
  """Parameters, state and metrics after a step on each batch."""
  init, step = run

  def body(carry, batch):
    params, state, metrics = step(*carry, batch)
    return (params, state), metrics

  train = jax.jit(lambda c: jax.lax.scan(body, c, data))
  (params, state), metrics = train((params, jax.jit(init)(params)))
  return params, state, metrics


def assert_equal(found, wanted, atol=1e-6):
  """Parameters and metrics; the state has another structure."""
  for x, y in zip(found[::2], wanted[::2], strict=True):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), x, y)
  losses = found[2]["loss"]
  assert losses[-1] < losses[0]


RATE = optax.linear_schedule(2e-2, 2e-3, STEPS)
SETTINGS = {"rank": 2, "update_proj_gap": 12, "scale": 1.0}
DECAYED = {
  "embed": False,
  "head": True,
  "layers": {"experts": True, "mix": [False, True], "scale": False},
}


def _named(tree):
  """A mask by path, not by number of axes."""
  return jax.tree_util.tree_map_with_path(
    lambda keys, _: "scale" not in jax.tree_util.keystr(keys), tree
  )


def _galore_adamw(**options):
  return galore_adamw(
    RATE, weight_decay=0.1, mask=DECAYED, **SETTINGS, **options
  )


OPTIMIZERS = {
  "galore": lambda: _galore_adamw(
    rules=[("head$", None), ("mix", Projection(rank=3)), ("embed", None)]
  ),
  "q_galore": lambda: q_galore_adamw_8bit(
    RATE,
    **SETTINGS,
    min_size=0,
    refresh=Refresh(adaptive=Adaptive(window=2, limit=2.0)),
  ),
  "sgd": lambda: optax.chain(
    optax.add_decayed_weights(0.01, _named), optax.sgd(0.05, 0.9)
  ),
}


@pytest.mark.parametrize("name", ["galore", "sgd"])
def test_equals_the_usual_step(name):
  """Also with two leaves of one name, and with stacks inside a layer."""
  found = train(layerwise(OPTIMIZERS[name](), MODEL), parameters(), batches())
  wanted = train(usual(OPTIMIZERS[name](), MODEL), parameters(), batches())
  assert_equal(found, wanted)


# A smaller model for the other tests, each of which compiles its own step.
SMALL = {name: SHAPES[name] for name in ("embed", "head")}
SMALL |= {"layers": {"w": (LAYERS, WIDTH, WIDTH)}}
PLAIN = MODEL._replace(layer=lambda w, x: x + jnp.tanh(x @ w["w"]))


def small(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  normal = lambda shape: jnp.asarray(0.3 * rng.normal(size=shape), dtype)
  return jax.tree.map(normal, SMALL, is_leaf=lambda x: type(x) is tuple)


def _tx(**options):
  inner = optax.adamw(RATE, weight_decay=0.1)
  return galore(inner, rank=2, update_proj_gap=4, **options)


@functools.cache
def by_q_galore():
  """The usual step with bases and moments in 4 and 8 bits."""
  return train(usual(OPTIMIZERS["q_galore"](), PLAIN), small(), batches())


def test_equals_the_usual_step_in_few_bits():
  found = train(layerwise(OPTIMIZERS["q_galore"](), PLAIN), small(), batches())
  assert_equal(found, by_q_galore())


def test_each_layer_draws_its_own_noise():
  """With optimizers of Optax whose state has a typed key."""
  noise = optax.add_noise(1.0, 0.0, jax.random.key(0))
  run = layerwise(optax.chain(noise, optax.scale(-1.0)), MODEL)
  params = jax.tree.map(jnp.zeros_like, parameters())
  state = jax.jit(run.init)(params)
  new, state, _ = jax.jit(run.step)(params, state, batches(1)[0])
  again, *_ = jax.jit(run.step)(new, state, batches(1)[0])
  mix = np.asarray(new["layers"]["mix"])
  assert mix.std() > 0.5 and len(mix) > 1
  assert abs(mix[0] - mix[1]).max() > 0.1
  assert abs(np.asarray(again["layers"]["mix"]) - 2 * mix).max() > 0.1


def test_clipping_by_the_norm_of_all_gradients():
  clip = optax.clip_by_global_norm(0.8)
  found = train(layerwise(_tx(), PLAIN, clip_norm=0.8), small(), batches())
  wanted = train(usual(optax.chain(clip, _tx()), PLAIN), small(), batches())
  assert_equal(found, wanted)
  norms = found[2]["grad_norm"]
  assert norms.min() < 0.8 < norms.max()


def test_accumulation():
  """Schedules and decay count whole steps; between them nothing changes."""
  tx = _tx(accumulation_steps=3)
  found = train(layerwise(tx, PLAIN), small(), batches())
  assert_equal(found, train(usual(tx, PLAIN), small(), batches()))
  assert found[1].count == STEPS
  np.testing.assert_array_equal(found[1].layers.step, [STEPS // 3] * LAYERS)
  two, _, _ = train(layerwise(tx, PLAIN), small(), batches(2))
  jax.tree.map(np.testing.assert_array_equal, two, small())


TIED = PLAIN._replace(
  last=lambda params, x, batch: _loss(
    x @ params["embed"].T + params["head"][0], batch
  )
)


@pytest.mark.parametrize(
  ("model", "chunks"),
  [
    slow(TIED, None),
    (TIED._replace(first_keys=None), {"embed": 4}),
    (PLAIN._replace(last_keys=("head",)), {"head": 2}),
  ],
  ids=["tied", "tied, in chunks", "apart, in chunks"],
)
def test_embeddings_that_both_ends_read(model, chunks):
  tx = optax.adamw(RATE, weight_decay=0.1)
  run = layerwise(tx, model, chunks=chunks)
  found = train(run, small(), batches())
  assert_equal(found, train(usual(tx, model), small(), batches()))
  for path in chunks or {}:
    for end in (found[1].first, found[1].last):
      mu = optax.tree.get(end.whole, "mu")
      assert isinstance(mu[path], optax.MaskedNode)


def test_inputs_of_layers_may_be_trees_with_numbers_and_masks():
  """With bfloat16 weights, and a layer that is rematerialised."""

  @jax.checkpoint
  def layer(w, x):
    new = PLAIN.layer(w, x["h"])
    return {**x, "h": jnp.where(x["keep"][:, None], new, x["h"])}

  def first(params, batch):
    word = batch[:, 0]
    return {"h": params["embed"][word], "keep": word > 3, "word": word}

  last = lambda params, x, batch: PLAIN.last(params, x["h"], batch)
  model = PLAIN._replace(first=first, layer=layer, last=last)
  params = small(jnp.bfloat16)
  found = train(layerwise(_tx(), model, clip_norm=5.0), params, batches())
  wanted = train(usual(_tx(), model), params, batches())
  assert jax.tree.map(jnp.result_type, found[0]) == jax.tree.map(
    jnp.result_type, params
  )
  assert {x.dtype.name for x in found[2].values()} == {"float32"}
  np.testing.assert_allclose(found[2]["loss"], wanted[2]["loss"], rtol=0.02)
  assert found[2]["loss"][-1] < 0.8 * found[2]["loss"][0]


RULES = ("layers/w", "head")


def test_quantized_weights_rounded_to_the_nearest():
  """Codes are those of the usual step, except near the middle of two levels."""
  params = quantize_params(small(), RULES)
  tx = _tx(scale=4.0)
  run = layerwise(tx, PLAIN, stochastic_rounding=False)
  found = train(run, params, batches(6))
  wanted = train(usual(tx, PLAIN), params, batches(6))
  for path in ("layers", "head"):
    x, y = (jax.tree.leaves(tree[0][path])[0] for tree in (found, wanted))
    assert x.dtype == jnp.int8
    assert np.mean(x != y) < 0.01
    assert np.abs(np.int32(x) - np.int32(y)).max() <= 1
  np.testing.assert_allclose(found[2]["loss"], wanted[2]["loss"], rtol=1e-3)


@functools.cache
def small_weights():
  """Quantized weights, bases and moments together."""
  tx = q_galore_adamw_8bit(RATE, **SETTINGS, min_size=0)
  run = layerwise(tx, PLAIN, clip_norm=5.0, seed=3)
  return run, train(run, quantize_params(small(), RULES), batches())


def test_quantized_weights_rounded_at_random():
  _, (params, _, metrics) = small_weights()
  assert metrics["loss"][-5:].mean() < 0.7 * metrics["loss"][0]
  wide = by_q_galore()
  np.testing.assert_allclose(
    metrics["loss"][-5:].mean(), wide[2]["loss"][-5:].mean(), rtol=0.1
  )
  assert params["layers"]["w"].codes.dtype == jnp.int8


def test_describe_and_bytes():
  """They are those of the usual optimizer, whose state has the same leaves."""
  run, (params, state, _) = small_weights()
  table = describe(run, params)
  assert table.total_bytes == state_bytes(state)
  rows = {row.path: row for row in table.rows}
  assert rows["layers/w"].rank == 2
  assert rows["layers/w"].matrix == f"{LAYERS} x (8, 8)"
  assert rows["layers/w"].adam_bytes == 2 * 4 * LAYERS * 64
  owned = sum(row.state_bytes for row in table.rows)
  assert 0 < table.total_bytes - owned < 100


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_gradient_anywhere_stops_a_clipped_step(bad):
  """The global norm is not finite, and is known before the first update."""

  @jax.custom_vjp
  def spoil(x):
    return x

  # Only the first end, which comes last, has a bad gradient.
  spoil.defvjp(lambda x: (x, None), lambda _, g: (g * bad,))
  broken = PLAIN._replace(
    first=lambda params, batch: spoil(params["embed"])[batch[:, 0]]
  )
  params = small()
  init, step = layerwise(_tx(), broken, clip_norm=0.8)
  state = init(params)
  new, after, metrics = jax.jit(step)(params, state, batches(1)[0])
  assert not np.isfinite(metrics["grad_norm"])
  jax.tree.map(np.testing.assert_array_equal, new, params)
  jax.tree.map(
    np.testing.assert_array_equal,
    *(optax.tree.get(x.last, "mu") for x in (after, state)),
  )


def test_weights_in_float8_are_rounded_to_the_nearest():
  params = quantize_params(small(), RULES, kind="float8")
  init, step = layerwise(_tx(), PLAIN)
  new, _, metrics = jax.jit(step)(params, init(params), batches(1)[0])
  assert np.isfinite(metrics["loss"])
  old, new = (dequantize_params(x)["layers"]["w"] for x in (params, new))
  assert (old != new).any()


SPECS = {
  "embed": jax.P("fsdp", None),
  "head": jax.P(None, "fsdp"),
  "layers": {"w": jax.P(None, "fsdp", None)},
}


@pytest.mark.parametrize("quantized", [slow(False), True])
def test_mesh(quantized):
  """On eight devices, with the state sharded by `state_shardings`."""
  mesh = jax.make_mesh((8,), ("fsdp",), (jax.sharding.AxisType.Auto,))
  named = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), SPECS)
  params, run = small(), layerwise(_tx(), PLAIN, clip_norm=0.6)
  if quantized:
    params = quantize_params(params, RULES)
    run = layerwise(OPTIMIZERS["q_galore"](), PLAIN, stochastic_rounding=False)
  shardings = state_shardings(run, params, named)
  w = optax.tree.get(shardings.layers, "mu").low["layers/w"]
  specs = {x.spec for x in jax.tree.leaves(w)}
  if not quantized:
    basis = shardings.layers.projector["layers/w"]["left"]
    assert basis.spec == jax.P(None, "fsdp", None)
    assert specs <= {jax.P(None, None, None), jax.P()}
  wanted = train(run, params, batches(8))
  weights = quantized_shardings(params, named)
  init = jax.jit(run.init, out_shardings=shardings)
  step = jax.jit(
    run.step, out_shardings=(weights, shardings, None), donate_argnums=(0, 1)
  )
  found = jax.device_put(params, weights)
  state = init(found)
  text = step.lower(found, state, batches(1)[0]).compile().as_text()
  gathered = re.findall(r"\[([\d,]+)\]\S* all-gather\(", text)
  assert gathered and f"{LAYERS},{WIDTH},{WIDTH}" not in gathered  # all layers
  assert jax.tree.map(lambda x: x.sharding, state) == shardings
  for batch in batches(8):
    found, state, metrics = step(found, state, batch)
  assert jax.tree.map(lambda x: x.sharding, found) == weights
  np.testing.assert_allclose(
    metrics["loss"], wanted[2]["loss"][-1], rtol=1e-3 if quantized else 1e-5
  )
  if not quantized:
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
      jax.device_get(found),
      wanted[0],
    )


def test_donation():
  """Donated buffers are not copied, and there is no warning about them."""
  run = layerwise(_tx(), PLAIN)
  params = small()
  state = jax.jit(run.init)(params)
  step = jax.jit(run.step, donate_argnums=(0, 1))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    new, _, _ = step(params, state, batches(1)[0])
  assert params["layers"]["w"].is_deleted()
  assert state.layers.projector["layers/w"]["left"].is_deleted()
  assert new["layers"]["w"].shape == (LAYERS, WIDTH, WIDTH)


def test_single_layers_have_the_same_loss_and_gradients():
  params, batch = small(), batches(1)[0]
  apart = unstack(params)
  assert len(apart["layers"]) == LAYERS
  jax.tree.map(np.testing.assert_array_equal, stack(apart), params)
  wanted, grads = jax.value_and_grad(PLAIN.loss)(params, batch)
  found, parts = jax.value_and_grad(PLAIN.loss)(apart, batch)
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
    stack(parts),
    grads,
  )


class Parts(NamedTuple):
  """A container of a layer's parameters that is no dict."""

  up: Any
  down: Any


@pytest.mark.parametrize("make", [lambda a, b: (a, b), Parts])
def test_a_stack_may_be_a_tuple_of_arrays(make):
  rng = np.random.default_rng(0)
  weights = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  model = Layered(
    first=lambda params, x: x @ params["embed"],
    layer=lambda w, x: x + jnp.tanh(x @ w[0]) @ w[1],
    last=lambda params, x, batch: jnp.mean(x**2),
  )
  params = {
    "embed": weights(4, 4),
    "layers": make(weights(3, 4, 4), weights(3, 4, 4)),
  }
  run, batch = layerwise(optax.sgd(1e-3), model), weights(2, 4)
  _, _, metrics = run.step(params, run.init(params), batch)
  wanted = batch @ params["embed"]
  for up, down in zip(*params["layers"], strict=True):
    wanted = wanted + jnp.tanh(wanted @ up) @ down
  wanted = jnp.mean(wanted**2)
  np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-5)
  np.testing.assert_allclose(model.loss(params, batch), wanted, rtol=1e-5)
  apart = unstack(params)
  np.testing.assert_allclose(model.loss(apart, batch), wanted, rtol=1e-5)


def test_only_plain_dicts_hold_a_stack():
  run = layerwise(optax.sgd(1.0), PLAIN)
  with pytest.raises(ValueError, match=r"must be a dict.*OrderedDict"):
    run.init(collections.OrderedDict(small()))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"layers": {}}, r"`params\['layers'\]` has no leaves"),
    ({"layers": {"w": jnp.ones(())}}, r"same leading layer axis.*'w': \(\)"),
    ({"layers": {"v": jnp.ones((2, 8)), "w": jnp.ones((3, 8, 8))}},
     r"same leading layer axis.*\(2,\).*\(3,\)"),
    ({"layers": [{"w": jnp.ones((8, 8))}] * 3}, r"list of single.*`galore_op"),
    ({"layers": [jnp.ones((3, 8, 8))] * 2}, r"list of single.*a tuple"),
    ({"layers": quantize_params({"w": jnp.ones((3, 300))}, ("w",))},
     r"'w'.*quantized stack of vectors, of shape \(3, 300\)"),
  ],
)  # fmt: skip
def test_parameters_without_a_stack(changes, message):
  run = layerwise(optax.sgd(1.0), PLAIN)
  with pytest.raises(ValueError, match=message):
    run.init({**small(), **changes})
  with pytest.raises(ValueError, match=message):
    run.step({**small(), **changes}, None, batches(1)[0])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"key": "blocks"}, r"stacked layers at 'blocks', got.*'layers'"),
    ({"first_keys": ("embedding",)},
     r"`first_keys` names 'embedding'.*'embed', 'head'"),
    ({"last_keys": ("layers",)}, r"`last_keys` names 'layers'.*'embed'"),
  ],
)  # fmt: skip
def test_models_that_do_not_fit(changes, message):
  with pytest.raises(ValueError, match=message):
    layerwise(optax.sgd(1.0), PLAIN._replace(**changes)).init(small())


@pytest.mark.parametrize(
  ("options", "error", "message"),
  [
    ({"tx": 0.1}, TypeError, r"`tx` must be a gradient transf.*got 0\.1"),
    ({"clip_norm": 0.0}, ValueError, r"`clip_norm` must be positive, got 0"),
    ({"clip_norm": "1"}, TypeError, r"`clip_norm` must be a number"),
    ({"chunks": {"w": 2}}, ValueError, r"`chunks` names 'w'.*'embed', 'head'|"
     r"`chunks` names 'w'.*embed, head"),
    ({"chunks": {"embed": 5}}, ValueError, r"shape \(24, 8\) into 5"),
    ({"model": PLAIN._replace(first_keys=("embed",), last_keys=())}, ValueError,
     r"'head' of the parameters is in neither `first_keys` nor `last_keys`"),
  ],
)  # fmt: skip
def test_errors(options, error, message):
  with pytest.raises(error, match=message):
    given = {"tx": optax.sgd(1.0), "model": PLAIN} | options
    layerwise(**given).init(small())


def test_quantized_leaves_cannot_be_chunked():
  params = quantize_params(small(), ("head",))
  run = layerwise(optax.sgd(1.0), PLAIN, chunks={"head": 2})
  with pytest.raises(ValueError, match="divides 'head', which is quantized"):
    run.init(params)
