"""GGUF files are read as transformers reads them."""

import dataclasses
import json

import numpy as np
import pytest

from tests.parity import llama_run
from tests.parity.test_llama import NEEDS, logits
from tests.train.pretrained import test_gguf as files
from train.pretrained import llama_checkpoint

TEXTS = (
  "We, the people of 1790: it's 12345 States'",
  "a\n\n  b\t c  café cafe\N{COMBINING ACUTE ACCENT} <|endoftext|>.",
)


@pytest.fixture(scope="module")
def transformers():
  return pytest.importorskip("transformers", reason=NEEDS)


# As far as transformers reads them: no biases of a LLaMA, no width of heads.
MODELS = {
  "llama": files.MODEL,
  "qwen2": files.FAMILIES["qwen2"],
  "qwen3": dataclasses.replace(files.FAMILIES["qwen3"], head_dim=128),
  # Of the width that it takes for granted.
  "qwen3moe": dataclasses.replace(
    files.EXPERTS["qwen3moe"], head_dim=16, d_ff=768
  ),
}


@pytest.mark.parametrize("family", MODELS)
def test_logits_are_those_of_transformers(family, tmp_path, transformers):
  torch = pytest.importorskip("torch", reason=NEEDS)
  pytest.importorskip("accelerate", reason=NEEDS)
  model = MODELS[family]
  params = files.random_params(model)
  fields = files.fields_of(model) if model.n_experts else None
  files.write(tmp_path / "m.gguf", params, family, model=model, fields=fields)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file="m.gguf", dtype=torch.float32
  )
  found, _ = logits(llama_checkpoint.load(tmp_path / "m.gguf"))
  expected = llama_run.logits(theirs)
  scale = np.abs(expected).max()  # weights of a standard deviation of 1
  np.testing.assert_allclose(found / scale, expected / scale, atol=1e-4)


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_texts_are_cut_as_by_transformers(pre, tmp_path, transformers):
  family = {"llama-bpe": "llama", "qwen2": "qwen2"}[pre]
  model = files.FAMILIES[family]
  params = files.random_params(model)
  files.write(tmp_path / "m.gguf", params, family, pre=pre, model=model)
  text = llama_checkpoint.load(tmp_path / "m.gguf").tokenizer
  if family == "llama":
    theirs = transformers.AutoTokenizer.from_pretrained(
      tmp_path, gguf_file="m.gguf"
    )
  else:  # read from the file, it would not compose characters
    bpe = json.loads(text)["model"]
    merges = [tuple(pair) for pair in bpe["merges"]]
    theirs = transformers.Qwen2Tokenizer(bpe["vocab"], merges)
  ours = files.tokenizer.tokenizers.Tokenizer.from_str(text)
  for text in TEXTS:
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
