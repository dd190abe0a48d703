"""Runs the LLaMA of transformers, and its relatives, on small random weights.

    python -m tests.parity.llama_run

records configs, weights and logits in `llama.npz`, `families.npz` and
`experts.npz`; the tests compare with these records. Recording needs the extra
`parity`; where it is installed, the tests also run transformers live.
"""

import json
import pathlib
import tempfile

import numpy as np

FOLDER = pathlib.Path(__file__).parent
SIZE = {
  "vocab_size": 61,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 64,
  "pad_token_id": None,  # SmolLM3's own is not in so small a vocabulary
}
LLAMA = {
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
# The rows have 40 tokens: more than these original lengths, and more than the
# windows below.
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
YARN = {
  "rope_type": "yarn",
  "factor": 4.0,
  "original_max_position_embeddings": 16,
  "beta_fast": 2.0,
}
FAMILIES = {
  "llama3": {
    "model_type": "llama",
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_bias": True,
    "mlp_bias": True,
    "rope_theta": 500.0,
    "rope_scaling": LLAMA3,
  },
  "mistral": {
    "model_type": "mistral",
    "num_key_value_heads": 2,
    "head_dim": 6,
    "sliding_window": 7,
    "rope_scaling": {"type": "linear", "factor": 2.0},
  },
  "qwen2": {
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "use_sliding_window": True,
    "sliding_window": 5,
    "max_window_layers": 1,
    "tie_word_embeddings": True,
    "rope_theta": 100.0,
    "rope_scaling": YARN,
  },
  "qwen3": {
    "model_type": "qwen3",
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 1000.0,
    "rope_parameters": YARN
    | {"rope_theta": 1000.0, "mscale": 1.0, "mscale_all_dim": 0.5},
  },
  "smollm3": {
    "model_type": "smollm3",
    "num_key_value_heads": 2,
    "no_rope_layer_interval": 2,
    "rope_scaling": YARN | {"attention_factor": 1.5},
  },
}
# Mixtures of experts: of the widths, only that of experts is used.
EXPERTS = {
  "mixtral": {
    "model_type": "mixtral",
    "num_key_value_heads": 2,
    "sliding_window": 7,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_theta": 1e4,
    "router_aux_loss_coef": 0.02,
    "bos_token_id": None,
    "eos_token_id": None,
  },
  "qwen3_moe": {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_bias": True,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "norm_topk_prob": False,
    "tie_word_embeddings": True,
  },
}
# Run live only: their records would show nothing new.
LIVE = {
  "llama linear": {
    "model_type": "llama",
    "rope_parameters": {
      "rope_type": "linear",
      "factor": 3.0,
      "rope_theta": 500.0,
    },
  },
  "llama yarn": {
    "model_type": "llama",
    "rope_theta": 50.0,
    "rope_scaling": YARN | {"beta_slow": 0.5},
  },
  "mistral without window": {
    "model_type": "mistral",
    "num_key_value_heads": 4,
    "sliding_window": None,
  },
  "qwen2 without window": {
    "model_type": "qwen2",
    "num_key_value_heads": 4,
    "sliding_window": 3,
    "head_dim": 10,
  },
  "qwen3 with biases, windows in layers that it names": {
    "model_type": "qwen3",
    "num_key_value_heads": 1,
    "head_dim": 4,
    "attention_bias": True,
    "use_sliding_window": True,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
  },
  "qwen3 with windows everywhere": {
    "model_type": "qwen3",
    "num_key_value_heads": 2,
    "head_dim": 8,
    "use_sliding_window": True,
    "sliding_window": 6,
    "max_window_layers": 0,
  },
  "smollm3 with windows and biases": {
    "model_type": "smollm3",
    "num_key_value_heads": 4,
    "no_rope_layers": [0, 1],
    "use_sliding_window": True,
    "sliding_window": 8,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
  },
}
LIVE_EXPERTS = {
  "mixtral without window": {
    "model_type": "mixtral",
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "num_experts_per_tok": 1,
    "head_dim": 6,
    "rope_scaling": YARN,
  },
  "qwen3_moe with windows": {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "use_sliding_window": True,
    "sliding_window": 6,
  },
}
LIVE |= LIVE_EXPERTS
RECORDED = {**LLAMA, **FAMILIES, **EXPERTS}
CASES = {**RECORDED, **LIVE}


def config(case: str) -> dict:
  """The case's config.json."""
  return {"model_type": "llama", **SIZE, **CASES[case]}


def tokens() -> np.ndarray:
  """(2, 40) token ids."""
  return np.random.default_rng(1).integers(0, SIZE["vocab_size"], (2, 40))


def mask() -> np.ndarray:
  """(2, 40): 1 for tokens, 0 for what the second row takes as padding."""
  found = np.ones((2, 40), int)
  found[1, 29:] = 0
  return found


def build(case: str):
  """The model, with weights that are large enough for distinct logits."""
  import torch
  import transformers

  torch.manual_seed(0)
  described = transformers.AutoConfig.for_model(**config(case))
  model = transformers.AutoModelForCausalLM.from_config(described)
  model = model.float().eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      mean = 1.0 if "norm" in name else 0.0
      weight.copy_(torch.randn_like(weight) * 0.3 + mean)
      if case not in LLAMA:  # recorded in half precision
        weight.copy_(weight.half())
  return model


def logits(model) -> np.ndarray:
  """(2, 40, V) float32."""
  import torch

  with torch.no_grad():
    return model(torch.tensor(tokens())).logits.numpy()


def balance(model) -> np.ndarray:
  """The loss that balances the experts."""
  import torch

  ids, attended = torch.tensor(tokens()), torch.tensor(mask())
  with torch.no_grad():
    found = model(ids, attention_mask=attended, output_router_logits=True)
  return found.aux_loss.numpy()


def run(case: str) -> dict[str, np.ndarray]:
  """The weights by name, the logits, and the experts' balance."""
  model = build(case)
  if case in EXPERTS | LIVE_EXPERTS:
    return {**saved(model), "logits": logits(model), "balance": balance(model)}
  arrays = {n: p.detach().numpy() for n, p in model.named_parameters()}
  return {**arrays, "logits": logits(model)}


def saved(model) -> dict[str, np.ndarray]:
  """The weights as checkpoints have them: each expert has its own."""
  import safetensors.numpy

  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    return safetensors.numpy.load_file(f"{folder}/model.safetensors")


def record(path: pathlib.Path, cases: dict, dtype: type) -> None:
  """Writes configs, weights and logits of some cases."""
  arrays = {}
  for case in cases:
    arrays[f"{case}/config"] = np.array(json.dumps(config(case)))
    for name, array in run(case).items():
      kept = np.float32 if name in ("logits", "balance") else dtype
      arrays[f"{case}/{name}"] = array.astype(kept)
  np.savez_compressed(path, **arrays)
  print(f"wrote {path}")


def recorded() -> dict[str, np.ndarray]:
  """All records, by `case/name`."""
  found = {}
  for name in ("llama.npz", "families.npz", "experts.npz"):
    with np.load(FOLDER / name) as file:
      found |= dict(file)
  return found


if __name__ == "__main__":
  record(FOLDER / "llama.npz", LLAMA, np.float32)
  record(FOLDER / "families.npz", FAMILIES, np.float16)
  record(FOLDER / "experts.npz", EXPERTS, np.float16)
