"""Training with LoRA and its variants: the step, the run, what is refused."""

import dataclasses
import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.conftest import TINY, weights
from train import hf, pretrain
from train.common.errors import UserError
from train.config import presets, schema
from train.estimate import dry_run, flops, state_table
from train.methods import leaves, registry
from train.models import llama
from train.parallel import mesh as mesh_lib
from train.pretrained import llama_checkpoint, llama_names
from train.run import checkpoint, job, metrics, run_dir
from train.step import adapters, optimizer
from train.step import losses as losses_lib
from train.step import state as state_lib
from train.step import train_step as train_step_lib

NAMES = ("lora", "qlora", "relora", "low_rank")
# What tests try of them; the others with `-m slow`.
QUICK = ("relora",)
FIELDS = {
  "learning_rate": 1e-2,
  "rank": 4,
  "lora_alpha": 8.0,
  "reset_every": 3,
  "restart_warmup": 1,
}


@dataclasses.dataclass
class Trainer:
  """A tiny model with factors, and its compiled steps."""

  mesh: jax.sharding.Mesh
  abstract: state_lib.AbstractState
  tx: optax.GradientTransformation
  train_step: object
  eval_step: object

  @functools.cached_property
  def fresh(self):
    with jax.set_mesh(self.mesh):
      state = state_lib.init_state(self.tx, self.abstract, 0, weights(TINY))
      where = jax.tree.map(lambda x: x.sharding, state)
      return jax.device_get(state), where

  def init(self):
    return jax.device_put(*self.fresh)

  def put(self, rows):
    where = mesh_lib.batch_sharding(self.mesh)
    return mesh_lib.put_batch(jax.device_get(rows), where)

  def run(self, rows, count, state=None):
    """The state and the losses of some steps."""
    state, losses = self.init() if state is None else state, []
    with jax.set_mesh(self.mesh):
      for _ in range(count):
        state, found = self.train_step(state, self.put(rows))
        losses.append(float(found["loss"]))
    return state, losses


@functools.cache
def trainer(name, devices=1, fsdp=1, tensor=1, accumulate=1):
  grid = mesh_lib.make_mesh(
    schema.MeshConfig(fsdp=fsdp, tensor=tensor), 8, jax.devices()[:devices]
  )
  chosen = schema.OptimizerConfig(name=name, **FIELDS)
  tx = optimizer.make_optimizer(chosen, steps=20)
  with jax.set_mesh(grid):
    abstract = state_lib.abstract_state(
      TINY, *llama.abstract(TINY), tx, grid, adapters.make(chosen)
    )
  train = schema.TrainConfig(accumulate=accumulate)
  return Trainer(
    grid,
    abstract,
    tx,
    train_step_lib.make_train_step(tx, abstract, train),
    losses_lib.make_eval_step(abstract),
  )


def same(x, y):
  jax.tree.map(np.testing.assert_array_equal, x, y)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in NAMES
  ],
)
def test_training_learns_in_one_program(name, rows):
  here = trainer(name)
  first = here.init()
  frozen = jax.device_get(first.params["frozen"])
  state, losses = here.run(rows, 12, first)
  assert losses[-1] < math.log(TINY.vocab_size) - 0.7
  assert here.train_step._cache_size() == 1
  assert all(x.is_deleted() for x in jax.tree.leaves(first.params["adapters"]))
  if name == "relora":
    merged = state.params["frozen"]["layers"]["attn"]["q"]["kernel"]
    before = frozen["layers"]["attn"]["q"]["kernel"]
    change = np.asarray(merged - before)
    # Of rank 4 each, three of four restarts had something to merge.
    assert {np.linalg.matrix_rank(x, tol=1e-6) for x in change} == {16}
  else:
    same(state.params["frozen"], frozen)
  with jax.set_mesh(here.mesh):
    total, count = here.eval_step(state.params, here.put(rows))
  read = here.abstract.read(state.params)
  expected = losses_lib.token_losses(here.abstract.graphdef, read, rows)
  assert count == expected.size
  np.testing.assert_allclose(total, expected.sum(), rtol=1e-4)


def test_the_step_is_the_gradient_of_the_adapters(rows):
  here = trainer("lora")
  state = here.init()
  frozen, trained = state.params["frozen"], state.params["adapters"]

  def loss(trained):
    params = here.abstract.adapters.method.apply(frozen, trained)
    return losses_lib.token_losses(here.abstract.graphdef, params, rows).mean()

  grads = jax.jit(jax.grad(loss))(trained)
  # The first learning rate is zero; with no warm-up left it is not.
  moved = lambda x: x + 1 if x.shape == () else x
  opt_state = jax.tree.map(moved, state.opt_state)
  updates, _ = jax.jit(here.tx.update)(grads, opt_state, trained)
  expected = jax.device_get(optax.apply_updates(trained, updates))
  state = state._replace(opt_state=opt_state)
  with jax.set_mesh(here.mesh):
    after, found = here.train_step(state, here.put(rows))
  np.testing.assert_allclose(
    found["grad_norm"], optax.tree.norm(grads), rtol=1e-4
  )
  # Adam divides tiny gradients by their size: rounding shows in few.
  off = jax.tree.map(
    lambda x, y: np.mean(np.abs(x - y) > 1e-4),
    jax.device_get(after.params["adapters"]),
    expected,
  )
  assert max(jax.tree.leaves(off)) < 0.01


@pytest.mark.slow
def test_a_batch_in_parts_trains_the_same(rows):
  whole, parts = trainer("lora"), trainer("lora", accumulate=2)
  _, losses = whole.run(rows, 4)
  np.testing.assert_allclose(parts.run(rows, 4)[1], losses, rtol=1e-3)


SOME = ["relora", pytest.param("qlora", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", SOME)
def test_a_mesh_trains_the_same(name, rows):
  _, losses = trainer(name).run(rows, 5)
  split = trainer(name, devices=8, fsdp=2, tensor=2)
  state = split.init()
  kernel = state.params["adapters"]["layers/mlp/up/kernel"]
  assert kernel.a.sharding.spec == jax.P(None, "fsdp", None)
  assert kernel.b.sharding.spec == jax.P(None, None, "tensor")
  moments = optax.tree.get(state.opt_state, "mu")["layers/mlp/up/kernel"]
  assert moments.b.sharding == kernel.b.sharding
  np.testing.assert_allclose(split.run(rows, 5, state)[1], losses, rtol=1e-3)


def counted(state, batches, skipped):
  return state._replace(step=jnp.int32(batches), skipped=jnp.int32(skipped))


@pytest.mark.parametrize(
  ("batches", "skipped", "due"),
  [(1, 0, False), (2, 0, True), (3, 0, False), (3, 1, True), (5, 0, True)],
)
def test_restarts_count_updates_not_batches(batches, skipped, due, rows):
  here = trainer("relora")
  state, _ = here.run(rows, 2, counted(here.init(), 0, 0))
  state, _ = here.run(rows, 1, counted(state, batches, skipped))
  b = state.params["adapters"]["layers/mlp/up/kernel"].b
  assert bool(jnp.any(b != 0)) != due


def test_a_step_that_is_skipped_restarts_nothing(rows):
  here = trainer("relora")
  state, _ = here.run(rows, 2)
  bad = jax.tree.map(lambda x: x, state.params)
  bad["adapters"]["norm/scale"] = jnp.full((TINY.d_model,), jnp.nan)
  kept = jax.device_get(bad["adapters"])
  state, _ = here.run(rows, 1, state._replace(params=bad))
  assert int(state.skipped) == 1
  same(state.params["adapters"], kept)


def test_the_factor_on_the_matrices_is_that_on_their_factors():
  here = trainer("lora")
  is_matrix = leaves.block_matrices(here.abstract.state.params["adapters"])
  flat = {
    leaves.path_of(path): x
    for path, x in jax.tree_util.tree_leaves_with_path(is_matrix)
  }
  assert flat["layers/attn/q/kernel/a"] and flat["layers/mlp/up/kernel/b"]
  for name in ("embed/embedding", "lm_head/kernel", "layers/attn_norm/scale"):
    assert not flat[name]
  assert leaves.decayed(is_matrix)["layers/attn_norm/scale"] is False


def test_the_rate_warms_up_after_restarts():
  base = presets.make("sotu_small", "relora")
  chosen = dataclasses.replace(base.optimizer, reset_every=50)
  rates = job.learning_rates(chosen, base.train.steps)
  plain = dataclasses.replace(chosen, name="lora")
  smooth = job.learning_rates(plain, base.train.steps)
  t = np.arange(500)
  ramp = np.where(t < 50, 1, np.minimum(1, t % 50 / 10))
  np.testing.assert_allclose(rates, smooth * ramp, rtol=1e-6)


@pytest.fixture(scope="module")
def flags(text_file, tmp_path_factory):
  settings = {
    "data.path": text_file,
    "data.cache": tmp_path_factory.mktemp("cache"),
    "data.length": 16,
    "data.batch": 8,
    "model.vocab_size": 300,
    "model.d_model": 16,
    "model.d_ff": 32,
    "model.n_layers": 2,
    "model.n_heads": 2,
    "optimizer.rank": 4,
    "optimizer.reset_every": 3,
    "optimizer.restart_warmup": 1,
    "train.steps": 12,
    "run.eval_every": 12,
    "run.checkpoint_every": 4,
    "run.keep": 3,
    "run.log_every": 1,
    "run.sample_tokens": 8,
    "mesh.data": 1,
  }
  return [x for k, v in settings.items() for x in ("--set", f"{k}={v}")]


def losses_in(out):
  records = metrics.read(out / metrics.FILE)
  return [(r["step"], r["loss"]) for r in records if "loss" in r]


def arrays_in(out, chosen):
  tx = optimizer.make_optimizer(chosen.optimizer, 12)
  parts = adapters.make(chosen.optimizer)
  abstract = state_lib.abstract_state(
    chosen.model,
    *llama.abstract(chosen.model),
    tx,
    mesh_lib.make_mesh(chosen.mesh, 8),
    parts,
  )
  state, _ = checkpoint.restore(out, abstract)
  return jax.device_get(state), parts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relora", "qlora"])
def test_a_run_goes_on_bit_by_bit_and_goes_out(
  name, flags, one_device, tmp_path, capsys
):
  out = tmp_path / "run"
  argv = ["--out", str(out), "--optimizer", name, *flags]
  assert pretrain.main(argv) == 0
  text = capsys.readouterr().out
  assert f"optimizer  {name}, " in text and "factors of rank 4" in text
  assert "bytes frozen, " in text and (out / "sample.txt").exists()
  chosen = configured(out, name, flags)
  state, parts = arrays_in(out, chosen)
  losses = losses_in(out)
  for later in ("8", "12"):
    shutil.rmtree(out / run_dir.FOLDER / later)
  assert pretrain.main(argv) == 0
  assert "continuing from the checkpoint of step 4" in capsys.readouterr().out
  assert losses_in(out) == losses and len(losses) == 12
  same(arrays_in(out, chosen)[0], state)

  exported = tmp_path / "exported"
  assert hf.main(["export", str(out), "--out", str(exported)]) == 0
  found = llama_names.to_params(llama_checkpoint.load(exported))
  expected = parts.read(state.params)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, expected
  )
  other = llama_checkpoint.adopt(presets.make("sotu_small", "lora"), out)
  start = llama_checkpoint.initial_params(other)
  same(start, found)


def configured(out, name, flags):
  chosen = presets.make("sotu_small", name)
  settings = [x for x in flags if x != "--set"]
  assert (out / "config.json").exists()
  return schema.override(chosen, settings)


@pytest.mark.parametrize(
  ("settings", "match"),
  [
    (["train.layerwise=true"], "inside the backward pass"),
    (["model.weights=int8"], "optimizer.name=qlora for frozen weights"),
    (["optimizer.pruned=1.5"], r"pruned must lie in \[0, 1\]"),
    (["optimizer.reset_every=0"], "reset_every must be above 0"),
    (["optimizer.restart_warmup=100"], "less than optimizer.reset_every=100"),
    (["optimizer.lora_alpha=0"], "lora_alpha must be above 0"),
  ],
)
def test_what_does_not_go_together_is_refused(settings, match):
  with pytest.raises(UserError, match=match):
    schema.override(presets.make("sotu_small", "relora"), settings)


def test_low_rank_accumulation_is_refused():
  chosen = schema.OptimizerConfig(name="lora", accumulate=2)
  with pytest.raises(UserError, match=r"use train\.accumulate"):
    optimizer.make_optimizer(chosen, 10)


def test_a_dry_run_counts_what_is_trained(capsys):
  model = {"d_model": 64, "d_ff": 96, "n_layers": 2, "vocab_size": 300}
  sets = [f"model.{k}={v}" for k, v in model.items()] + ["optimizer.rank=8"]
  factors = 2 * 8 * (4 * (64 + 64) + 3 * (64 + 96))
  rest = 2 * 300 * 64 + (2 * 2 + 1) * 64
  found = {}
  for name in NAMES:
    chosen = schema.override(presets.make("sotu_small", name), sets)
    with pytest.MonkeyPatch.context() as patch:
      # The same for all of them, and not tested here.
      patch.setattr(flops, "forward_per_token", lambda *_: 1.0)
      patch.setattr(flops, "recompute_per_token", lambda *_: 0.0)
      patch.setattr(dry_run, "activation_bytes", lambda *_: 0)
      found[name] = dry_run.estimate(chosen)
    whole = found[name]["bytes"]["whole"]
    assert whole["trained_weights"] == 4 * (factors + rest)
    # Two moments each; Adam's and the schedule's counters.
    assert whole["optimizer_state"] == 8 * (factors + rest) + 8
    state = found[name]["optimizer_state"]
    assert state[f"this run ({name})"] == whole["optimizer_state"]
    row = {r["path"]: r for r in found[name]["plan"]}["layers/mlp/up/kernel"]
    assert (row["side"], row["rank"]) == ("factors", 8)
    assert row["state_bytes"] == 8 * 2 * 8 * (64 + 96)
  matrices = 2 * (4 * 64 * 64 + 3 * 64 * 96)
  frozen = {n: x["bytes"]["whole"]["frozen_weights"] for n, x in found.items()}
  assert frozen["lora"] == frozen["relora"] == 4 * matrices
  assert matrices / 2 < frozen["qlora"] < 0.6 * matrices
  assert frozen["low_rank"] == 0
  # One product for the weight, and two on the gradient's way back.
  update = found["lora"]["flops"]["optimizer_per_step"]
  assert update == 3 * 2 * 8 * matrices
  print(dry_run.render(found["qlora"]))
  text = capsys.readouterr().out
  assert "frozen weights" in text and max(map(len, text.splitlines())) <= 80
  assert json.loads(json.dumps(found))


def test_published_sizes_are_those_of_the_paper(monkeypatch):
  monkeypatch.setattr(state_table, "ROWS", {"lora": ("lora", {})})
  found = state_table.table()["lora"]
  # Its figures of Table 6b are estimates, of two digits.
  for preset, (_, _, paper) in state_table.PAPER.items():
    assert found[preset] / 1e9 == pytest.approx(paper, abs=0.006, rel=0.03)
  assert "paper: LoRA" in state_table.render({"lora": found})


def test_a_run_of_another_version_is_named(tmp_path):
  base = schema.flatten(presets.make("sotu_small", "lora"))
  (tmp_path / "config.json").write_text(
    json.dumps(base | {"optimizer.unheard_of": 1})
  )
  with pytest.raises(UserError, match="another version"):
    llama_checkpoint.load(tmp_path)


def test_names_are_those_of_the_config():
  for name in registry.METHODS:
    chosen = schema.OptimizerConfig(name=name)
    parts = adapters.make(chosen)
    assert (parts is None) == (name not in NAMES)
    assert bool(registry.get(name).factors) == (name in NAMES)
  assert adapters.make(schema.OptimizerConfig(name="relora")).reset_every == 100
