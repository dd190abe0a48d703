"""Runs the LLaMA of transformers on small random weights.

    python -m tests.parity.llama_run

records configs, weights, tokens and logits in `llama.npz`, with which the
tests compare in every run. It needs the extra `parity`; where that is
installed the tests also repeat it live.
"""

import json
import pathlib

import numpy as np

RECORD = pathlib.Path(__file__).with_name("llama.npz")
SIZE = {
  "vocab_size": 61,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 64,
}
CASES = {
  "plain": {"num_key_value_heads": 4, "tie_word_embeddings": False},
  "grouped": {"num_key_value_heads": 2, "tie_word_embeddings": False},
  "tied": {
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    # Both spellings: of transformers before 5, and since.
    "rope_theta": 500000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rms_norm_eps": 1e-5,
  },
}


def config(case: str) -> dict:
  """The case's config.json."""
  return {"model_type": "llama", **SIZE, **CASES[case]}


def tokens() -> np.ndarray:
  """(2, 40) token ids."""
  return np.random.default_rng(1).integers(0, SIZE["vocab_size"], (2, 40))


def build(case: str):
  """The model, with weights large enough for the logits to mean something."""
  import torch
  import transformers

  torch.manual_seed(0)
  found = config(case)
  found.pop("model_type")
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**found))
  with torch.no_grad():
    for name, weight in model.named_parameters():
      mean = 1.0 if "norm" in name else 0.0
      weight.copy_(torch.randn_like(weight) * 0.3 + mean)
  return model.float().eval()


def logits(model) -> np.ndarray:
  """(2, 40, V) float32."""
  import torch

  with torch.no_grad():
    return model(torch.tensor(tokens())).logits.numpy()


def run(case: str) -> dict[str, np.ndarray]:
  """Weights by their names, and the logits."""
  model = build(case)
  arrays = {n: p.detach().numpy() for n, p in model.named_parameters()}
  return {**arrays, "logits": logits(model)}


if __name__ == "__main__":
  record = {
    f"{case}/{name}": array
    for case in CASES
    for name, array in run(case).items()
  }
  text = {f"{case}/config": json.dumps(config(case)) for case in CASES}
  np.savez_compressed(RECORD, **record, **text)
  print(f"wrote {RECORD}")
