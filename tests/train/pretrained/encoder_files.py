"""Tokenizers of small BERTs and RoBERTas, as older checkpoints keep them."""

import json
import pathlib

import tokenizers

from tests.train.conftest import WORDS

PIECES = ["##s", "##ing", "wind", "##ow", "who", "why", "?", ".", ","]


def write_bert(folder: pathlib.Path) -> int:
  """A vocab.txt; returns its size."""
  tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *PIECES]
  (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
  return len(tokens)


def write_roberta(folder: pathlib.Path) -> int:
  """A vocab.json and merges.txt; returns the size of the vocabulary."""
  special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
  tokenizer = tokenizers.ByteLevelBPETokenizer()
  tokenizer.train_from_iterator(
    [" ".join(WORDS)] * 5, 320, 2, False, special_tokens=special
  )
  tokenizer.save_model(str(folder))
  return len(json.loads((folder / "vocab.json").read_text()))
