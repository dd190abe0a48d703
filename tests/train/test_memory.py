"""Memory by the compilers' figures, and state by shapes."""

import importlib.util
import json
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax
from train import memory
from train.common.errors import UserError
from train.estimate import aot_targets, state_table

TINY = [
  "--preset=llama_9m",
  "--seq=16",
  "--set=model.n_layers=2",
  "--set=model.vocab_size=512",
  "--set=model.d_model=64",
  "--set=model.d_ff=96",
  "--set=optimizer.rank=16",
]


@pytest.fixture
def cpu(monkeypatch):
  """This machine as a target: the same way through another compiler."""
  target = aot_targets.Target("cpu", "cpu", jax.devices()[:1], 2**20, "XLA")
  monkeypatch.setattr(aot_targets, "find", lambda name: target)
  return target


def test_figures_add_up(cpu, capsys):
  argv = [*TINY, "--method=adamw", "--target=cpu", "--json"]
  assert memory.main(argv) == 1  # more than the 1 MiB of the target
  found = json.loads(capsys.readouterr().out)
  assert found["fits"] is False
  assert found["executed"] is False
  parts = found["components"]
  arguments = parts["weights"] + parts["moments"] + parts["bases"]
  # and the counters, the step and the batch
  assert 0 < found["argument_bytes"] - arguments < 1000
  assert parts["bases"] == 0
  assert found["peak_bytes"] == sum(parts.values()) + (
    found["argument_bytes"] - arguments
  )


def test_methods_side_by_side(cpu, capsys, tmp_path):
  picture = tmp_path / "bars.png"
  argv = [*TINY, "--method=galore,adamw", "--target=cpu", "--layerwise"]
  memory.main([*argv, f"--plot={picture}"])
  text = capsys.readouterr().out
  assert "llama_9m, galore, layer by layer, 1 x 16 tokens" in text
  assert "llama_9m, adamw, layer by layer" in text
  assert "nothing was\nexecuted" in text.replace(" executed", "\nexecuted")
  assert picture.stat().st_size > 5000


def test_longest_rows_that_fit(cpu, capsys, monkeypatch):
  """The search, on a step that takes 10 bytes a token and 100 besides."""

  def measure(config, target, limit):
    peak = 100 + 10 * config.data.length
    return {
      "peak_bytes": peak,
      "room_bytes": limit,
      "fits": peak <= limit,
      "seq": config.data.length,
    }

  monkeypatch.setattr(memory, "measure", measure)
  flags = memory.parse([*TINY, "--target=cpu"])
  config = memory.configure(flags, "galore")
  assert memory.search(config, cpu, "seq", 15_500)["seq"] == 1536
  assert memory.search(config, cpu, "seq", 15_400)["seq"] == 1024
  with pytest.raises(UserError, match="seq=256 takes"):
    memory.search(config, cpu, "seq", 1000)


def test_what_does_not_fit_is_read_off_the_message():
  error = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required"
    " for HLO temporaries (53.11G) exceeds available HBM (15.75G)."
  )
  assert memory._needed(error) == int(53.11 * 2**30)
  with pytest.raises(jax.errors.JaxRuntimeError):
    memory._needed(
      jax.errors.JaxRuntimeError("INTERNAL: (1G) exceeds available")
    )


@pytest.mark.parametrize(
  ("text", "size"), [("16GiB", 2**34), ("24GB", 24 * 10**9), ("device", None)]
)
def test_sizes(text, size):
  assert memory.fit_size(text) == size


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--target=tpu"], "--target 'tpu' is unknown"),
    (["--target=tpu:v2"], "v5e"),
    (["--target=gpu:h100:many"], "'many' is not a number"),
    (["--target=gpu:h100", "--preset=llama_8b"], "llama_8b"),
    (["--target=gpu:h100", "--fit=much"], "16GiB"),
  ],
)
def test_wrong_arguments(argv, message, capsys, monkeypatch):
  monkeypatch.setattr(aot_targets, "_need", lambda *_: None)
  if "--preset=llama_8b" in argv or "--fit=much" in argv:
    monkeypatch.setattr(aot_targets, "find", lambda name: None)
  assert memory.main(argv) == 2
  assert message in capsys.readouterr().err


@pytest.mark.parametrize(
  ("name", "extra"), [("tpu:v5e", "tpu-aot"), ("gpu:rtx4090", "gpu-aot")]
)
def test_a_missing_compiler_is_named(name, extra, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
  with pytest.raises(UserError, match=extra):
    aot_targets.find(name)


def test_state_is_smaller_than_adamws_at_every_size(monkeypatch):
  """With bfloat16 weights, by default and with a residual."""
  names = ("adamw", "galore", "galore, residual")
  rows = {name: state_table.ROWS[name] for name in names}
  monkeypatch.setattr(state_table, "ROWS", rows)
  found = state_table.table()
  for preset, adamw in found.pop("adamw").items():
    for name, row in found.items():
      share = row[preset] / adamw
      assert share < (0.75 if preset == "llama_60m" else 0.71), (name, preset)


def test_published_sizes(monkeypatch):
  """Exact counts, as derived by hand from the papers' configs."""
  monkeypatch.setattr(state_table, "PRESETS", ("llama_60m",))
  found = state_table.table()
  size = {name: row["llama_60m"] for name, row in found.items()}
  embeddings = 2 * 32000 * 512
  matrices = 8 * (4 * 512 * 512 + 3 * 512 * 1376)
  norms = 17 * 512
  full = 2 * (embeddings + norms)
  assert size["adamw"] == 2 * (full + 2 * matrices) + 8  # two counters
  bases = 56 * 512 * 128
  low = 8 * (4 * 2 * 128 * 512 + 3 * 2 * 128 * 1376)
  wanted = {
    "galore": 2 * (full + low) + 4 * bases,
    "galore, all bfloat16": 2 * (full + low + bases),
    "galore, float32 moments": 4 * (full + low + bases),
  }
  for name, count in wanted.items():
    assert abs(size[name] - count) < 100, name
  assert size["q_galore"] < 0.36 * size["adamw"]
  # A byte for each moment of embedding and head, and a scale for 256 of them.
  assert 1 < size["q_apollo_mini"] / (2 * embeddings) < 1.03
  assert "paper: GaLore" in state_table.render(found)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "module"), [("tpu:v5e", "libtpu"), ("gpu:h100", "jax_cuda12_plugin")]
)
def test_the_target_s_own_compiler(name, module, capsys):
  if importlib.util.find_spec(module) is None:
    pytest.skip(f"needs {module} (extras tpu-aot, gpu-aot)")
  argv = [*TINY, "--method=q_galore", "--layerwise", f"--target={name}"]
  assert memory.main([*argv, "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found["temp_bytes"] > 0


def _temporaries(tx, device):
  """Bytes of a usual step of eight layers that are leaves, and of gradients."""
  width, bf16 = 1024, jnp.bfloat16
  layer = {"up": (width, 4 * width), "down": (4 * width, width)}
  shapes = {f"layer_{i}": layer for i in range(8)}
  where = jax.sharding.SingleDeviceSharding(device)
  struct = lambda shape, dtype: jax.ShapeDtypeStruct(
    shape, dtype, sharding=where
  )
  params = jax.tree.map(
    lambda shape: struct(shape, bf16),
    shapes,
    is_leaf=lambda x: type(x) is tuple,
  )

  @jax.checkpoint
  def block(layer, x):
    return x + jax.nn.silu(x @ layer["up"]) @ layer["down"]

  def loss(params, x):
    for i in range(8):
      x = block(params[f"layer_{i}"], x)
    return jnp.mean(x.astype(jnp.float32) ** 2)

  def step(params, state, x):
    updates, state = tx.update(jax.grad(loss)(params, x), state, params)
    return optax.apply_updates(params, updates), state

  state = jax.tree.map(
    lambda x: struct(x.shape, x.dtype), jax.eval_shape(tx.init, params)
  )
  lowered = (
    jax.jit(step, donate_argnums=(0, 1))
    .trace(params, state, struct((256, width), bf16))
    .lower(lowering_platforms=("cuda",))
  )
  found = lowered.compile().memory_analysis().temp_size_in_bytes
  return found, sum(2 * x.size for x in jax.tree.leaves(params))


@pytest.mark.slow
def test_layers_that_are_leaves_are_updated_one_by_one():
  """The compiler drops each gradient, unless a shared refresh waits for all."""
  if importlib.util.find_spec("jax_cuda12_plugin") is None:
    pytest.skip("needs jax_cuda12_plugin (extra gpu-aot)")
  aot_targets.set_up()
  (device,) = aot_targets.find("gpu:rtx4090").devices
  make = lambda share: galore_optax.galore(
    optax.adamw(1e-3), rank=64, refresh=galore_optax.Refresh(share=share)
  )
  apart, gradients = _temporaries(make(False), device)
  shared, _ = _temporaries(make(True), device)
  assert apart < 0.6 * gradients < gradients < shared


@pytest.mark.slow
@pytest.mark.parametrize(
  "make", [galore_optax.galore_adamw, galore_optax.galore_adamw_8bit]
)
def test_a_gpu_s_update_copies_neither_bases_nor_moments(make):
  """XLA copies what goes through a conditional, so no stack does."""
  if importlib.util.find_spec("jax_cuda12_plugin") is None:
    pytest.skip("needs jax_cuda12_plugin (extra gpu-aot)")
  aot_targets.set_up()
  (device,) = aot_targets.find("gpu:rtx4090").devices
  where = jax.sharding.SingleDeviceSharding(device)
  struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  tx = make(1e-3, rank=256, proj_type="auto")
  stack = jax.ShapeDtypeStruct((8, 1024, 1024), jnp.bfloat16)
  params = {"up": stack, "down": stack}
  state = jax.tree.map(struct, jax.eval_shape(tx.init, params))
  params = jax.tree.map(struct, params)

  def step(state, params, grads):
    updates, state = tx.update(grads, state, params)
    return state, optax.apply_updates(params, updates)

  lowered = jax.jit(step, donate_argnums=(0, 1)).lower(state, params, params)
  text = lowered.compile().as_text()
  sizes = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", text)
  copied = [math.prod(map(int, size.split(","))) for size in sizes]
  assert max(copied, default=0) <= 1024 * 256
