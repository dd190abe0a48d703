import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import jax
import pytest

from tests.train.conftest import TINY
from train import pretrain
from train.common.errors import UserError
from train.config import field_help, presets, schema
from train.data import corpus
from train.parallel import mesh
from train.run import metrics, run_dir, subspace_watch
from train.step import setup

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


@pytest.mark.slow
def test_the_command_end_to_end(flags, tmp_path):
  out = tmp_path / "run"
  environment = os.environ | {
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=1"
  }
  done = subprocess.run(
    [sys.executable, "-m", "train.pretrain", "--out", str(out), *flags],
    cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  fragments = ("compiled", "held-out", "unigram", "optax.contrib.galore")
  for fragment in (
    *fragments,
    "this run (galore)",
    "sample: The people",
    "run.png",
  ):
    assert fragment in done.stdout, fragment
  assert {p.name for p in out.iterdir()} - {".lock"} == {
    "config.json", "metrics.jsonl", "tokenizer.json", "text.json",
    "checkpoints", "run.png", "sample.txt",
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


def test_an_address_is_no_folder(flags, capsys):
  with pytest.raises(SystemExit):
    pretrain.main([*flags, "--out", "gs://bucket/run"])
  assert "gs://bucket/run is an address" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_text(flags, text_file, tmp_path):
  """The same command, behind whose file other text has come to lie."""
  data = tmp_path / "own.txt"
  data.write_text(text_file.read_text())
  settings = schema.override(
    presets.make("sotu_small", "galore"),
    [*flags[1::2], f"data.path={data}"],
  )
  prepare = lambda: corpus.prepare(settings.data, 300)
  out = tmp_path / "run"
  run_dir.write_config(out, settings, overwrite=False)
  run_dir.record_text(out, prepare())
  run_dir.record_text(out, prepare())
  before = (out / "tokenizer.json").read_text()
  data.write_text(text_file.read_text() + "\n\nMore of it.\n" * 40)
  with pytest.raises(UserError, match="belongs to a run on other text"):
    run_dir.record_text(out, prepare())
  assert (out / "tokenizer.json").read_text() == before
  run_dir.write_config(out, settings, overwrite=True)
  run_dir.record_text(out, prepare())


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
  fields = text.partition("fields for --set")[2]
  assert max(map(len, fields.splitlines())) <= 80
  # Each group by its name, each field with what it takes.
  for line in ("model: A LLaMA decoder", "mesh: Devices along each axis"):
    assert f"\n{line}" in fields
  one_line = " ".join(fields.split())
  for fragment in (
    "model.n_layers=4 number of blocks (int)",
    "0: as many as query heads (int)",
    "model.tie_embeddings=false use the transposed embedding as the head",
    'older versions began have it (auto, float32, bfloat16, "")',
    "run.prompt=The people of the United States start of the text sampled at",
  ):
    assert fragment in one_line


def test_every_field_says_what_it_means():
  groups = [type(v) for v in vars(schema.Config("")).values()]
  for group in filter(dataclasses.is_dataclass, groups):
    for field, note in field_help.field_notes(group).items():
      assert note, f"{group.__name__}.{field} has no comment"


def test_notes_are_read_beside_and_above_the_fields():
  found = field_help.field_notes(schema.RunConfig)
  assert found["keep"] == "number of newest checkpoints to keep"
  proj_type = field_help.field_notes(schema.OptimizerConfig)["proj_type"]
  assert proj_type.startswith("which side is projected:")
  assert proj_type.endswith("smallest state (auto)")


@pytest.mark.parametrize(
  ("name", "fragments"),
  [
    (
      "q_galore",
      ["weights in int8", "b2 0.95, as in its authors", "for attn.q.0"],
    ),
    ("apollo", ["2 x 32 x 48", "not measured: random projections"]),
    ("q_apollo_mini", ["weights in int8", "random projections"]),
    ("fira", ["2 x 32 x 48", "for attn.q.0"]),
    ("adamw", []),
  ],
)
def test_a_run_says_what_its_method_does(name, fragments, capsys, tmp_path):
  model = dataclasses.replace(TINY, weights="full")
  config = dataclasses.replace(presets.make("sotu_small", name), model=model)
  if name.startswith("q_"):
    config = schema.override(config, ["model.weights=int8"])
  config = schema.override(config, ["optimizer.rank=4"])
  grid = mesh.make_mesh(config.mesh, 8, jax.devices()[:1])
  built = setup.make(config, grid)
  watcher = subspace_watch.Watcher(config.run, config.optimizer, built)
  text: Any = types.SimpleNamespace(describe=lambda: "text")
  pretrain.introduce(config, text, built, watcher, tmp_path)
  text = capsys.readouterr().out
  assert all(fragment in text for fragment in fragments), text
  assert ("layers/attn/q/kernel" in text) == bool(fragments)
  assert ("b2" in text) == (name == "q_galore")
