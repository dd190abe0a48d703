"""The fused step of the LLaMA against the usual one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.marks import moves_arrays
from tests.train.conftest import EXPERTS, QWEN, TINY, weights
from train.common.errors import UserError
from train.config import presets, schema
from train.models import llama
from train.parallel import mesh as mesh_lib
from train.step import losses as losses_lib
from train.step import optimizer, per_layer, train_step
from train.step import state as state_lib

STEPS = 6

# Layer by layer or not. That the usual step does the same is tested without the
# model as well, in test_train_step.py and in tests/core.
WAYS = [pytest.param(False, marks=pytest.mark.slow), True]


def _run(rows, name="galore", devices=1, parts=1, **changes):
  """Losses and final weights of a few steps."""
  settings = {"weights": "full", "layerwise": False, "clip": 0.0}
  settings |= changes
  model = dataclasses.replace(
    settings.get("model", TINY),
    weights=settings["weights"],
    tie_embeddings=settings.get("tied", False),
  )
  config = schema.Config(
    "test",
    model=model,
    data=schema.DataConfig(length=16, batch=8),
    optimizer=schema.OptimizerConfig(
      name=name,
      rank=8,
      update_proj_gap=3,
      clip=settings["clip"],
      scale=settings.get("scale", 0.25),
      accumulate=parts,
    ),
    train=schema.TrainConfig(
      layerwise=settings["layerwise"], z_loss=1e-3, steps=STEPS
    ),
    mesh=schema.MeshConfig(data=1, fsdp=devices),
  )
  where = mesh_lib.make_mesh(
    config.mesh, 8, accumulate=parts, devices=jax.devices()[:devices]
  )
  tx = optimizer.make_optimizer(config.optimizer, STEPS)
  if settings["layerwise"]:
    shapes = jax.eval_shape(lambda: llama.init(model, 0))
    tx = per_layer.fuse(tx, model, config.train, shapes)
  with jax.set_mesh(where):
    abstract = state_lib.abstract_state(
      model, *llama.abstract(model), tx, where
    )
    if settings.get("offload"):
      abstract = state_lib.offload(abstract)
    state = state_lib.init_state(tx, abstract, 0, weights(model))
    train = train_step.make_train_step(tx, abstract, config.train, parts)
    losses = []
    for _ in range(STEPS):
      state, values = train(
        state, mesh_lib.put_batch(rows, mesh_lib.batch_sharding(where))
      )
      losses.append(float(values["loss"]))
    evaluate = losses_lib.make_eval_step(abstract)
    total, count = evaluate(state.params, rows)
  final = jax.device_get(abstract.read(state.params))
  return np.array(losses), final, float(total) / int(count)


@pytest.fixture(scope="module")
def batch(rows):
  return np.asarray(rows, np.int32)


@pytest.fixture(scope="module")
def usual(batch):
  return _run(batch)


def _assert_same(found, wanted, tolerance, of_weights=None):
  np.testing.assert_allclose(found[0], wanted[0], rtol=tolerance)
  atol = of_weights or tolerance
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=atol),
    found[1],
    wanted[1],
  )


# On four devices the code is that of one, and more.
@pytest.mark.parametrize(
  "devices", [pytest.param(1, marks=pytest.mark.slow), 4]
)
def test_layer_by_layer_is_the_usual_step(batch, usual, devices):
  """With refreshes in it, and the z-loss."""
  found = _run(batch, layerwise=True, devices=devices)
  _assert_same(found, usual, 2e-6 if devices == 1 else 1e-5)
  assert found[2] == pytest.approx(usual[2], rel=1e-5)


@moves_arrays
def test_on_a_mesh_the_state_may_be_in_host_memory(batch, usual):
  found = _run(batch, layerwise=True, devices=4, offload=True)
  _assert_same(found, usual, 1e-5)


def test_only_updates_layer_by_layer_have_their_state_in_host_memory():
  config = presets.make("sotu_small", "galore")
  with pytest.raises(UserError, match=r"mesh\.offload.*--layerwise"):
    schema.override(config, ["mesh.offload=optimizer"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["racs", "foam", "alice"])
def test_rivals_layer_by_layer_take_the_usual_step(batch, name):
  found = _run(batch, name=name, layerwise=True, devices=4)
  _assert_same(found, _run(batch, name=name), 1e-5)


@pytest.mark.slow
def test_tied_embeddings(batch):
  """Whose gradient has two parts, added in another order: on some CPUs Adam
  scales that rounding up to a few millionths of a weight."""
  wanted = _run(batch, tied=True)
  found = _run(batch, tied=True, layerwise=True)
  _assert_same(found, wanted, 2e-6, of_weights=1e-5)


def test_layers_that_differ_are_walked_as_they_are(batch):
  """In the sequence of their numbers, also on the way back."""
  params = weights(QWEN)
  graphdef, _ = llama.abstract(QWEN)
  walked = per_layer.layered(QWEN, schema.TrainConfig())
  loss = lambda p: walked.loss(p, batch)[0]
  usual = lambda p: losses_lib.token_losses(graphdef, p, batch).mean()

  @jax.jit
  def both(params):
    return jax.value_and_grad(loss)(params), jax.value_and_grad(usual)(params)

  found, wanted = both(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, wanted
  )


def test_experts_are_balanced_layer_by_layer(batch):
  """With padding, which does not count."""
  config = schema.TrainConfig()
  walked = per_layer.layered(EXPERTS, config)
  structure = state_lib.AbstractState(
    EXPERTS, llama.abstract(EXPERTS)[0], *(None,) * 4
  )
  usual = losses_lib.next_token_loss(structure, config)
  padded = jnp.asarray(batch).at[0, 9:].set(losses_lib.PADDING)

  @jax.jit
  def both(params):
    found = jax.value_and_grad(walked.loss, has_aux=True)(params, padded)
    share = lambda p: usual.share(p, *usual.of(padded, 0))
    return found, jax.value_and_grad(share, has_aux=True)(params)

  found, wanted = both(weights(EXPERTS))
  (loss, alone), _ = wanted
  assert loss > alone + EXPERTS.router_aux_loss_coef  # it has a penalty
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, wanted
  )


@pytest.mark.slow
@pytest.mark.parametrize("model", [QWEN, EXPERTS], ids=["differ", "experts"])
def test_parts_of_other_families(batch, model):
  wanted = _run(batch, model=model)
  found = _run(batch, model=model, layerwise=True)
  _assert_same(found, wanted, 2e-6, of_weights=1e-5)


@pytest.mark.parametrize(
  ("rows", "count"),
  [(32000, 32), (32768, 32), (32001, 3), (32003, None), (50257, 29)],
)
def test_no_vocabulary_goes_in_very_many_chunks(rows, count):
  table = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)
  found = per_layer.chunks({"embed": {"embedding": table}})
  assert found == ({"embed/embedding": count} if count else {})


def test_embeddings_and_logits_go_in_chunks(batch, usual, monkeypatch):
  monkeypatch.setattr(per_layer, "CHUNK", 1000)
  monkeypatch.setattr(per_layer, "LOSS_CHUNK", 24)
  _assert_same(_run(batch, layerwise=True), usual, 2e-6, of_weights=1e-3)


def test_on_a_mesh_every_device_has_its_part_of_a_chunk():
  assert per_layer._loss_chunks(16, 2048) == 32
  mesh = jax.make_mesh((8,), ("fsdp",), (jax.sharding.AxisType.Auto,))
  with jax.set_mesh(mesh):
    assert per_layer._loss_chunks(16, 2048) == 4


@pytest.mark.slow
def test_padding_does_not_count(batch):
  padded = batch.copy()
  padded[1:4, 9:] = losses_lib.PADDING
  _assert_same(_run(padded, layerwise=True), _run(padded), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layerwise", [False, True])
def test_parts_of_a_batch_add_up_at_low_rank(batch, usual, layerwise):
  """Equal rows: every part has the batch's gradient.

  Up to rounding, which Adam scales up where a gradient is nearly zero.
  """
  same = np.repeat(batch[:1], 8, axis=0)
  found = _run(same, parts=2, layerwise=layerwise)
  _assert_same(found, _run(same), 5e-6, of_weights=1e-3)


@pytest.mark.parametrize("layerwise", WAYS)
def test_weights_in_eight_bits_learn(batch, layerwise):
  """They are stored as codes, and the loss falls as with q_galore it should."""
  losses, _, held = _run(
    batch, name="q_galore", weights="int8", layerwise=layerwise
  )
  assert losses[-1] < losses[0] - 0.5
  assert held == pytest.approx(losses[-1], abs=0.6)


@pytest.mark.parametrize(
  ("name", "weights", "scale"),
  [
    pytest.param("q_apollo_mini", "int8", 128.0, marks=pytest.mark.slow),
    ("sumo", "full", 0.2),
  ],
)
def test_other_methods_learn_layer_by_layer(batch, name, weights, scale):
  losses, _, held = _run(
    batch, name=name, weights=weights, layerwise=True, scale=scale
  )
  assert losses[-1] < losses[0] - 0.5
  assert held == pytest.approx(losses[-1], abs=0.6)


@pytest.mark.parametrize("name", ["sotu_small", "llama_7b"])
def test_apollo_mini_in_eight_bits_has_apollo_mini_s_rates(name):
  """Apart from the weights' format it is the same recipe."""
  config = presets.make(name, "q_apollo_mini")
  assert config.model.weights == "int8"
  like = presets.make(name, "apollo_mini").optimizer
  assert dataclasses.replace(config.optimizer, name="apollo_mini") == like


def test_codes_are_what_is_kept(batch):
  model = dataclasses.replace(TINY, weights="int8")
  tx = optimizer.make_optimizer(schema.OptimizerConfig(rank=8), STEPS)
  where = mesh_lib.make_mesh(
    schema.MeshConfig(data=1), 8, devices=jax.devices()[:1]
  )
  abstract = state_lib.abstract_state(model, *llama.abstract(model), tx, where)
  kernel = abstract.state.params["layers"]["attn"]["q"]["kernel"]
  assert kernel.codes.dtype == jnp.int8
  assert abstract.state.params["embed"]["embedding"].dtype == jnp.float32


@pytest.mark.parametrize(
  ("settings", "fragment"),
  [
    (["train.layerwise=true", "train.accumulate=2"], "optimizer.accumulate"),
    (["train.accumulate=2", "optimizer.accumulate=2"], "one of them"),
  ],
)
def test_two_ways_to_accumulate_are_refused(settings, fragment):
  with pytest.raises(UserError, match=fragment):
    schema.override(presets.make("sotu_small", "galore"), settings)


def test_only_galore_adds_up_at_low_rank():
  with pytest.raises(UserError, match=r"train\.accumulate"):
    optimizer.make_optimizer(
      schema.OptimizerConfig(name="adamw", accumulate=2), STEPS
    )
