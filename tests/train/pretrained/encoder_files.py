"""Writes tokenizers of BERT and RoBERTa in the files of older checkpoints."""

import json
import pathlib

import tokenizers

from tests.train.conftest import WORDS

PIECES = ["##s", "##ing", "wind", "##ow", "who", "why", "?", ".", ","]


def write_bert(folder: pathlib.Path) -> int:
  """Writes a vocab.txt; returns its size."""
  tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *PIECES]
  (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
  return len(tokens)


def write_roberta(folder: pathlib.Path) -> int:
  """Writes a vocab.json and merges.txt; returns the vocabulary's size."""
  special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
  tokenizer = tokenizers.ByteLevelBPETokenizer()
  tokenizer.train_from_iterator(
    [" ".join(WORDS)] * 5, 320, 2, False, special_tokens=special
  )
  tokenizer.save_model(str(folder))
  return len(json.loads((folder / "vocab.json").read_text()))
