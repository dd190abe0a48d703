"""Measurements of the subspaces of a tiny model while it trains."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

import galore_optax
from tests.marks import moves_arrays
from tests.train.conftest import QWEN, TINY, make_trainer
from train.common.errors import UserError
from train.config import schema
from train.models import llama
from train.run import subspace_watch
from train.step import losses as losses_lib
from train.step import optimizer, setup


@pytest.fixture(scope="module")
def whole(trainer):
  settings = schema.OptimizerConfig(rank=4, update_proj_gap=3)
  return schema.Config(
    preset="",
    model=TINY,
    optimizer=settings,
    run=schema.RunConfig(watch="attn.q.0,mlp.up.1", watch_every=3),
  )


def make_watcher(trainer, whole, **changes):
  run = dataclasses.replace(whole.run, **changes)
  plan = galore_optax.describe(trainer.tx, trainer.abstract.weights)
  built = setup.Setup(
    trainer.mesh, trainer.tx, trainer.tx, trainer.abstract, plan
  )
  return subspace_watch.Watcher(run, whole.optimizer, built)


@pytest.fixture(scope="module")
def measured(trainer, whole, rows):
  """Numbers of seven measured steps, with their exact gradients."""
  watcher = make_watcher(trainer, whole)
  state, found = trainer.init(), []
  with jax.set_mesh(trainer.mesh):
    batch = trainer.put(rows)
    loss = lambda p: losses_lib.token_losses(
      trainer.abstract.graphdef, p, batch
    ).sum()
    gradient = jax.jit(jax.grad(loss))
    for index in range(7):
      exact = jax.device_get(gradient(state.params))
      before = watcher.before(state, batch)
      state, _ = trainer.train_step(state, batch)
      values = watcher.values(jax.device_get(watcher.after(before, state)))
      found.append((index, exact, jax.device_get(before), values))
  return watcher, found


def test_the_gradients_are_those_of_the_step(measured):
  watcher, found = measured
  for _, exact, before, _ in found[:2]:
    for m in watcher.matrices:
      whole = exact
      for key in m.path.split("/"):
        whole = whole[key]
      np.testing.assert_allclose(
        before.gradients[m.name], whole[m.layer], rtol=1e-4, atol=1e-5
      )


def test_layers_that_differ_are_measured_as_they_are(whole, rows):
  small = make_trainer("galore", devices=1, model=QWEN)
  watcher = make_watcher(small, dataclasses.replace(whole, model=QWEN))
  state, rows = small.init(), np.asarray(rows)
  chosen = {
    m.name: subspace_watch._leaf(state.params, m.path)[m.layer]
    for m in watcher.matrices
  }
  found = jax.jit(watcher._loss)(chosen, state.params, rows)
  losses = jax.jit(losses_lib.token_losses, static_argnums=0)(
    small.abstract.graphdef, state.params, rows
  )
  assert float(found) == pytest.approx(float(losses.sum()), rel=1e-6)


def test_measurements_are_due_at_refreshes(measured):
  watcher, found = measured
  refreshed = [
    index
    for index, *_, values in found
    if any(name.endswith("/overlap") for name in values)
  ]
  due = [index for index, *_ in found if watcher.is_due(index)]
  # Two of the three steps of the gap are those of one of the two.
  assert refreshed == due == [0, 2, 3, 5, 6]


def test_numbers_are_those_of_numpy(measured):
  watcher, found = measured
  for _, _, before, values in found:
    for m in watcher.matrices:
      at, g = f"subspace/{m.name}/", before.gradients[m.name].astype(np.float64)
      squares = np.linalg.svd(g, compute_uv=False) ** 2
      rank = squares.sum() / squares[0]
      np.testing.assert_allclose(values[at + "stable_rank"], rank, rtol=1e-3)
      best = squares[:4].sum() / squares.sum()
      assert 0 < values[at + "energy"] <= best + 1e-5
  at = "subspace/mlp.up.1/"
  first, second = found[0][3], found[1][3]
  # At step 0 the new basis is far better than the start; then it is kept.
  assert first[at + "energy"] > 2 * first[at + "energy_before"]
  assert first[at + "overlap"] < 0.9
  assert at + "overlap" not in second and at + "energy" in second


@moves_arrays
def test_of_a_layer_by_layer_state_a_layers_bases_are_read():
  """Also where the state is in host memory."""
  model = galore_optax.Layered(
    first=lambda params, batch: batch,
    layer=lambda w, x: x + x @ w["kernel"],
    last=lambda params, x, batch: (x**2).mean(),
  )
  tx = galore_optax.galore(optax.adam(0.1), rank=8)
  kernels = jax.random.normal(jax.random.key(0), (3, 64, 64))
  init, step = galore_optax.layerwise(tx, model)
  params = {"layers": {"kernel": kernels}}
  _, state, _ = jax.jit(step)(params, init(params), jax.numpy.ones((4, 64)))
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  places = jax.tree.map(lambda x: here, state)
  moved = jax.device_put(state, galore_optax.host_shardings(state, places))
  wanted = galore_optax.find_bases(state)["layers/kernel"]["left"]
  assert len({x.tobytes() for x in np.asarray(wanted)}) == 3
  for layer in range(3):
    matrix = subspace_watch.Matrix("layers/kernel", layer, layer, 3)
    read = jax.jit(lambda x, m=matrix: subspace_watch._bases_of_layer(x, m))
    found = read(moved)["left"]
    np.testing.assert_array_equal(found, wanted[layer])
    assert found.sharding.memory_kind == "device"


def test_measurements_are_rare_by_default(trainer, whole):
  watcher = make_watcher(trainer, whole, watch_every=0)
  due = [t for t in range(1000) if watcher.is_due(t)]
  assert due[0] == 0 and 10 < len(due) <= 1000 / subspace_watch.RARE + 1


@pytest.mark.slow
def test_quantized_weights_are_measured_as_the_model_reads_them(whole, rows):
  model = dataclasses.replace(TINY, weights="int8")
  trainer = make_trainer("q_galore", devices=1, model=model)
  watcher = make_watcher(trainer, dataclasses.replace(whole, model=model))
  state = trainer.init()
  with jax.set_mesh(trainer.mesh):
    batch = trainer.put(rows)
    exact = jax.grad(
      lambda p: losses_lib.token_losses(
        trainer.abstract.graphdef, p, batch
      ).sum()
    )(trainer.abstract.read(state.params))
    exact = jax.device_get(exact["layers"]["mlp"]["up"]["kernel"][1])
    before = jax.device_get(watcher.before(state, batch))
    np.testing.assert_allclose(
      before.gradients["mlp.up.1"], exact, rtol=1e-4, atol=1e-5
    )
    state, _ = trainer.train_step(state, batch)
    values = watcher.values(jax.device_get(watcher.after(before, state)))
  at = "subspace/mlp.up.1/"
  assert values[at + "energy"] > 2 * values[at + "energy_before"]


@pytest.mark.filterwarnings("ignore:galore projects none")
@pytest.mark.parametrize(
  ("method", "fields", "why_not"),
  [
    ("galore", {"rank": 32}, "nothing is projected"),
    ("apollo", {}, "random projections"),
    ("contrib_galore", {}, "by name"),
  ],
)
def test_what_cannot_be_measured_has_a_reason(method, fields, why_not):
  chosen = schema.OptimizerConfig(name=method, **({"rank": 4} | fields))
  tx = optimizer.make_optimizer(chosen, 10)
  params = jax.eval_shape(lambda: llama.init(TINY, 0))
  plan = galore_optax.describe(tx, params)
  known, reason = subspace_watch.candidates(chosen, plan)
  assert not known and why_not in reason
  assert subspace_watch.choose("auto", known, reason) == []
  with pytest.raises(UserError, match=f"attn.q.0.*{why_not}"):
    subspace_watch.choose("attn.q.0", known, reason)


def test_names_choose_matrices(trainer, whole):
  names = lambda watch: [
    m.name for m in make_watcher(trainer, whole, watch=watch).matrices
  ]
  assert names("auto") == ["attn.q.0", "mlp.up.1", "mlp.down.1"]
  assert names("none") == []
  assert names("attn.[qk].1, mlp.gate.0") == [
    "attn.k.1", "attn.q.1", "mlp.gate.0",
  ]  # fmt: skip


@pytest.mark.parametrize(
  "watch, fragments",
  [
    ("attn.q.9", ["'attn.q.9'", "names like", "attn.k.0"]),
    ("attn.(q", ["not a regular expression"]),
    (".*", ["14 matrices", "at most 12"]),
  ],
)
def test_wrong_names_are_reported(watch, fragments, trainer, whole):
  with pytest.raises(UserError) as raised:
    make_watcher(trainer, whole, watch=watch)
  assert all(fragment in str(raised.value) for fragment in fragments), (
    raised.value
  )
