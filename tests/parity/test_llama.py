"""Our LLaMA and that of transformers give the same logits."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.parity import llama_run
from train.models import llama
from train.pretrained import llama_checkpoint, llama_names, run_weights

NEEDS = "needs the extra `parity` (torch, transformers)"


def read(case, arrays):
  """The recorded weights of a case."""
  named = {
    name.removeprefix(f"{case}/"): array
    for name, array in arrays.items()
    if name.startswith(f"{case}/") and name.endswith(".weight")
  }
  config = json.loads(str(arrays[f"{case}/config"]))
  return llama_names.Weights(
    source=case,
    model=llama_names.model_from_hf(config, case),
    shapes={name: array.shape for name, array in named.items()},
    read=named.__getitem__,
    extra={"config.json": config},
  )


def logits(given):
  graphdef, _ = llama.abstract(given.model)
  run = jax.jit(llama.apply, static_argnums=0)
  return run(graphdef, llama_names.to_params(given), llama_run.tokens())


@pytest.fixture(scope="module")
def recorded():
  with np.load(llama_run.RECORD) as file:
    return dict(file)


@pytest.mark.parametrize("case", llama_run.CASES)
def test_recorded_logits(case, recorded):
  expected = recorded[f"{case}/logits"]
  assert np.abs(expected).max() > 1
  found = logits(read(case, recorded))
  np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", llama_run.CASES)
def test_live_logits_equal_the_recorded_ones(case, recorded):
  pytest.importorskip("transformers", reason=NEEDS)
  for name, array in llama_run.run(case).items():
    np.testing.assert_allclose(array, recorded[f"{case}/{name}"], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", llama_run.CASES)
def test_transformers_loads_our_folders(case, dtype, recorded, tmp_path):
  transformers = pytest.importorskip("transformers", reason=NEEDS)
  torch = pytest.importorskip("torch", reason=NEEDS)
  given = read(case, recorded)
  # Through our own parameters, as for a run.
  params = llama_names.to_params(given)
  ours = llama_names.from_params(
    case, given.model, lambda: params, extra=given.extra
  )
  llama_checkpoint.save(ours, tmp_path / "out", dtype)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", dtype=torch.float32
  )
  assert model.config.rope_parameters["rope_theta"] == given.model.rope_theta
  stored = llama_checkpoint.load(tmp_path / "out")
  full = dataclasses.replace(stored.model, param_dtype="float32")
  found = logits(dataclasses.replace(stored, model=full))
  np.testing.assert_allclose(found, llama_run.logits(model), atol=1e-4, rtol=0)
  if dtype == "float32":
    np.testing.assert_allclose(found, recorded[f"{case}/logits"], atol=1e-4)


def test_transformers_reads_the_exported_tokenizer(tmp_path):
  transformers = pytest.importorskip("transformers", reason=NEEDS)
  from train.data import tokenizer

  trained = tokenizer.train(["one two three two one"] * 9, 300)
  for name, text in (
    ("tokenizer.json", trained.to_str()),
    (
      "tokenizer_config.json",
      json.dumps(run_weights.describe_tokenizer("<|endoftext|>", 64)),
    ),
  ):
    (tmp_path / name).write_text(text)
  read_back = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert read_back("one two")["input_ids"] == trained.encode("one two").ids
  assert read_back.eos_token_id == trained.token_to_id("<|endoftext|>")
