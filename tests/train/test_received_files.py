"""Damaged files of others, each refused in a line that names file and field."""

import json
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.train.conftest import TINY
from tests.train.test_plot import make_run
from train import hf, plot, sample
from train.data import tokenizer
from train.models import llama
from train.pretrained import checkpoint_folder, llama_checkpoint, llama_names

TEXT = tokenizer.train(["we the people of these states " * 9], 300).to_str()
EXTRA = {
  "config.json": {"eos_token_id": 0, "max_position_embeddings": 64},
  "generation_config.json": {"eos_token_id": 0},
  "tokenizer_config.json": {"eos_token": tokenizer.END},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A sound model folder, and what is in its files."""
  params = jax.device_get(llama.init(TINY, 0))
  source = llama_names.from_params(
    "test", TINY, lambda: params, tokenizer=TEXT, extra=EXTRA
  )
  out = tmp_path_factory.mktemp("sound") / "out"
  llama_checkpoint.save(source, out)
  files = {path.name: path.read_bytes() for path in out.iterdir()}
  return types.SimpleNamespace(out=out, files=files)


@pytest.fixture
def copied(folder, tmp_path):
  """A copy of the folder, to be damaged."""
  out = tmp_path / "model"
  out.mkdir()
  for name, content in folder.files.items():
    (out / name).write_bytes(content)
  return out


def change(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(status, capsys):
  """The line of an error."""
  captured = capsys.readouterr()
  assert status == 2
  lines = [
    line for line in captured.err.splitlines() if line.startswith("error: ")
  ]
  assert len(lines) == 1
  return lines[0]


def imported(copied, capsys):
  out = copied.with_name("imported")
  line = refused(hf.main(["import", str(copied), "--out", str(out)]), capsys)
  assert not out.exists()
  return line


def sampled(path, capsys):
  flags = [str(path), "--prompt", "we", "--tokens", "2"]
  return refused(sample.main(flags), capsys)


@pytest.mark.parametrize(
  ("name", "value", "expected"),
  [
    ("rms_norm_eps", "1e-05", "a number"),
    ("num_hidden_layers", "2", "a whole number"),
    ("num_hidden_layers", True, "a whole number"),
    ("hidden_size", 32.0, "a whole number"),
    ("num_attention_heads", [4, 4], "a whole number"),
    ("num_attention_heads", 0, "from 1"),
    ("num_key_value_heads", "4", "a whole number"),
    ("rope_theta", {"a": 1}, "a number"),
    ("rope_parameters", [1], "an object"),
    ("rope_parameters", {"rope_theta": "5e5"}, "a number"),
    ("tie_word_embeddings", "false", "true or false"),
    ("vocab_size", 10**30, "to 2147483647"),
    ("eos_token_id", "0", "whole numbers"),
    ("head_dim", "8", "a whole number"),
    ("hidden_act", ["silu"], "a text"),
  ],
)
def test_a_field_of_a_wrong_type(copied, name, value, expected, capsys):
  change(copied / "config.json", **{name: value})
  line = imported(copied, capsys)
  assert f"{copied / 'config.json'}: {name}" in line and expected in line


@pytest.mark.parametrize(
  ("file", "content", "says"),
  [
    ("tokenizer_config.json", b'{"eos_token": 3}', "eos_token is 3"),
    (
      "tokenizer_config.json",
      b'{"eos_token": {"content": []}}',
      "eos_token.content is []",
    ),
    ("tokenizer_config.json", b"[]", "does not hold a JSON object"),
    ("tokenizer_config.json", b'{"eos_token": "\xff"}', "not UTF-8"),
    ("generation_config.json", b'{"eos_token_id": {}}', "eos_token_id is {}"),
    ("config.json", b"[" * 100_000, "as JSON"),
    ("tokenizer.json", b"\xff", "not UTF-8"),
    ("config.json", None, "it is a folder"),
    ("tokenizer.json", None, "it is a folder"),
    ("model.safetensors", None, "it is a folder"),
  ],
)
def test_a_file_that_is_something_else(copied, file, content, says, capsys):
  (copied / file).unlink()
  if content is None:
    (copied / file).mkdir()
  else:
    (copied / file).write_bytes(content)
  line = imported(copied, capsys)
  assert str(copied / file) in line and says in line


def test_a_tokenizer_that_the_package_refuses(copied, capsys):
  (copied / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
  line = sampled(copied, capsys)
  assert "tokenizer.json cannot be read" in line


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(copied, value, capsys):
  path = copied / checkpoint_folder.WEIGHTS
  tensors = safetensors.numpy.load_file(path)
  name = "model.layers.1.mlp.up_proj.weight"
  tensors[name][3, 5] = value
  safetensors.numpy.save_file(tensors, path, {"format": "pt"})
  for line in (imported(copied, capsys), sampled(copied, capsys)):
    assert name in line and "not finite" in line and str(copied) in line


@pytest.mark.parametrize(
  ("file", "content", "says"),
  [
    ("config.json", b"[1]", "does not hold a JSON object"),
    ("config.json", b'{"preset": "\xff"}', "not UTF-8"),
    ("config.json", b'{"preset": 1}', "preset is 1"),
    ("config.json", b'{"preset": "a"}', "has no optimizer.name"),
    ("config.json", None, "it is a folder"),
    ("metrics.jsonl", None, "it is a folder"),
    ("metrics.jsonl", b'{"step": 1, "loss": "2"}\n', "no training steps"),
    ("metrics.jsonl", b'{"step": true, "loss": 2}\n', "no training steps"),
    ("metrics.jsonl", b'{"step": 1, "loss": {}}\n', "no training steps"),
    ("metrics.jsonl", b"[" * 100_000 + b"\n", "no training steps"),
    (
      "metrics.jsonl",
      b'{"step": 1, "loss": ' + b"9" * 400 + b"}\n",
      "no training steps",
    ),
  ],
)
def test_a_run_that_cannot_be_drawn(file, content, says, tmp_path, capsys):
  out = make_run(tmp_path / "run")
  (out / file).unlink()
  if content is None:
    (out / file).mkdir()
  else:
    (out / file).write_bytes(content)
  line = refused(plot.main([str(out)]), capsys)
  assert str(out / file) in line and says in line
  assert not (out / "run.png").exists()


def test_tokens_of_a_run_that_are_no_numbers(tmp_path, capsys):
  out = make_run(tmp_path / "run")
  change(out / "config.json", **{"data.batch": "16"})
  line = refused(plot.main([str(out), "--x", "tokens"]), capsys)
  assert 'data.batch is "16"' in line


def test_a_run_with_fields_of_wrong_types_is_not_sampled(tmp_path, capsys):
  out = make_run(tmp_path / "run")
  change(out / "config.json", **{"model.n_layers": "4"})
  line = sampled(out, capsys)
  assert 'model.n_layers is "4"' in line and str(out / "config.json") in line
