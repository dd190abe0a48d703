"""Tokenizers: of a file, of the hub, or trained on the training text here.

The one that is trained is a byte-level BPE. Bytes are its alphabet, so any
text encodes and decodes back to itself. A vocabulary of 2,048 keeps the
embedding and the head of a small model small; the 32,000 entries of LLaMA's
would be most of its parameters.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable

import huggingface_hub
import numpy as np
import tokenizers

from train.common import atomic_files, hub
from train.common.errors import UserError, first_line
from train.config.schema import HUB, DataConfig
from train.data import sentencepiece_model

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


def _plain(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  # A text that contains END spelled out must not end a document.
  tokenizer.encode_special_tokens = True
  tokenizer.no_padding()
  tokenizer.no_truncation()
  # Nothing is put around a text: documents are closed by who packs them, and
  # whoever reads the exported tokenizer must not close the prompt.
  if tokenizer.post_processor is not None:
    tokenizer.post_processor = tokenizers.processors.Sequence([])
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
    return _plain(tokenizers.Tokenizer.from_file(str(path))), path, True
  tokenizer = train(texts, vocab_size)
  atomic_files.write_text(path, tokenizer.to_str())
  return tokenizer, path, False


# Names under which tokenizers are known to keep their end of a text.
ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A tokenizer, and the token that closes every document."""

  tokenizer: tokenizers.Tokenizer
  end: int
  unknown: int | None = None  # stands for text that no token stands for

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """Each text's ids (n,) int32, with the end token last and only there."""
    found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [self._close(encoding.ids) for encoding in found]

  def _close(self, ids: list[int]) -> np.ndarray:
    closed = np.asarray([*ids, self.end], np.int32)
    if self.unknown is not None:
      # A unigram model finds its end token where a text spells it.
      closed[:-1][closed[:-1] == self.end] = self.unknown
    return closed

  def measure(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each text's ids, and how many of its UTF-8 bytes each token stands for.

    The bytes of a document add up to its length. A byte-level tokenizer is
    counted by the bytes of its tokens. Of others the tokens may normalise the
    text: there a token stands for what lies between the end of the token
    before it and its own.
    """
    found = self.tokenizer.encode_batch(texts, add_special_tokens=False)
    return [
      (self._close(e.ids), self._bytes(e, text))
      for e, text in zip(found, texts, strict=True)
    ]

  def _bytes(self, encoding: tokenizers.Encoding, text: str) -> np.ndarray:
    if isinstance(self.tokenizer.decoder, tokenizers.decoders.ByteLevel):
      # Each character of such a token spells one byte.
      return np.asarray([*map(len, encoding.tokens), 0])
    widths = [len(character.encode()) for character in text]
    until = np.concatenate([[0], np.cumsum(widths, dtype=int)])
    ends = np.asarray([stop for _, stop in encoding.offsets], int)
    # What follows the last token falls to the end token.
    ends = np.concatenate([np.maximum.accumulate(ends), [len(text)]])
    return np.diff(until[ends], prepend=0)


def find(
  config: DataConfig,
  vocab_size: int,
  texts: Iterable[str],
  cache: pathlib.Path,
) -> Encoder:
  """The tokenizer that `config` names, or one trained on `texts`.

  Args:
    config: its `tokenizer` and `end_token`.
    vocab_size: entries in the model's embedding.
    texts: training documents, read only where a tokenizer is to be trained.
    cache: where trained tokenizers are kept.

  Returns:
    A tokenizer whose ids are all below `vocab_size`, and its end token.

  Raises:
    UserError: it cannot be read, is too large, or has no known end token.
  """
  if not config.tokenizer:
    if vocab_size < MINIMUM:
      raise UserError(
        f"model.vocab_size is {vocab_size}; the byte-level tokenizer needs"
        f" {MINIMUM} or more"
      )
    tokenizer, path, found = cached(list(texts), vocab_size, cache)
    print(f"tokenizer  {'read from' if found else 'trained:'} {path}")
    return make_encoder(tokenizer, END)
  name = f"data.tokenizer {config.tokenizer}"
  tokenizer, settings = _read(config.tokenizer, name)
  end = _end_token(tokenizer, config.end_token, settings, name)
  tokenizer = _fit(tokenizer, vocab_size, end, name)
  print(
    f"tokenizer  {config.tokenizer}, {tokenizer.get_vocab_size():,} entries"
  )
  return make_encoder(_plain(tokenizer), end)


def make_encoder(tokenizer: tokenizers.Tokenizer, end: str) -> Encoder:
  """An encoder that closes documents with `end`, one of the vocabulary."""
  number = tokenizer.token_to_id(end)
  assert number is not None, end
  return Encoder(tokenizer, number, _unknown(tokenizer))


def _unknown(tokenizer: tokenizers.Tokenizer) -> int | None:
  """The id of what the tokenizer does not know; bytes leave nothing unknown."""
  model = tokenizer.model
  if isinstance(model, tokenizers.models.Unigram):
    return json.loads(tokenizer.to_str())["model"]["unk_id"]
  token = getattr(model, "unk_token", None)
  return None if token is None else tokenizer.token_to_id(token)


def _read(path: str, name: str) -> tuple[tokenizers.Tokenizer, dict]:
  """A tokenizer and the settings that lie beside it, or none."""
  if path.startswith(HUB):
    return _from_hub(path.removeprefix(HUB), name)
  file = pathlib.Path(path).expanduser()
  if file.is_dir():
    file /= "tokenizer.json"
  if not file.is_file():
    raise UserError(
      f"{name}: {file} does not exist; name a tokenizer.json, a SentencePiece"
      f" .model file, or {HUB}NAME"
    )
  try:
    if file.suffix == ".model":
      return sentencepiece_model.load(file), {}
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
  # The library raises a bare Exception for whatever it cannot parse.
  except Exception as error:
    if isinstance(error, UserError):
      raise
    raise UserError(
      f"{name} is no tokenizer.json that `tokenizers` reads:"
      f" {first_line(error)}"
    ) from error
  beside = file.with_name("tokenizer_config.json")
  return tokenizer, json.loads(beside.read_text()) if beside.is_file() else {}


def _from_hub(repository: str, name: str) -> tuple[tokenizers.Tokenizer, dict]:
  missing = "is not on the hub, or has no tokenizer.json"
  with hub.fetching(name, missing):
    file = huggingface_hub.hf_hub_download(repository, "tokenizer.json")
  with contextlib.suppress(huggingface_hub.errors.EntryNotFoundError):
    huggingface_hub.hf_hub_download(repository, "tokenizer_config.json")
  return _read(file, name)


def _end_token(
  tokenizer: tokenizers.Tokenizer, asked: str, settings: dict, name: str
) -> str:
  """The token that closes a document: asked for, the settings', or known."""
  own = settings.get("eos_token")
  own = own.get("content") if isinstance(own, dict) else own
  names = [asked] if asked else [own] if own else ENDS
  for token in names:
    if token is not None and tokenizer.token_to_id(token) is not None:
      return token
  raise UserError(
    f"{name} has no token {' or '.join(map(repr, names))} to close a document"
    " with; name one of its tokens with data.end_token"
  )


def _fit(
  tokenizer: tokenizers.Tokenizer, vocab_size: int, end: str, name: str
) -> tokenizers.Tokenizer:
  """The tokenizer without special entries that the model has no room for.

  T5's is such a one: 32,000 pieces, and 100 sentinels that stand for gaps in
  its own pre-training. No text means them.

  Raises:
    UserError: an entry that is needed has no room.
  """
  added = tokenizer.get_added_tokens_decoder()
  beyond = {
    i: token
    for token, i in tokenizer.get_vocab(with_added_tokens=True).items()
    if i >= vocab_size
  }
  needed = [
    i
    for i in beyond
    if beyond[i] == end or i not in added or not added[i].special
  ]
  if needed:
    raise UserError(
      f"{name} has the id {max(needed)}, but model.vocab_size is"
      f" {vocab_size}; set model.vocab_size={max(needed) + 1} or more"
    )
  if not beyond:
    return tokenizer
  parts = json.loads(tokenizer.to_str())
  parts["added_tokens"] = [
    token for token in parts["added_tokens"] if token["id"] < vocab_size
  ]
  vocabulary = parts["model"]["vocab"]
  parts["model"]["vocab"] = (
    vocabulary[:vocab_size]
    if isinstance(vocabulary, list)
    else {token: i for token, i in vocabulary.items() if i < vocab_size}
  )
  return tokenizers.Tokenizer.from_str(json.dumps(parts))
