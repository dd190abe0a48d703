"""Runs the LLaMA of transformers on small random weights.

    python -m tests.parity.llama_run

records configs, weights and logits in `llama.npz`; the tests compare with this
record. Recording needs the extra `parity`; where it is installed, the tests
also run transformers live.
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
    # The spelling of transformers before version 5, and that of version 5.
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
  """The model, with weights that are large enough for distinct logits."""
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
  """The weights by name, and the logits."""
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
