import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import galore_optax
from train import pretrain
from train.config import presets, schema
from train.estimate import dry_run, flops, jaxpr_cost
from train.methods import registry
from train.models import llama


def estimate(preset, optimizer, *settings):
  return dry_run.estimate(
    schema.override(presets.make(preset, optimizer), settings)
  )


@pytest.fixture(scope="module")
def giant():
  return estimate("llama_7b", "galore", "mesh.fsdp=8", "train.accumulate=64")


def test_a_giant_is_counted_without_its_memory(giant):
  counts = giant["parameters"]
  assert counts["total"] == 6_738_415_616  # of the published config
  assert counts["total"] == sum(v for k, v in counts.items() if k != "total")
  assert counts["attention"] == 32 * 4 * 4096**2
  assert giant["bytes"]["whole"]["weights"] == 2 * counts["total"]
  assert giant["bytes"]["whole"]["gradient_sums"] == 4 * counts["total"]


def test_bytes_of_a_device_are_its_shards(giant):
  whole, device = giant["bytes"]["whole"], giant["bytes"]["device"]
  # All but the norms are split by eight.
  norms = 2 * giant["parameters"]["norms"]
  assert device["weights"] == (whole["weights"] - norms) // 8 + norms
  assert whole["activations"] == 8 * device["activations"]
  rows = 512 // 8 // 64
  graphdef, boxes = llama.abstract(presets.make("llama_7b", "adamw").model)
  one = flops.trace_loss(graphdef, nnx.to_pure_dict(boxes), rows, 256, True)
  assert device["activations"] == jaxpr_cost.peak_bytes(one)


def test_relatives_of_llama_are_counted_with_all_their_leaves():
  plain = estimate("sotu_small", "galore")
  relative = estimate(
    "sotu_small",
    "galore",
    "model.family=qwen3",
    "model.attention_bias=all",
    "model.qk_norm=true",
    "model.head_dim=64",
  )
  (d, width, heads), layers = (192, 64, 4), 4
  biases, norms = 3 * heads * width + d, 2 * width
  wider = 4 * d * heads * (width - d // heads)
  more = layers * (biases + norms + wider)
  counts, before = relative["parameters"], plain["parameters"]
  assert counts["attention"] - before["attention"] == more
  assert counts["total"] - before["total"] == more
  rank = {row["path"]: row["rank"] for row in relative["plan"]}
  attn = "layers/attn"
  assert rank[f"{attn}/q/kernel"] == 48
  for name in ("q/bias", "o/bias", "q_norm/scale", "k_norm/scale"):
    assert rank[f"{attn}/{name}"] is None
  # Two moments a number at full rank, with the basis and moments of wider ones.
  state = relative["bytes"]["whole"]["optimizer_state"]
  rows = sum(row["state_bytes"] for row in relative["plan"])
  assert 0 <= state - rows < 100
  for name, size in (("q/bias", heads * width), ("k_norm/scale", width)):
    (row,) = [r for r in relative["plan"] if r["path"] == f"{attn}/{name}"]
    assert row["state_bytes"] == 2 * 4 * layers * size


def test_experts_have_bases_of_their_own_and_the_router_none():
  found = estimate(
    "sotu_small",
    "galore",
    "model.family=mixtral",
    "model.n_experts=6",
    "model.d_ff=256",
    "optimizer.residual=none",
  )
  (d, ff, layers), rank = (192, 256, 4), 48
  router = layers * d * 6
  matrices = layers * 6 * 3
  assert found["parameters"]["experts"] == matrices * d * ff + router
  assert "feed-forward" not in found["parameters"]
  rows = {row["path"]: row for row in found["plan"]}
  gate = rows["layers/experts/gate/kernel"]
  assert (gate["shape"], gate["rank"]) == ([layers, 6, d, ff], rank)
  # A basis of the shorter side, and two moments.
  assert gate["state_bytes"] == 4 * matrices // 3 * rank * (d + 2 * ff)
  router_row = rows["layers/experts/router"]
  assert router_row["rank"] is None and "router" in router_row["reason"]
  assert router_row["state_bytes"] == 2 * 4 * router
  text = dry_run.render(found)
  assert "4x6x192x256" in text and max(map(len, text.splitlines())) <= 80


def test_state_bytes_are_those_of_describe(giant):
  state = giant["bytes"]["whole"]["optimizer_state"]
  rows = sum(row["state_bytes"] for row in giant["plan"])
  assert 0 <= state - rows < 100  # counters
  assert giant["optimizer_state"]["this run (galore)"] == state
  assert not any(row["reason"] for row in giant["plan"] if row["rank"])
  assert all(row["reason"] for row in giant["plan"] if not row["rank"])
  # Like for like: the weights' dtype and contrib's side, on both.
  states = giant["optimizer_state"]
  assert states["adamw, float32"] - 2 * states["adamw"] < 100
  alike = states["galore, auto, bfloat16"] - states["optax.contrib.galore"]
  assert abs(alike) < 4096  # counters, one a matrix in contrib's
  note = giant["optimizer_state_note"]
  assert "are in bfloat16" in note and "0.999" in note
  fewer = estimate("llama_7b", "galore", "optimizer.rank=128", "data.batch=8")
  assert fewer["bytes"]["whole"]["optimizer_state"] < state / 2


def test_the_run_adds_up(giant):
  found = giant["flops"]
  assert found["tokens_per_step"] == 512 * 256
  assert found["tokens"] == 150_000 * 512 * 256
  # Projecting and lifting: 4 m n r a matrix.
  sizes = 4 * 4096 * 4096 + 3 * 4096 * 11008
  assert found["optimizer_per_step"] == 32 * 4 * 1024 * sizes
  per_token = 3 * found["forward_per_token"] + found["recomputed_per_token"]
  rest = found["optimizer_per_step"] + found["refresh"] / 500
  assert found["run"] == pytest.approx(
    150_000 * (found["tokens_per_step"] * per_token + rest)
  )


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_refresh_costs_what_its_program_does(side):
  m, n, rank = 2048, 4096, 64
  shape = (m, n) if side == "left" else (n, m)
  params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
  tx = galore_optax.galore_sgd(
    0.1, rank=rank, refresh=galore_optax.Refresh(moments="keep")
  )
  rows = galore_optax.describe(tx, params).rows
  settings = schema.OptimizerConfig(rank=rank, moments="keep")
  state = jax.eval_shape(tx.init, params)
  program = jax.make_jaxpr(tx.update)(params, state, params).jaxpr
  dear, cheap = (jaxpr_cost.count_flops(program, f) for f in (max, min))
  wanted = flops.refresh(rows, settings)
  assert dear - cheap == pytest.approx(wanted, rel=0.05)


def test_svd_and_rotation_cost_more():
  tx = galore_optax.galore_sgd(0.1, rank=8)
  rows = galore_optax.describe(tx, {"w": jnp.zeros((3, 64, 256))}).rows
  base = schema.OptimizerConfig(rank=8, moments="keep")
  cost = lambda **c: flops.refresh(rows, dataclasses.replace(base, **c))
  assert cost(projector="svd") > 10 * cost()
  assert cost(moments="rotate") > cost()
  assert cost(name="galore_faithful", moments="rotate") == cost(projector="svd")


# One method for each way to count; all of them with `-m slow`.
QUICK = ("galore", "apollo", "lora", "contrib_galore")


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in registry.METHODS
  ],
)
def test_every_optimizer_is_counted(name):
  method = registry.METHODS[name]
  found = estimate("llama_9m", name, "model.n_layers=1", "data.length=64")
  state = found["bytes"]["whole"]["optimizer_state"]
  assert found["optimizer_state"][f"this run ({name})"] == state
  finds_bases = (
    method.projects and not method.by_optax and not method.random_bases
  )
  assert (found["flops"]["refresh"] > 0) == finds_bases


def test_the_quick_optimizers_exist():
  assert set(QUICK) <= set(registry.METHODS)


def test_the_command_reads_no_data_and_writes_nothing(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  argv = ["--preset", "llama_60m", "--dry-run", "--set", "data.path=/no/such"]
  assert pretrain.main(argv) == 0
  text = capsys.readouterr().out
  assert max(map(len, text.splitlines())) <= 80
  for part in ("58,073,600", "layers/mlp/down/kernel", "optax.contrib.galore",
               "activations", "1.31 Gtokens", "40% MFU"):  # fmt: skip
    assert part in text, part
  assert pretrain.main([*argv, "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found["parameters"]["total"] == 58_073_600
  assert not list(tmp_path.iterdir())


def test_wrong_input_is_told(capsys):
  argv = ["--preset", "llama_9m", "--dry-run", "--set", "mesh.fsdp=7"]
  assert pretrain.main(argv) == 2
  assert "multiple of 7" in capsys.readouterr().err
  with pytest.raises(SystemExit) as raised:
    pretrain.main(["--json"])
  assert raised.value.code == 2


def test_peaks_are_found_by_the_names_that_devices_give():
  known = {
    "TPU v4": 275, "TPU v5 lite": 197, "TPU v5": 459, "TPU v5p": 459,
    "TPU v6 lite": 918, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA H200": 989,
    "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756,
    "NVIDIA GeForce RTX 4090": 165.2,
  }  # fmt: skip
  for kind, teraflops in known.items():
    assert flops.peak(kind) == teraflops * 1e12, kind
  for kind in ("cpu", "NVIDIA A1000", "NVIDIA GeForce RTX 3090 Ti", "TPU v3"):
    assert math.isnan(flops.peak(kind)), kind
  assert math.isnan(flops.utilization(1e4, 1e9))  # of these CPU devices


def test_matrices_too_small_for_the_rank_are_told():
  rows = [
    {"path": path, "shape": [8, 8], "side": "full rank", "rank": None,
     "state_bytes": 512, "reason": reason}
    for path, reason in (
      ("layers/q", "no smaller at rank 8"),
      ("layers/k", "no smaller at rank 8"),
      ("embed", "its name"),
    )
  ]  # fmt: skip
  last = dry_run.plan_table(rows)[-1]
  assert last.endswith("would save nothing: layers/q and 1 more")
  assert dry_run.plan_table(rows[2:])[-1].startswith("embed")
