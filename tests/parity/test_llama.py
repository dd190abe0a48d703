"""Our LLaMA, and its relatives, give the same logits as transformers."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity import llama_run
from train.models import llama
from train.pretrained import (
  llama_checkpoint,
  llama_config,
  llama_names,
  run_weights,
)

NEEDS = "needs the extra `parity` (torch, transformers)"
FIRST = 23  # tokens of the prompt, where the others follow one by one


def read(case, arrays):
  """The recorded weights of a case."""
  named = {
    name.removeprefix(f"{case}/"): array.astype(np.float32)
    for name, array in arrays.items()
    if name.startswith(f"{case}/") and name.endswith((".weight", ".bias"))
  }
  config = json.loads(str(arrays[f"{case}/config"]))
  return llama_names.Weights(
    source=case,
    model=llama_config.from_hf(config, case),
    shapes={name: array.shape for name, array in named.items()},
    read=named.__getitem__,
    extra={"config.json": config},
  )


def cached_logits(model, params, tokens):
  """Logits of a prompt, and of the tokens that follow with a cache."""
  rows, length = tokens.shape
  head = lambda x: llama.head(model, params, x, rows)
  positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
  cache = llama.empty_cache(model, rows, length + 3)
  x, cache = llama.extend(
    model, params, tokens[:, :FIRST], positions[:, :FIRST], cache
  )

  def step(cache, i):
    take = lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)
    x, cache = llama.extend(model, params, take(tokens), take(positions), cache)
    return cache, head(x)[:, 0]

  _, later = jax.lax.scan(step, cache, jnp.arange(FIRST, length))
  return jnp.concatenate([head(x), later.swapaxes(0, 1)], axis=1)


@functools.partial(jax.jit, static_argnums=(0, 3))
def both(model, params, tokens, cached):
  """Logits of whole rows, and where asked for those with a cache."""
  whole = llama.apply(llama.abstract(model)[0], params, tokens)
  return whole, cached_logits(model, params, tokens) if cached else whole


def logits(given, cached=False):
  params, tokens = llama_names.to_params(given), llama_run.tokens()
  return both(given.model, params, jnp.asarray(tokens), cached)


@functools.partial(jax.jit, static_argnums=0)
def balance(model, params, tokens, counted):
  graphdef = llama.abstract(model)[0]
  return llama.apply_with_balance(graphdef, params, tokens, None, counted)[1]


@pytest.fixture(scope="module")
def recorded():
  return llama_run.recorded()


@pytest.mark.parametrize("case", llama_run.RECORDED)
def test_recorded_logits(case, recorded):
  expected = recorded[f"{case}/logits"]
  assert np.abs(expected).max() > 1
  for found in logits(read(case, recorded), case not in llama_run.LLAMA):
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", llama_run.EXPERTS)
def test_recorded_balance_of_the_experts(case, recorded):
  given, mask = read(case, recorded), llama_run.mask()
  params, tokens = llama_names.to_params(given), llama_run.tokens()
  found = balance(given.model, params, tokens, mask.astype(np.float32))
  expected = recorded[f"{case}/balance"]
  assert expected > given.model.n_active_experts + 0.01  # not balanced
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("case", llama_run.RECORDED)
def test_live_logits_equal_the_recorded_ones(case, recorded):
  pytest.importorskip("transformers", reason=NEEDS)
  for name, array in llama_run.run(case).items():
    np.testing.assert_allclose(array, recorded[f"{case}/{name}"], atol=1e-5)


@pytest.mark.parametrize("case", llama_run.LIVE)
def test_logits_equal_those_of_a_live_model(case):
  pytest.importorskip("transformers", reason=NEEDS)
  arrays = {f"{case}/{n}": x for n, x in llama_run.run(case).items()}
  arrays[f"{case}/config"] = json.dumps(llama_run.config(case))
  for found in logits(read(case, arrays), cached=True):
    expected = arrays[f"{case}/logits"]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def save_transformers(case: str, folder: pathlib.Path) -> None:
  """Writes a case as transformers itself does."""
  llama_run.build(case).save_pretrained(folder)


@pytest.mark.parametrize("case", llama_run.CASES)
def test_folders_of_transformers_are_read(case, tmp_path):
  pytest.importorskip("transformers", reason=NEEDS)
  save_transformers(case, tmp_path / "theirs")
  found = llama_checkpoint.load(tmp_path / "theirs")
  assert found.model == llama_config.from_hf(llama_run.config(case), case)
  llama_names.check(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", llama_run.CASES)
def test_transformers_loads_our_folders(case, dtype, tmp_path):
  transformers = pytest.importorskip("transformers", reason=NEEDS)
  torch = pytest.importorskip("torch", reason=NEEDS)
  arrays = {f"{case}/{n}": x for n, x in llama_run.run(case).items()}
  arrays[f"{case}/config"] = json.dumps(llama_run.config(case))
  given = read(case, arrays)
  # Through our own parameters, as for a run.
  params = llama_names.to_params(given)
  ours = llama_names.from_params(
    case, given.model, lambda: params, extra=given.extra
  )
  llama_checkpoint.save(ours, tmp_path / "out", dtype)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", dtype=torch.float32
  )
  assert model.config.model_type == given.model.family
  assert model.config.rope_parameters["rope_theta"] == given.model.rope_theta
  stored = llama_checkpoint.load(tmp_path / "out")
  assert stored.model == given.model
  full = dataclasses.replace(stored.model, param_dtype="float32")
  found, _ = logits(dataclasses.replace(stored, model=full))
  np.testing.assert_allclose(found, llama_run.logits(model), atol=1e-4, rtol=0)
  if dtype == "float32":
    np.testing.assert_allclose(found, arrays[f"{case}/logits"], atol=1e-4)


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
