import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest

from train import loop, metrics, pretrain, step

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def flags(text_file, tmp_path_factory):
  settings = {
    "data.path": text_file,
    "data.cache": tmp_path_factory.mktemp("cache"),
    "data.length": 16,
    "data.batch": 8,
    "model.vocab_size": 300,
    "model.d_model": 32,
    "model.d_ff": 48,
    "model.n_layers": 2,
    "optimizer.rank": 4,
    "optimizer.update_proj_gap": 3,
    "optimizer.learning_rate": 0.01,
    "train.steps": 12,
    "run.eval_every": 6,
    "run.checkpoint_every": 4,
    "run.log_every": 1,
    "run.sample_tokens": 3,
  }
  return [x for k, v in settings.items() for x in ("--set", f"{k}={v}")]


def losses(out):
  records = metrics.read(out / "metrics.jsonl")
  return [r["loss"] for r in records if "loss" in r]


def test_the_command_end_to_end(flags, tmp_path):
  out = tmp_path / "run"
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1"
  }
  done = subprocess.run(
    [sys.executable, "-m", "train.pretrain", "--out", str(out), *flags],
    cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  words = ("compiled", "held-out", "unigram", "optax.contrib.galore")
  for word in (*words, "this run (galore)", "sample: The people", "run.png"):
    assert word in done.stdout, word
  assert {p.name for p in out.iterdir()} == {
    "config.json", "metrics.jsonl", "tokenizer.json", "checkpoints",
    "run.png", "sample.txt",
  }  # fmt: skip
  assert (out / "run.png").read_bytes().startswith(b"\x89PNG")
  assert {p.name for p in (out / "checkpoints").iterdir()} == {"8", "12"}
  records = metrics.read(out / "metrics.jsonl")
  held_out = {r["step"]: r for r in records if "held_out_loss" in r}
  assert list(held_out) == [0, 6, 12]
  assert held_out[12]["held_out_loss"] < held_out[0]["held_out_loss"] - 0.5
  assert held_out[12]["held_out_perplexity"] == pytest.approx(
    math.exp(held_out[12]["held_out_loss"])
  )


def test_an_interrupted_run_goes_on_to_the_same_numbers(
  flags, tmp_path, monkeypatch, capsys
):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  assert pretrain.main(["--out", str(whole), *flags]) == 0
  record = loop.record

  def interrupt(job, progress, speed, index, values):
    record(job, progress, speed, index, values)
    if index == 5:
      signal.raise_signal(signal.SIGINT)

  monkeypatch.setattr(loop, "record", interrupt)
  capsys.readouterr()
  assert pretrain.main(["--out", str(cut), *flags]) == 130
  assert "the same command continues" in capsys.readouterr().out
  assert len(losses(cut)) < 12
  monkeypatch.setattr(loop, "record", record)
  assert pretrain.main(["--out", str(cut), *flags]) == 0
  assert "continuing from the checkpoint" in capsys.readouterr().out
  assert losses(cut) == losses(whole)
  assert len(losses(cut)) == 12
  # Once more: nothing to train, the report again, the log as it was.
  before = (cut / "metrics.jsonl").read_text()
  assert pretrain.main(["--out", str(cut), *flags]) == 0
  assert "this run (galore)" in capsys.readouterr().out
  assert (cut / "metrics.jsonl").read_text() == before


def test_a_loss_that_is_not_finite_stops_the_run(
  flags, tmp_path, monkeypatch, capsys
):
  plain = step.token_losses

  def overflow(graphdef, params, rows):
    found = plain(graphdef, params, rows)
    return jnp.where(params["norm"]["scale"][0] != 1.0, jnp.inf, found)

  monkeypatch.setattr(step, "token_losses", overflow)
  assert pretrain.main(["--out", str(tmp_path / "run"), *flags]) == 1
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  assert "step 3: loss inf" in error and "learning_rate" in error


BAD = {
  "preset": (["--preset", "llama"], "'llama' is unknown"),
  "optimizer": (["--optimizer", "adam"], "'adam' is unknown"),
  "field": (["--set", "model.width=3"], "no field 'width'"),
  "type": (["--set", "train.steps=many"], "train.steps=many: must be"),
  "file": (["--set", "data.path=/no/such.txt"], "/no/such.txt does not exist"),
  "batch": (["--set", "data.batch=99999"], "data.batch=99999"),
  "mesh": (["--set", "mesh.fsdp=3"], "does not divide"),
  "shards": (["--set", "mesh.data=1000"], "devices were found"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_one_line_and_status_2(name, flags, tmp_path, capsys):
  extra, message = BAD[name]
  out = tmp_path / "run"
  order = [*flags, *extra, "--out", str(out)]
  if name == "batch":
    order += ["--set", "data.batch=99992"]  # 8 devices divide it
    message = "data.batch=99992"
  assert pretrain.main(order) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and error.count("\n") == 1
  assert message in error, error
  assert not out.exists()


def test_a_folder_of_another_run_is_left_alone(flags, tmp_path, capsys):
  (tmp_path / "config.json").write_text(json.dumps({"optimizer.rank": 5}))
  assert pretrain.main([*flags, "--out", str(tmp_path)]) == 2
  assert "optimizer.rank: 5 there, 4 now" in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_help_lists_presets_and_fields(capsys):
  with pytest.raises(SystemExit) as raised:
    pretrain.main(["--help"])
  assert raised.value.code == 0
  text = capsys.readouterr().out
  assert "llama_7b" in text and "optimizer.update_proj_gap=" in text
