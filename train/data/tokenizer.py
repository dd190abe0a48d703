"""Loads a tokenizer from a file or the hub, or trains one on the text.

The trained tokenizer is a byte-level BPE: its alphabet is the 256 bytes, so
any text decodes back to itself. A vocabulary of 2,048 keeps the embedding and
the head of a small model small; with the 32,000 entries of LLaMA's vocabulary
they would be most of its parameters.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import huggingface_hub
import numpy as np
import tokenizers

from train.common import atomic_files, hub, inputs
from train.common.errors import UserError, first_line
from train.config.schema import HUB, DataConfig
from train.data import sentencepiece_model

END = "<|endoftext|>"  # ends every document
MINIMUM = 257  # the 256 bytes and END


def train(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
  """Trains a byte-level BPE of at most `vocab_size` entries on `texts`."""
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


def parse(text: str, source: str) -> tokenizers.Tokenizer:
  """The tokenizer in the text of a tokenizer.json.

  Args:
    text: the content of the file.
    source: the file, as messages call it.

  Raises:
    UserError: `tokenizers` cannot read it.
  """
  if '"precompiled_charsmap"' in text:
    normalizer = inputs.parse_object(text, source).get("normalizer")
    _check_maps(normalizer, source)
  with inputs.refusing(
    f"{source} cannot be read: it is not a tokenizer.json that `tokenizers`"
    " can read"
  ):
    return tokenizers.Tokenizer.from_str(text)


def _check_maps(part: Any, source: str) -> None:
  """Checks every map of characters in a part of a tokenizer.json."""
  if isinstance(part, list):
    for each in part:
      _check_maps(each, source)
  if not isinstance(part, dict):
    return
  for name, value in part.items():
    if name == "precompiled_charsmap" and isinstance(value, str):
      with inputs.refusing(f"{source}: its {name} cannot be read"):
        content = base64.b64decode(value)
      sentencepiece_model.check_map(content, source)
    else:
      _check_maps(value, source)


def _plain(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  # A text that spells END must not end the document.
  tokenizer.encode_special_tokens = True
  tokenizer.no_padding()
  tokenizer.no_truncation()
  # No tokens are added around a text: `Encoder` adds the end token, and the
  # exported tokenizer must not end a prompt.
  if tokenizer.post_processor is not None:
    tokenizer.post_processor = tokenizers.processors.Sequence([])
  return tokenizer


def cached(
  texts: list[str], vocab_size: int, folder: pathlib.Path
) -> tuple[tokenizers.Tokenizer, pathlib.Path, bool]:
  """Trains a tokenizer, or reads it if it was trained on these texts before.

  Args:
    texts: the training documents.
    vocab_size: maximum number of entries.
    folder: has one file for each combination of texts and size.

  Returns:
    The tokenizer, its file, and whether the file already existed.
  """
  digest = hashlib.sha256(str(vocab_size).encode())
  for text in texts:
    digest.update(hashlib.sha256(text.encode()).digest())
  path = folder / f"bpe-{vocab_size}-{digest.hexdigest()[:16]}.json"
  if path.exists():
    try:
      found = parse(inputs.read_text(path), str(path))
      return _plain(found), path, True
    except UserError as error:
      print(f"note: {first_line(error)}; it is made again")
  tokenizer = train(texts, vocab_size)
  atomic_files.write_text(path, tokenizer.to_str())
  return tokenizer, path, False


# Known end-of-text tokens, in order of preference.
ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A tokenizer, and the token that ends every document."""

  tokenizer: tokenizers.Tokenizer
  end: int  # id of the end token
  unknown: int | None = None  # id of text that is not in the vocabulary

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """The ids (n,) int32 of each text; the end token is last, and only last."""
    with inputs.refusing("the tokenizer cannot encode the text"):
      encodings = self.tokenizer.encode_batch_fast(
        texts, add_special_tokens=False
      )
    return [self._close(encoding.ids) for encoding in encodings]

  def _close(self, ids: list[int]) -> np.ndarray:
    closed = np.asarray([*ids, self.end], np.int32)
    if self.unknown is not None:
      # A unigram model encodes a text that spells the end token as that token.
      closed[:-1][closed[:-1] == self.end] = self.unknown
    return closed

  def measure(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The ids of each text, and the number of UTF-8 bytes of each token.

    The bytes of all tokens add up to the length of the document. The tokens of
    a byte-level tokenizer have their own bytes. Other tokenizers may normalize
    the text: there, a token has the bytes from the end of the token before it
    to its own end.
    """
    with inputs.refusing("the tokenizer cannot encode the text"):
      encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
    return [
      (self._close(e.ids), self._bytes(e, text))
      for e, text in zip(encodings, texts, strict=True)
    ]

  def _bytes(self, encoding: tokenizers.Encoding, text: str) -> np.ndarray:
    if isinstance(self.tokenizer.decoder, tokenizers.decoders.ByteLevel):
      # Each character of such a token is one byte.
      return np.asarray([*map(len, encoding.tokens), 0])
    widths = [len(character.encode()) for character in text]
    start_bytes = np.concatenate([[0], np.cumsum(widths, dtype=int)])
    ends = np.asarray([stop for _, stop in encoding.offsets], int)
    # Text after the last token is counted for the end token.
    ends = np.concatenate([np.maximum.accumulate(ends), [len(text)]])
    return np.diff(start_bytes[ends], prepend=0)


def find(
  config: DataConfig,
  vocab_size: int,
  texts: Iterable[str],
  cache: pathlib.Path,
) -> Encoder:
  """The tokenizer that `config` names, or one trained on `texts`.

  Args:
    config: `tokenizer` and `end_token` are used.
    vocab_size: rows of the model's embedding.
    texts: training documents; read only if a tokenizer must be trained.
    cache: the folder of trained tokenizers.

  Returns:
    A tokenizer whose ids are all below `vocab_size`, and its end token.

  Raises:
    UserError: the tokenizer cannot be read, is too large, or has no known end
      token.
  """
  if not config.tokenizer:
    if vocab_size < MINIMUM:
      raise UserError(
        f"model.vocab_size is {vocab_size}; a byte-level tokenizer needs"
        f" {MINIMUM} or more"
      )
    tokenizer, path, existed = cached(list(texts), vocab_size, cache)
    print(f"tokenizer  {'read from' if existed else 'trained:'} {path}")
    return make_encoder(tokenizer, END)
  name = f"data.tokenizer {config.tokenizer}"
  tokenizer, own = _read(config.tokenizer, name)
  end = _end_token(tokenizer, config.end_token or own, name)
  with inputs.refusing(f"{name} cannot be used"):
    tokenizer = _fit(tokenizer, vocab_size, end, name)
  print(
    f"tokenizer  {config.tokenizer}, {tokenizer.get_vocab_size():,} entries"
  )
  return make_encoder(_plain(tokenizer), end)


def make_encoder(tokenizer: tokenizers.Tokenizer, end: str) -> Encoder:
  """An encoder that ends documents with `end`, a token of the vocabulary."""
  number = tokenizer.token_to_id(end)
  assert number is not None, end
  return Encoder(tokenizer, number, _unknown(tokenizer))


def _unknown(tokenizer: tokenizers.Tokenizer) -> int | None:
  """The id of the unknown token; None for tokenizers that have none."""
  model = tokenizer.model
  if isinstance(model, tokenizers.models.Unigram):
    return json.loads(tokenizer.to_str())["model"]["unk_id"]
  token = getattr(model, "unk_token", None)
  return None if token is None else tokenizer.token_to_id(token)


def _read(path: str, name: str) -> tuple[tokenizers.Tokenizer, str]:
  """A tokenizer, and its end token by the tokenizer_config.json beside it."""
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
  if file.suffix == ".model":
    return sentencepiece_model.load(file), ""
  tokenizer = parse(inputs.read_text(file), name)
  beside = file.with_name("tokenizer_config.json")
  end = inputs.read_fields(beside).token("eos_token") if beside.exists() else ""
  return tokenizer, end


def _from_hub(repository: str, name: str) -> tuple[tokenizers.Tokenizer, str]:
  missing = "is not on the hub, or has no tokenizer.json"
  with hub.fetching(name, missing):
    file = huggingface_hub.hf_hub_download(repository, "tokenizer.json")
  with contextlib.suppress(huggingface_hub.errors.EntryNotFoundError):
    huggingface_hub.hf_hub_download(repository, "tokenizer_config.json")
  return _read(file, name)


def _end_token(tokenizer: tokenizers.Tokenizer, asked: str, name: str) -> str:
  """The token that ends a document: `asked`, or the first of ENDS."""
  names = [asked] if asked else ENDS
  for token in names:
    if tokenizer.token_to_id(token) is not None:
      return token
  raise UserError(
    f"{name} has no token {' or '.join(map(repr, names))} to end a document"
    " with; name one of its tokens with data.end_token"
  )


def _fit(
  tokenizer: tokenizers.Tokenizer, vocab_size: int, end: str, name: str
) -> tokenizers.Tokenizer:
  """The tokenizer without special tokens beyond the model's vocabulary.

  T5's tokenizer has 32,000 pieces and 100 sentinels, which mark gaps in T5's
  own pre-training and do not occur in a text.

  Raises:
    UserError: a token beyond the vocabulary is not special, or is the end
      token.
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
