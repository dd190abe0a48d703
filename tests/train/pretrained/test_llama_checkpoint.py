import dataclasses
import json
import types

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.train.conftest import TINY, make_trainer
from train import hf, pretrain, sample
from train.common.errors import UserError
from train.config import presets, schema
from train.data import tokenizer
from train.models import llama
from train.pretrained import (
  checkpoint_folder,
  llama_checkpoint,
  llama_config,
  llama_names,
)
from train.run import checkpoint, run_dir
from train.step import state as state_lib

SHAPES = {
  "plain": TINY,
  "tied": dataclasses.replace(
    TINY, n_kv_heads=2, tie_embeddings=True, rope_theta=5e5, norm_eps=1e-5
  ),
}
TEXT = tokenizer.train(["we the people of these states " * 9], 300).to_str()
EXTRA = {
  "config.json": {"eos_token_id": 0, "max_position_embeddings": 64},
  "tokenizer_config.json": {"eos_token": tokenizer.END},
}


def weights_of(model, **more):
  params = llama.init(model, 0)
  more = {"tokenizer": TEXT, "extra": EXTRA} | more
  return llama_names.from_params("test", model, lambda: params, **more), params


def same(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module", params=SHAPES)
def written(request, tmp_path_factory):
  """A folder that `save` wrote, the model's config and its parameters."""
  model = SHAPES[request.param]
  source, params = weights_of(model)
  out = tmp_path_factory.mktemp("written") / "out"
  llama_checkpoint.save(source, out)
  return types.SimpleNamespace(out=out, model=model, params=params)


def copy(written, tmp_path, **config):
  """Writes the folder's config with changes, and returns its tensors."""
  tensors = safetensors.numpy.load_file(written.out / checkpoint_folder.WEIGHTS)
  old = json.loads((written.out / checkpoint_folder.CONFIG).read_text())
  (tmp_path / checkpoint_folder.CONFIG).write_text(json.dumps(old | config))
  return tensors


def save(tensors, path):
  safetensors.numpy.save_file(tensors, path, {"format": "pt"})


def test_load_reads_what_save_wrote(written):
  found = llama_checkpoint.load(written.out)
  assert found.model == written.model
  assert found.tokenizer == TEXT
  assert found.end_ids == (0,)
  same(llama_names.to_params(found), written.params)


def test_shards_are_read_by_their_index(written, tmp_path):
  tensors = copy(written, tmp_path)
  parts = {"a.safetensors": {}, "b.safetensors": {}}
  for i, (name, tensor) in enumerate(tensors.items()):
    parts["ab"[i % 2] + ".safetensors"][name] = tensor
  for file, part in parts.items():
    save(part, tmp_path / file)
  index = {name: file for file, part in parts.items() for name in part}
  text = json.dumps({"weight_map": index})
  (tmp_path / checkpoint_folder.INDEX).write_text(text)
  same(llama_names.to_params(llama_checkpoint.load(tmp_path)), written.params)
  (tmp_path / checkpoint_folder.INDEX).write_text(
    text.replace("b.safe", "c.safe")
  )
  with pytest.raises(UserError, match=r"c\.safetensors cannot be read"):
    llama_checkpoint.load(tmp_path)
  (tmp_path / checkpoint_folder.INDEX).write_text(
    text.replace("b.safe", "a.safe")
  )
  with pytest.raises(UserError, match="does not fit the files"):
    llama_checkpoint.load(tmp_path)


def test_a_single_file_is_read_in_place_of_older_shards(written, tmp_path):
  tensors = copy(written, tmp_path)
  save({k: 0 * x for k, x in tensors.items()}, tmp_path / "old.safetensors")
  index = {"weight_map": dict.fromkeys(tensors, "old.safetensors")}
  (tmp_path / checkpoint_folder.INDEX).write_text(json.dumps(index))
  save(tensors, tmp_path / checkpoint_folder.WEIGHTS)
  same(llama_names.to_params(llama_checkpoint.load(tmp_path)), written.params)


@pytest.mark.parametrize(
  ("index", "says"),
  [
    ({"weight_map": None}, "weight_map must be an object.*got null"),
    ({}, "weight_map must be an object"),
    ({"weight_map": {"a": 3}}, "the file of 'a' is 3"),
    ({"weight_map": {"a": "../x.safetensors"}}, "in the same folder"),
    ({"weight_map": {"a": "/x.safetensors"}}, "in the same folder"),
  ],
)
def test_a_wrong_index_is_named(written, tmp_path, index, says):
  copy(written, tmp_path)
  (tmp_path / checkpoint_folder.WEIGHTS).unlink(missing_ok=True)
  (tmp_path / checkpoint_folder.INDEX).write_text(json.dumps(index))
  with pytest.raises(UserError, match=rf"{checkpoint_folder.INDEX}: .*{says}"):
    llama_checkpoint.load(tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "int32", "float8_e4m3fn"])
def test_tensors_that_are_no_floats_are_named(written, tmp_path, dtype):
  tensors = copy(written, tmp_path)
  name = "model.layers.1.self_attn.k_proj.weight"
  tensors[name] = tensors[name].astype(dtype)
  save(tensors, tmp_path / checkpoint_folder.WEIGHTS)
  with pytest.raises(
    UserError, match=rf"{name}' has dtype .*Convert quantized"
  ):
    llama_names.to_params(llama_checkpoint.load(tmp_path))


def test_layers_that_are_not_there_are_refused_at_once(written, tmp_path):
  tensors = copy(written, tmp_path, num_hidden_layers=1_000_000_000)
  save(tensors, tmp_path / checkpoint_folder.WEIGHTS)
  with pytest.raises(
    UserError, match=r"config\.json describes 1,000,000,000 la"
  ):
    llama_checkpoint.load(tmp_path)


def test_tensors_are_cast_to_param_dtype(written, tmp_path):
  argv = ["import", str(written.out), "--out", str(tmp_path / "half")]
  assert hf.main([*argv, "--dtype", "bfloat16"]) == 0
  found = llama_checkpoint.load(tmp_path / "half")
  config = json.loads(
    (tmp_path / "half" / checkpoint_folder.CONFIG).read_text()
  )
  assert config["torch_dtype"] == "bfloat16"
  assert found.read("model.norm.weight").dtype == ml_dtypes.bfloat16
  rounded = jax.tree.map(
    lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32),
    written.params,
  )
  same(llama_names.to_params(found), rounded)


def change(tensors, name, value):
  tensors.pop(name, None)
  if value is not None:
    tensors[name] = value


K_1 = "model.layers.1.self_attn.k_proj.weight"
WRONG_TENSORS = {
  "lacks": (K_1, None, rf"lacks {K_1}; its config.json describes 2 layers"),
  "unknown": ("model.bias", np.ones(3, "f"), r"does not have: model\.bias"),
  "shape": (K_1, np.ones((3, 32), "f"), rf"{K_1} is \(3, 32\), not "),
}


@pytest.mark.parametrize("kind", WRONG_TENSORS)
def test_wrong_tensors_are_named(written, tmp_path, kind):
  tensors = copy(written, tmp_path)
  *how, message = WRONG_TENSORS[kind]
  change(tensors, *how)
  save(tensors, tmp_path / checkpoint_folder.WEIGHTS)
  with pytest.raises(UserError, match=message):
    llama_names.to_params(llama_checkpoint.load(tmp_path))


def test_rotary_tables_are_ignored_and_a_tied_head_is_the_embedding(tmp_path):
  source, params = weights_of(SHAPES["tied"])
  llama_checkpoint.save(source, tmp_path / "out")
  written = types.SimpleNamespace(out=tmp_path / "out")
  tensors = copy(written, tmp_path)
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, "f")
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  save(tensors, tmp_path / checkpoint_folder.WEIGHTS)
  same(llama_names.to_params(llama_checkpoint.load(tmp_path)), params)
  tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
  save(tensors, tmp_path / checkpoint_folder.WEIGHTS)
  with pytest.raises(UserError, match=r"lm_head\.weight differs"):
    llama_names.to_params(llama_checkpoint.load(tmp_path))


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("model_type", "gpt2", "model_type is 'gpt2'; only 'llama', 'mistral', "),
    ("hidden_act", "gelu", "hidden_act is 'gelu'"),
    ("hidden_size", None, "has no hidden_size"),
  ],
)
def test_another_architecture_is_refused(field, value, message):
  config = llama_config.to_hf(TINY, "float32", {})
  config = {k: v for k, v in (config | {field: value}).items() if v is not None}
  with pytest.raises(UserError, match=message):
    llama_config.from_hf(config, "config.json")


def test_both_spellings_of_rope_theta_are_read():
  config = llama_config.to_hf(SHAPES["tied"], "float32", {})
  for name in ("rope_theta", "rope_parameters"):
    rest = {k: v for k, v in config.items() if k != name}
    assert llama_config.from_hf(rest, "").rope_theta == 5e5
  bare = {k: v for k, v in config.items() if not k.startswith("rope")}
  assert llama_config.from_hf(bare, "").rope_theta == 1e4


def test_a_source_without_weights_is_refused(tmp_path, capsys):
  out = str(tmp_path / "out")
  assert hf.main(["import", str(tmp_path / "none"), "--out", out]) == 2
  assert "is neither a folder nor a .gguf file" in capsys.readouterr().err
  with pytest.raises(UserError, match=r"config\.json cannot be read"):
    llama_checkpoint.load(tmp_path)
  config = llama_config.to_hf(TINY, "float32", {})
  (tmp_path / checkpoint_folder.CONFIG).write_text(json.dumps(config))
  with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
    llama_checkpoint.load(tmp_path)
  (tmp_path / checkpoint_folder.WEIGHTS).write_bytes(b"damaged")
  with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
    llama_checkpoint.load(tmp_path)
  with pytest.raises(UserError, match="is not empty"):
    llama_checkpoint.save(weights_of(TINY)[0], tmp_path)


@pytest.fixture(scope="module")
def run(trainer, tmp_path_factory):
  """The folder of a run with one checkpoint, and its parameters."""
  out = tmp_path_factory.mktemp("run")
  config = schema.Config("tiny", model=TINY)
  run_dir.write_config(out, config, overwrite=False)
  (out / "tokenizer.json").write_text(TEXT)
  state = trainer.init()
  saver = checkpoint.Checkpoints(out, keep=1)
  with jax.set_mesh(trainer.mesh):
    saver.save(state, checkpoint.Progress(1.0, None))
    saver.close()
  return types.SimpleNamespace(out=out, params=jax.device_get(state.params))


def test_a_run_is_exported(run, tmp_path, capsys):
  assert hf.main(["export", str(run.out), "--out", str(tmp_path / "o")]) == 0
  assert "parameters from" in capsys.readouterr().out
  found = llama_checkpoint.load(tmp_path / "o")
  same(llama_names.to_params(found), run.params)
  assert found.tokenizer == TEXT
  assert found.extra["config.json"]["max_position_embeddings"] == 128
  described = found.extra["tokenizer_config.json"]
  assert described["eos_token"] == tokenizer.END
  # The end token that the run recorded is used.
  other = next(
    t for t in json.loads(TEXT)["model"]["vocab"] if t != tokenizer.END
  )
  text = {"digest": "", "end_token": other}
  (run.out / run_dir.TEXT).write_text(json.dumps(text))
  assert hf.main(["export", str(run.out), "--out", str(tmp_path / "p")]) == 0
  (run.out / run_dir.TEXT).unlink()
  extra = llama_checkpoint.load(tmp_path / "p").extra
  assert extra["tokenizer_config.json"]["eos_token"] == other
  number = json.loads(TEXT)["model"]["vocab"][other]
  assert extra["config.json"]["eos_token_id"] == number
  arguments = ["export", str(run.out), "--step", "7", "--out", "x"]
  assert hf.main(arguments) == 2
  assert "checkpoints/7 cannot be read" in capsys.readouterr().err


def test_a_run_with_damaged_weights_is_not_read(
  trainer, tmp_path, monkeypatch, capsys
):
  """As after a flipped bit: what is read differs from what was saved."""
  run_dir.write_config(
    tmp_path / "run", schema.Config("tiny", model=TINY), overwrite=False
  )
  (tmp_path / "run" / "tokenizer.json").write_text(TEXT)
  sums = checkpoint.check_sums
  other = lambda state, mesh: [
    x + (i == 4) for i, x in enumerate(sums(state, mesh))
  ]
  monkeypatch.setattr(checkpoint, "check_sums", other)
  saver = checkpoint.Checkpoints(tmp_path / "run", keep=1)
  with jax.set_mesh(trainer.mesh):
    saver.save(trainer.init(), checkpoint.Progress(1.0, None))
  saver.close()
  argv = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
  assert hf.main(argv) == 2
  assert "checkpoints/0 is damaged" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_a_run_with_int8_weights_is_exported_dequantized(tmp_path):
  small = make_trainer(
    "adamw", 1, model=dataclasses.replace(TINY, weights="int8")
  )
  state = small.init()
  config = schema.Config("tiny", model=small.model)
  run_dir.write_config(tmp_path / "run", config, overwrite=False)
  (tmp_path / "run" / "tokenizer.json").write_text(TEXT)
  saver = checkpoint.Checkpoints(tmp_path / "run", keep=1)
  with jax.set_mesh(small.mesh):
    saver.save(state, checkpoint.Progress(1.0, None))
    saver.close()
  out = str(tmp_path / "o")
  assert hf.main(["export", str(tmp_path / "run"), "--out", out]) == 0
  expected = jax.device_get(small.abstract.read(state.params))
  same(llama_names.to_params(llama_checkpoint.load(tmp_path / "o")), expected)
  base = presets.make("sotu_small", "galore")
  assert llama_checkpoint.adopt(base, tmp_path / "run").model.weights == "full"


def test_a_run_starts_from_a_folder_or_a_run(written, run, trainer):
  base = presets.make("sotu_small", "galore")
  config = llama_checkpoint.adopt(
    schema.override(base, ["model.remat=full"]), written.out
  )
  expected = dataclasses.replace(written.model, remat="full", unroll=4)
  assert config.model == expected
  assert config.data.tokenizer == str(written.out / "tokenizer.json")
  assert config.data.end_token == tokenizer.END
  same(llama_checkpoint.initial_params(config), written.params)
  assert llama_checkpoint.initial_params(base) is None

  config = llama_checkpoint.adopt(base, run.out)
  assert config.model == dataclasses.replace(TINY, unroll=4)
  abstract, params = trainer.abstract, llama_checkpoint.initial_params(config)
  with jax.set_mesh(trainer.mesh):
    state = state_lib.init_state(trainer.tx, abstract, 0, params)
  same(jax.device_get(state.params), run.params)
  assert int(state.step) == 0
  # A change of the sizes after `adopt` does not fit the weights.
  wider = schema.override(config, ["model.d_ff=64"])
  with pytest.raises(UserError, match=r"is \(48, 32\), not \(64, 32\)"):
    llama_checkpoint.initial_params(wider)


def test_starting_from_weights_needs_a_tokenizer(tmp_path):
  llama_checkpoint.save(weights_of(TINY, tokenizer="")[0], tmp_path / "out")
  base = presets.make("sotu_small", "galore")
  with pytest.raises(UserError, match=r"has no tokenizer\.json"):
    llama_checkpoint.adopt(base, tmp_path / "out")
  with pytest.raises(UserError, match=r"convert the file first"):
    llama_checkpoint.adopt(base, tmp_path / "model.gguf")


def test_a_renamed_checkpoint_is_not_exported(trainer, tmp_path, capsys):
  config = schema.Config("tiny", model=TINY)
  run_dir.write_config(tmp_path / "run", config, overwrite=False)
  saver = checkpoint.Checkpoints(tmp_path / "run", keep=1)
  with jax.set_mesh(trainer.mesh):
    saver.save(trainer.init(), checkpoint.Progress(1.0, None))
  saver.close()
  folder = tmp_path / "run" / run_dir.FOLDER
  (folder / "0").rename(folder / "7")
  argv = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
  assert hf.main(argv) == 2
  assert "checkpoints/7 is damaged: it holds step 0" in capsys.readouterr().err


def test_a_set_tokenizer_replaces_a_missing_one(written, tmp_path):
  for file in written.out.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  (tmp_path / checkpoint_folder.TOKENIZER).unlink()
  (tmp_path / "tokenizer.model").write_bytes(b"pieces")
  base = presets.make("sotu_small", "galore")
  with pytest.raises(UserError, match=r"such as .*\.model, with --set"):
    llama_checkpoint.adopt(base, tmp_path)
  path = str(tmp_path / "tokenizer.model")
  config = llama_checkpoint.adopt(base, tmp_path, path)
  assert config.data.tokenizer == path
  assert config.data.end_token == tokenizer.END
  assert config.model.vocab_size == TINY.vocab_size


def test_the_command_looks_at_the_tokenizer_that_is_set(
  written, tmp_path, monkeypatch
):
  for file in written.out.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  (tmp_path / checkpoint_folder.TOKENIZER).unlink()
  found = []
  monkeypatch.setattr(pretrain, "run", lambda c, out, o: found.append(c) or 0)
  argv = ["--from", str(tmp_path), "--out", str(tmp_path / "run")]
  assert pretrain.main([*argv, "--set", "data.tokenizer=my.model"]) == 0
  assert [config.data.tokenizer for config in found] == ["my.model"]


def test_a_checkpoint_that_is_not_finite_is_not_sampled(
  trainer, tmp_path, capsys
):
  out = tmp_path / "run"
  config = schema.Config("tiny", model=TINY)
  run_dir.write_config(out, config, overwrite=False)
  (out / "tokenizer.json").write_text(TEXT)
  state = trainer.init()
  state.params["norm"]["scale"] *= np.nan
  saver = checkpoint.Checkpoints(out, keep=1)
  with jax.set_mesh(trainer.mesh):
    saver.save(state, checkpoint.Progress(1.0, None))
  saver.close()
  assert sample.main([str(out), "--prompt", "we"]) == 2
  error = capsys.readouterr().err
  assert f"{out}: 32 of 32 numbers in model.norm.weight are not" in error


@pytest.mark.parametrize("value", [1e39, -1e39])
def test_numbers_beyond_the_dtype_are_named(written, tmp_path, value):
  tensors = copy(written, tmp_path)
  name = "model.norm.weight"
  tensors[name] = np.full(tensors[name].shape, value, np.float64)
  save(tensors, tmp_path / checkpoint_folder.WEIGHTS)
  weights = llama_checkpoint.load(tmp_path)
  with pytest.raises(UserError, match=r"model.norm.weight are not finite in"):
    llama_names.to_params(weights)


def test_a_chat_template_of_its_own_file_is_kept(written, tmp_path):
  save(copy(written, tmp_path), tmp_path / checkpoint_folder.WEIGHTS)
  (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
  argv = ["import", str(tmp_path), "--out", str(tmp_path / "out")]
  assert hf.main(argv) == 0
  name = checkpoint_folder.TOKENIZER_CONFIG
  found = json.loads((tmp_path / "out" / name).read_text())
  assert found["chat_template"] == "{{ messages }}"


def test_an_empty_tokenizer_is_not_taken_for_none(written, tmp_path):
  save(copy(written, tmp_path), tmp_path / checkpoint_folder.WEIGHTS)
  (tmp_path / checkpoint_folder.TOKENIZER).write_text("\n")
  with pytest.raises(UserError, match=r"tokenizer\.json is empty"):
    llama_checkpoint.load(tmp_path)
