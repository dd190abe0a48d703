"""A byte-level BPE tokenizer, trained on the training text and cached.

Bytes are the alphabet, so any text encodes and decodes back to itself. A
vocabulary of 2,048 keeps the embedding and the head of a small model small;
the 32,000 entries of LLaMA's would be most of its parameters.
"""

import hashlib
import pathlib
from collections.abc import Iterable

import tokenizers

from train import files

END = "<|endoftext|>"  # closes every document
MINIMUM = 257  # the 256 bytes and END


def train(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
  """Learns at most `vocab_size` entries from `texts`: END, bytes, merges."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.pre_tokenizer = level
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return _plain(tokenizer)


def load(path: pathlib.Path) -> tokenizers.Tokenizer:
  """Reads a tokenizer that `tokenizers` saved."""
  return _plain(tokenizers.Tokenizer.from_file(str(path)))


def _plain(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  # A text that contains END spelled out must not end a document.
  tokenizer.encode_special_tokens = True
  return tokenizer


def cached(
  texts: list[str], vocab_size: int, folder: pathlib.Path
) -> tuple[tokenizers.Tokenizer, pathlib.Path, bool]:
  """Trains a tokenizer, or reads the one trained on the same texts before.

  Args:
    texts: the training documents.
    vocab_size: entries to learn, at most.
    folder: where tokenizers are kept, one file for each content and size.

  Returns:
    The tokenizer, its file, and whether it was there already.
  """
  digest = hashlib.sha256(str(vocab_size).encode())
  for text in texts:
    digest.update(hashlib.sha256(text.encode()).digest())
  path = folder / f"bpe-{vocab_size}-{digest.hexdigest()[:16]}.json"
  if path.exists():
    return load(path), path, True
  tokenizer = train(texts, vocab_size)
  files.write_text(path, tokenizer.to_str())
  return tokenizer, path, False
