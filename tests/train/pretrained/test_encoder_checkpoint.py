import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.train import hub
from tests.train.pretrained import encoder_files
from train.common.errors import UserError
from train.models import encoder
from train.pretrained import (
  checkpoint_folder,
  encoder_checkpoint,
  encoder_names,
)

BERT = encoder.Config(
  60, 16, 24, 2, 4, max_length=16, head="classify", labels=3
)
ROBERTA = dataclasses.replace(
  BERT, vocab_size=400, family="roberta", position_offset=2, n_types=1, pad_id=1
)
CASES = {
  "bert": (BERT, encoder_files.write_bert),
  "roberta": (ROBERTA, encoder_files.write_roberta),
}


def same(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory):
  """A folder that `save` wrote, its config and its parameters."""
  config, write_tokenizer = CASES[request.param]
  given = tmp_path_factory.mktemp("given")
  write_tokenizer(given)
  tokenizer = encoder_checkpoint.encoder_tokenizer.load(given, config)
  loaded = encoder_checkpoint.Loaded(
    config, encoder.init(config, 0), tokenizer, ()
  )
  encoder_checkpoint.save(
    loaded, given / "out", {"id2label": {"0": "no", "1": "yes"}}
  )
  return types.SimpleNamespace(out=given / "out", **dataclasses.asdict(loaded))


def copy(written, folder, tensors=None, **config):
  """Copies the folder, with other tensors or fields of config.json."""
  for file in written.out.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  old = json.loads((folder / checkpoint_folder.CONFIG).read_text())
  kept = {k: v for k, v in (old | config).items() if v is not None}
  (folder / checkpoint_folder.CONFIG).write_text(json.dumps(kept))
  if tensors is not None:
    save(tensors, folder / checkpoint_folder.WEIGHTS)
  return folder


def save(tensors, path):
  safetensors.numpy.save_file(tensors, path, {"format": "pt"})


def tensors_of(written):
  return safetensors.numpy.load_file(written.out / checkpoint_folder.WEIGHTS)


def config_of(written):
  return encoder.Config(**written.config)


def test_load_reads_what_save_wrote(written):
  found = encoder_checkpoint.load(written.out, "classify", 3)
  assert found.config == config_of(written) and found.notes == ()
  same(found.params, written.params)
  stored = json.loads((written.out / checkpoint_folder.CONFIG).read_text())
  assert stored["id2label"]["1"] == "yes"
  with pytest.raises(UserError, match="is not empty"):
    encoder_checkpoint.save(found, written.out)


def test_a_head_with_another_number_of_labels_is_initialized(written):
  found = encoder_checkpoint.load(written.out, "classify", 2, seed=1)
  [note] = found.notes
  assert note.startswith("head is initialized: the checkpoint has")
  assert "(3, 16), not (2, 16)" in note
  same(found.params["pooler"], written.params["pooler"])
  head = found.params["head"]
  assert head["kernel"].shape == (16, 2)
  assert 0.01 < head["kernel"].std() < 0.04 and (head["bias"] == 0).all()
  again, other = (
    encoder_checkpoint.load(written.out, "classify", 2, seed=seed).params[
      "head"
    ]
    for seed in (1, 2)
  )
  same(again, head)
  assert (other["kernel"] != head["kernel"]).any()


NAMES = {"0": "contradiction", "1": "neutral", "2": "ENTAILMENT"}


def test_a_head_with_classes_in_another_order_is_reordered(written, tmp_path):
  folder = copy(written, tmp_path, id2label=NAMES)
  ours = ("entailment", "neutral", "contradiction")
  found = encoder_checkpoint.load(folder, "classify", 3, names=ours)
  assert found.notes == ()
  for name, x in written.params["head"].items():
    np.testing.assert_array_equal(found.params["head"][name], x[..., ::-1])
  # Class names that are numbers are positions: the order does not change.
  for names in ((), ("0", "1", "2")):
    found = encoder_checkpoint.load(folder, "classify", 3, names=names)
    same(found.params["head"], written.params["head"])
  unnamed = {str(i): f"LABEL_{i}" for i in range(3)}
  copy(written, tmp_path, id2label=unnamed)
  found = encoder_checkpoint.load(tmp_path, "classify", 3, names=ours)
  same(found.params["head"], written.params["head"])


def test_a_head_for_other_classes_is_initialized(written, tmp_path):
  folder = copy(written, tmp_path, id2label=NAMES)
  ours = ("entailment", "neutral", "unrelated")
  found = encoder_checkpoint.load(folder, "classify", 3, names=ours)
  [note] = found.notes
  assert note == (
    "head is initialized: the checkpoint has classes of other names,"
    " contradiction, neutral, entailment"
  )
  assert (found.params["head"]["bias"] == 0).all()
  same(found.params["pooler"], written.params["pooler"])


def test_the_pooling_is_read_from_the_config(written, tmp_path):
  assert (
    encoder_checkpoint.load(written.out, "classify", 3).config.pool == "first"
  )
  folder = copy(written, tmp_path, galore_optax_pool="mean")
  assert encoder_checkpoint.load(folder, "classify", 3).config.pool == "mean"


def test_notes_list_every_tensor_that_is_not_read(written):
  found = encoder_checkpoint.load(
    written.out, "spans", remat="full", dropout=0.0
  )
  fresh, unread = found.notes
  assert "no qa_outputs.weight" in fresh
  for name in tensors_of(written):
    inside = ".embeddings." in name or ".encoder." in name
    assert (name in unread) == (not inside)
  assert (found.config.remat, found.config.dropout) == ("full", 0.0)
  assert set(found.params) == {"embed", "layers", "head"}


def test_names_in_older_checkpoints_are_read(written, tmp_path):
  """gamma and beta, position_ids, a pooler, a masked-language-model head."""
  family = config_of(written).family
  old = {}
  for name, tensor in tensors_of(written).items():
    if not name.startswith("classifier."):
      name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
      old[name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
  old[f"{family}.embeddings.position_ids"] = np.arange(16)[None]
  old["cls.predictions.bias"] = np.zeros(60, "f")
  found = encoder_checkpoint.load(copy(written, tmp_path, old), "none")
  same(found.params["layers"], written.params["layers"])
  [note] = found.notes
  assert "position_ids" in note and "cls.predictions.bias" in note
  bare = {name.removeprefix(f"{family}."): x for name, x in old.items()}
  save(bare, tmp_path / checkpoint_folder.WEIGHTS)
  same(encoder_checkpoint.load(tmp_path, "none").params, found.params)


def test_tensors_are_cast_to_param_dtype_and_shards_are_read(written, tmp_path):
  copy(written, tmp_path)
  (tmp_path / checkpoint_folder.WEIGHTS).unlink()
  index = {}
  for i, (name, tensor) in enumerate(tensors_of(written).items()):
    index[name] = f"{i}.safetensors"
    save({name: tensor}, tmp_path / index[name])
  (tmp_path / checkpoint_folder.INDEX).write_text(
    json.dumps({"weight_map": index})
  )
  found = encoder_checkpoint.load(
    tmp_path, "classify", 3, param_dtype="bfloat16"
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, a.dtype)),
    found.params,
    written.params,
  )
  assert found.params["head"]["kernel"].dtype == "bfloat16"


K_1 = "encoder.layer.1.attention.self.key.weight"
WRONG = {
  "lacks": (K_1, None, rf"lacks {K_1}; its config.json describes 2 layers"),
  "more": (
    "encoder.layer.2.output.dense.bias",
    np.ones(3, "f"),
    "does not have: .*layer.2",
  ),
  "shape": (K_1, np.ones((3, 16), "f"), r"is \(3, 16\), not \(16, 16\)"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_tensors_are_named_before_any_is_read(written, kind):
  config = config_of(written)
  name, tensor, message = WRONG[kind]
  shapes = {n: x.shape for n, x in tensors_of(written).items()}
  full = f"{config.family}.{name}"
  shapes = {n: s for n, s in shapes.items() if n != full}
  if tensor is not None:
    shapes[full] = tensor.shape

  def read(name):
    raise AssertionError(f"{name} was read")

  with pytest.raises(UserError, match=message):
    encoder_names.to_params("here", config, shapes, read)


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("model_type", "distilbert", "'distilbert'; only 'bert' and 'roberta'"),
    ("model_type", None, "model_type is None"),
    ("hidden_act", "silu", "hidden_act is 'silu'; this model computes 'gelu'"),
    ("position_embedding_type", "relative_key", "'relative_key'"),
    ("is_decoder", True, "is_decoder is True"),
    ("embedding_size", 8, "embedding_size is 8"),
    ("hidden_size", None, "has no hidden_size"),
    ("num_attention_heads", 5, "not divisible by its n_heads, 5"),
    ("vocab_size", 7, "the model's vocab_size is 7; it belongs to another"),
    ("num_hidden_layers", 3, r"lacks encoder\.layer\.2.*describes 3 layers"),
  ],
)
def test_another_architecture_is_refused(
  written, tmp_path, field, value, message
):
  copy(written, tmp_path, **{field: value})
  with pytest.raises(UserError, match=message):
    encoder_checkpoint.load(tmp_path, "classify")


def test_a_missing_file_is_named(written, tmp_path):
  with pytest.raises(
    UserError, match="none is not a folder; name a folder with"
  ):
    encoder_checkpoint.load(tmp_path / "none")
  with pytest.raises(UserError, match=r"config\.json cannot be read"):
    encoder_checkpoint.load(tmp_path)
  copy(written, tmp_path)
  (tmp_path / checkpoint_folder.TOKENIZER).unlink()
  with pytest.raises(UserError, match="has no tokenizer: neither"):
    encoder_checkpoint.load(tmp_path)
  copy(written, tmp_path)
  (tmp_path / checkpoint_folder.WEIGHTS).unlink()
  with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
    encoder_checkpoint.load(tmp_path)


USER = """
import sys
from train.pretrained import encoder_checkpoint
from train.common.errors import UserError

for name in sys.argv[1:]:
  try:
    print(encoder_checkpoint.load(f"hub:{name}", "classify", 3).config.n_layers)
  except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_repository_of_the_hub_is_read_without_its_other_weights(
  written, tmp_path
):
  """In its own process, since libraries read the hub's address at import."""
  folder = tmp_path / "models" / "owner" / "tiny"
  folder.mkdir(parents=True)
  copy(written, folder)
  (folder / "pytorch_model.bin").write_bytes(b"1")
  server = hub.Hub(tmp_path)
  server.gated.add("owner/gated")
  done = subprocess.run(
    [sys.executable, "-c", USER, "owner/tiny", "owner/none", "owner/gated"],
    env=os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)},
    cwd=pathlib.Path(__file__).parents[3],
    capture_output=True,
    text=True,
    check=True,
  )
  server.close()
  layers, missing, gated = done.stdout.splitlines()
  assert layers == "2"
  assert missing.startswith("hub:owner/none is not on the hub")
  assert "hub:owner/gated is gated" in gated
  assert not any("pytorch_model.bin" in asked for asked in server.requests)
