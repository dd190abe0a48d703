"""train.bench device: its quick form, and what it says of other devices.

No test asserts a time, which depends on the machine's load.
"""

import argparse
import json
import pathlib
import time

import jax.numpy as jnp
import pytest

from galore_optax import linalg
from train.bench import __main__ as command
from train.bench import device, record, report
from train.bench.device import facts, numerics, pools, rows, steps, table
from train.common import units

GPU = {
  "platform": "gpu",
  "kind": "NVIDIA Some GPU",
  "count": 1,
  "memory": 140 * units.GB,
  "dtype": "bfloat16",
  "flops": 5e14,
}
CPU = GPU | {"platform": "cpu", "kind": "cpu", "dtype": "float32"}
# What the benchmark must not need.
ABSENT = ("datasets", "huggingface_hub", "matplotlib", "pyarrow", "tokenizers")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """The record of the quick form, made by the command without the extras."""
  out = tmp_path_factory.mktemp("device")
  lines = [f"import sys; sys.modules[{name!r}] = None\n" for name in ABSENT]
  (out / "sitecustomize.py").write_text("".join(lines), encoding="utf-8")
  root = pathlib.Path(__file__).parents[3]
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PYTHONPATH", f"{out}:{root}")
    assert command.main(["device", "--quick", f"--out={out}"]) == 0
  return out


def test_quick_form(measured):
  found = record.load(measured / "device-cpu.json")
  assert found["command"] == "python -m train.bench device --quick"
  results = found["results"]
  assert results["device"]["platform"] == "cpu"
  checks = [x for x in results["rows"] if x["part"] == "numerics"]
  assert len(checks) == 15
  assert sum(x["passed"] is True for x in checks) == 14  # one has no bound
  trained = [x for x in results["rows"] if x["part"] == "steps"]
  assert [x["name"] for x in trained] == [
    f"tiny, {way}" for way in steps.QUICK_WAYS
  ]
  adamw, lean = trained
  assert adamw["ratio"] == 1 and lean["ratio"] > 0
  assert 0 < lean["forecast"] < adamw["forecast"]
  assert adamw["loss"] == pytest.approx(4.16, abs=0.3)  # log 64
  assert results["rows"][-1]["left_out"] == "--quick trains no large model"
  section = report.section("device", measured)
  assert section.count("| passed |") == 14
  assert "optax " + found["versions"]["optax"] in section.splitlines()[-1]


def results_with(*rows):
  return {"device": CPU, "quick": True, "rows": list(rows)}


def test_failures_are_shown_and_counted():
  row = {"part": "numerics", "name": "bases", "error": 2e-3, "bound": 1e-5}
  bad = results_with(row | {"passed": False})
  assert device.failed(bad)
  assert not device.failed(results_with(row | {"passed": True}))
  assert table.text(bad).splitlines()[-1].split()[-1] == "FAILED"
  cut = {"part": "steps", "name": "llama_1b, AdamW", "forecast": units.GIB}
  assert table.text(results_with(cut)).split()[-2:] == ["1.00", "compiled"]
  crash = {"part": "steps", "name": "llama_1b", "failed": "exit status -6: x"}
  assert device.failed(results_with(crash))
  assert table.text(results_with(crash)).endswith("exit status -6: x.")
  assert "- steps: llama_1b: exit" in table.markdown(results_with(crash))


def test_an_error_becomes_a_row_and_the_next_case_runs(tmp_path):
  part = rows.Part("steps", tmp_path / "rows")
  with part.guarded("a"):
    raise ValueError("first line\nsecond line")
  with part.guarded("b", {"way": "c"}):
    raise rows.LeftOut("too small")
  part.add(name="d", error=float("nan"))
  part.add(name="a", loss=1.0)  # more of the same case
  with (tmp_path / "rows").open("a", encoding="utf-8") as file:
    file.write('{"part": "cut')  # by the end of its process
  assert rows.read(tmp_path / "rows") == [
    {
      "part": "steps",
      "name": "a",
      "failed": "ValueError: first line",
      "loss": 1.0,
    },
    {"part": "steps", "name": "b", "way": "c", "left_out": "too small"},
    {"part": "steps", "name": "d", "error": "nan"},
  ]


def bench(tmp_path, **known):
  flags = argparse.Namespace(quick=False, seconds=100.0, sizes="llama_1b")
  found = device._Bench(flags, tmp_path / "rows")
  found.device = GPU | known
  return found


def test_a_part_that_dies_becomes_a_row(tmp_path, monkeypatch):
  run = bench(tmp_path)
  monkeypatch.setattr(device.sys, "executable", "/bin/false")
  run._part("steps", 0.5)
  assert run.rows() == [
    {"part": "steps", "name": "steps", "failed": "exit status 1: no message"}
  ]
  monkeypatch.setattr(device, "PATIENCE", 0.0)
  (tmp_path / "slow").write_text("#!/bin/sh\nexec sleep 60\n")
  (tmp_path / "slow").chmod(0o755)
  monkeypatch.setattr(device.sys, "executable", str(tmp_path / "slow"))
  begin = time.time()
  run._part("numerics", 0.002)
  assert time.time() - begin < 30
  assert run.rows()[0]["left_out"] == "ended: no time was left"


def test_pools_of_devices():
  """What is run where; a card needs more memory than its pool."""
  find = lambda **known: pools.cases(GPU | known, False)
  assert len(find()) == 4
  assert find(memory=int(25.7 * units.GB))[0] == ("8-bit GaLore", 24.0)
  assert {x[1] for x in find(memory=24 * units.GB)} == {16.0}
  assert {x[1] for x in find(platform="tpu")} == {0.0}
  for known, reason in (
    ({"memory": 16 * units.GB}, "has 16.0 GB"),
    ({"platform": "cpu"}, "no memory pool"),
  ):
    with pytest.raises(rows.LeftOut, match=reason):
      find(**known)


def test_a_pool_below_the_forecast_starts_no_process(tmp_path, monkeypatch):
  run, started = bench(tmp_path), []

  def part(name, share, title, fraction, *, case, pool_gb):
    started.append((case, pool_gb))
    assert fraction * 140 == pytest.approx(pool_gb)
    rows.Part(name, tmp_path / "rows").add(
      name=title, way=case, forecast=int(18 * units.GB)
    )

  monkeypatch.setattr(run, "_part", part)
  run._pools()
  assert started == [
    ("8-bit GaLore", 24.0),
    ("Q-GaLore", 16.0),
    ("Q-GaLore", 24.0),
  ]
  assert run.rows()[-1]["left_out"].startswith("needs 16.8 GiB")


def test_the_pool_is_set_in_one_way(monkeypatch):
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  found = facts.environment(0.25)
  assert found["XLA_CLIENT_MEM_FRACTION"] == "0.2500"
  assert not set(found) & set(facts.OTHERS)


def test_sizes_that_take_too_long_are_left_out():
  settings = rows.Settings(False, time.time() + 300, CPU | {"flops": 1e11})
  with pytest.raises(rows.LeftOut, match="a step takes some"):
    steps.check_time(settings, "llama_1b", steps.Batch(2, 256))
  steps.check_time(settings, "llama_9m", steps.Batch(2, 256))
  with pytest.raises(rows.LeftOut, match=r"needs 10\.0 GiB"):
    steps.check_room(10 * units.GIB, 8 * units.GIB)


def test_an_unknown_size_is_refused(tmp_path, capsys):
  assert command.main(["device", "--sizes=llama_2b"]) == 2
  assert "--sizes 'llama_2b' is unknown" in capsys.readouterr().err


def test_settings_survive_the_command_line():
  settings = rows.Settings(True, 1.5, GPU, 24.0, "Q-GaLore", ("llama_1b",))
  assert rows.Settings.from_json(settings.as_json()) == settings
  assert json.loads(settings.as_json())["pool_gb"] == 24


@pytest.mark.slow
def test_products_of_seven_bits_fail_the_checks(monkeypatch):
  exact = linalg.matmul
  rounded = lambda x: x.astype(jnp.bfloat16).astype(x.dtype)
  monkeypatch.setattr(
    linalg, "matmul", lambda spec, a, b: exact(spec, rounded(a), rounded(b))
  )
  case = numerics.Case(*numerics.QUICK_SHAPE)
  found = [*numerics.bases_and_moments(case), *numerics.residual(case)]
  failing = [name for name, error, bound in found if error > bound]
  assert len(failing) == len(found) - 1  # the energy may be as good


@pytest.mark.slow
def test_a_tiny_model_layer_by_layer(tmp_path):
  settings = rows.Settings(True, time.time(), CPU, 0.0, "Q-GaLore")
  pools.run(rows.Part("pools", tmp_path / "rows"), settings)
  (row,) = rows.read(tmp_path / "rows")
  assert row["name"] == "tiny, Q-GaLore, all memory"
  assert row["loss"] == pytest.approx(4.16, abs=0.3) and row["seconds"] > 0
