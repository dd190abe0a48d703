"""From a folder of transformers through training and back, for each family."""

import json
import pathlib

import jax
import numpy as np
import pytest

from tests.parity import llama_run
from tests.parity.test_llama import NEEDS, both
from tests.train.conftest import speech
from train import hf, pretrain, sample
from train.data import tokenizer
from train.pretrained import llama_checkpoint, llama_names

ROWS = 320  # of the embedding: more than the tokenizer has tokens
SETTINGS = {
  "data.length": 32,
  "data.batch": 8,
  "train.steps": 12,
  "optimizer.rank": 4,
  "optimizer.update_proj_gap": 4,
  "optimizer.learning_rate": 0.01,
  "run.eval_every": 12,
  "run.checkpoint_every": 12,
  "run.sample_tokens": 3,
}
WAYS = {
  "galore": ["--optimizer", "galore", "--set", "train.layerwise=true"],
  "q_galore": ["--optimizer", "q_galore"],
  "lean": ["--optimizer", "galore", "--lean"],
}


def write(case: str, folder: pathlib.Path, text: str) -> None:
  """A model as transformers saves it, with a tokenizer of 300 tokens."""
  build, config = llama_run.build, llama_run.config
  sizes = {"vocab_size": ROWS, "bos_token_id": None, "eos_token_id": 0}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(llama_run, "config", lambda case: config(case) | sizes)
    build(case).save_pretrained(folder)
  trained = tokenizer.train([text], 300)
  (folder / "tokenizer.json").write_text(trained.to_str())
  described = {"eos_token": tokenizer.END}
  (folder / "tokenizer_config.json").write_text(json.dumps(described))


def losses(run: pathlib.Path) -> list[float]:
  lines = (run / "metrics.jsonl").read_text().splitlines()
  return [x["loss"] for x in map(json.loads, lines) if "loss" in x]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
  "case", ["tied", *llama_run.FAMILIES, *llama_run.EXPERTS]
)
def test_imported_trained_sampled_exported(case, way, tmp_path, capsys):
  transformers = pytest.importorskip("transformers", reason=NEEDS)
  torch = pytest.importorskip("torch", reason=NEEDS)
  text = tmp_path / "speech.txt"
  text.write_text(speech(120))
  paths = [str(tmp_path / n) for n in ("theirs", "in", "run", "out")]
  theirs, imported, run, exported = paths
  write(case, pathlib.Path(theirs), text.read_text())

  assert hf.main(["import", theirs, "--out", imported]) == 0
  settings = SETTINGS | {"data.path": text, "data.cache": tmp_path / "cache"}
  words = [x for k, v in settings.items() for x in ("--set", f"{k}={v}")]
  words += ["--set", "run.log_every=1", "--from", imported, "--out", run]
  assert pretrain.main([*words, *WAYS[way]]) == 0
  found = losses(pathlib.Path(run))
  assert np.mean(found[-3:]) < 0.9 * found[0]
  flags = ["--prompt", "we the people", "--tokens", "20", "--temperature", "0"]
  assert sample.main([run, *flags]) == 0
  ours = capsys.readouterr().out.splitlines()[-1]
  assert hf.main(["export", run, "--out", exported]) == 0
  capsys.readouterr()
  assert sample.main([exported, *flags]) == 0
  assert capsys.readouterr().out.splitlines()[-1] == ours

  model = transformers.AutoModelForCausalLM.from_pretrained(
    exported, dtype=torch.float32
  )
  assert model.config.model_type == llama_run.config(case)["model_type"]
  weights = llama_checkpoint.load(pathlib.Path(run))
  params = llama_names.to_params(weights)
  expected = llama_run.logits(model)
  assert expected.shape[-1] == ROWS
  tokens = jax.numpy.asarray(llama_run.tokens())
  for logits in both(weights.model, params, tokens, True):
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
  error = float(np.abs(logits - expected).max())
  fall = f"loss {found[0]:.3f} to {np.mean(found[-3:]):.3f}"
  with capsys.disabled():
    print(f"\n{case}, {way}: {fall}, error of the logits {error:.1e}")
