"""Damaged files of others, each refused in a line that names file and field."""

import json
import resource
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.train.conftest import TINY
from tests.train.test_plot import make_run
from train import hf, plot, sample
from train.common import links
from train.common.errors import UserError
from train.data import tokenizer
from train.models import llama
from train.pretrained import checkpoint_folder, llama_checkpoint, llama_names
from train.run import metrics, run_dir

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
    ("model_type", ["llama"], "only 'llama', 'mistral'"),
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


@pytest.fixture
def full_disk():
  """A disk on which no file can be larger than 4 KiB."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_during_an_export(folder, tmp_path, capsys,
                                              full_disk):  # fmt: skip
  out = tmp_path / "out"
  line = refused(
    hf.main(["import", str(folder.out), "--out", str(out)]), capsys
  )
  assert str(out) in line and "cannot be written" in line
  assert not out.exists()


@pytest.mark.parametrize("name", ["run.png", "run.svg", "run.pdf"])
def test_a_disk_that_is_full_during_a_plot(name, tmp_path, capsys, full_disk):
  out = make_run(tmp_path / "run", subspace=False)
  (out / "run.png").write_bytes(b"of before")
  before = {path.name: path.read_bytes() for path in out.iterdir()}
  line = refused(plot.main([str(out), "--out", str(out / name)]), capsys)
  assert f"{name} cannot be written" in line
  assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.fixture
def secret(tmp_path):
  """A file outside of the run's folder."""
  path = tmp_path / "secret"
  path.write_text("mine\n")
  return path


def test_a_link_is_replaced_by_the_figure(tmp_path, secret, capsys):
  out = make_run(tmp_path / "run", subspace=False)
  (out / "run.png").symlink_to(secret)
  assert plot.main([str(out)]) == 0
  assert secret.read_text() == "mine\n"
  assert not (out / "run.png").is_symlink()
  assert (out / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_link_that_the_user_names_is_followed(tmp_path, secret, capsys):
  out = make_run(tmp_path / "run", subspace=False)
  link = tmp_path / "link.png"
  link.symlink_to(secret.with_suffix(".png"))
  assert plot.main([str(out), "--out", str(link)]) == 0
  assert link.is_symlink() and secret.with_suffix(".png").is_file()


@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl"])
def test_a_link_out_of_a_run_is_not_read(file, tmp_path, capsys):
  other = make_run(tmp_path / "other", subspace=False)
  out = make_run(tmp_path / "run", subspace=False)
  (out / file).unlink()
  (out / file).symlink_to(other / file)
  line = refused(plot.main([str(out)]), capsys)
  assert f"{out / file} is a link to {other / file}" in line
  assert not (out / "run.png").exists()


def test_links_inside_of_a_run_are_read(tmp_path, capsys):
  out = make_run(tmp_path / "run", subspace=False)
  (out / "metrics.jsonl").rename(out / "old.jsonl")
  (out / "metrics.jsonl").symlink_to("old.jsonl")
  assert plot.main([str(out)]) == 0


def test_a_run_writes_to_no_link(tmp_path, secret):
  out = make_run(tmp_path / "run", subspace=False)
  (out / run_dir.LOCK).symlink_to(secret)
  mode = secret.stat().st_mode
  with run_dir.held(out):
    assert secret.read_text() == "mine\n" and secret.stat().st_mode == mode
  for name in ("metrics.jsonl", run_dir.TEXT):
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(secret)
  with pytest.raises(UserError, match=r"metrics\.jsonl is a link to"):
    metrics.Log(out, 0)
  with pytest.raises(UserError, match=r"text\.json is a link to"):
    run_dir.record_examples(out, "0f")
  (out / "model").symlink_to(tmp_path)
  links.remove_folder(out / "model")
  assert not (out / "model").exists() and secret.read_text() == "mine\n"
