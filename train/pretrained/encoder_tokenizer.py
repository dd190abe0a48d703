"""Tokenizes texts, pairs of texts, and windows of long texts for an encoder.

    tokenizer = encoder_tokenizer.load(folder, config)
    rows = tokenizer.texts(first, second, length=128)
    windows = tokenizer.windows(questions, contexts, length=384, stride=128)
    batch = tokenizer.pad(rows)         # {"ids", "mask", "types"}, each (B, T)

The tokenizer of a checkpoint is its tokenizer.json, or, in older checkpoints,
a vocab.txt (BERT's WordPiece) or a vocab.json with merges.txt (RoBERTa's
byte-level BPE).
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import tokenizers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from train.common import inputs
from train.common.errors import UserError
from train.common.fields import Fields
from train.data import tokenizer as tokenizer_lib
from train.models.encoder_config import Config

Truncation = Literal["longest_first", "only_first", "only_second"]


class Row(NamedTuple):
  """The tokens of a text or a pair of texts, with the special tokens."""

  ids: np.ndarray  # (n,) int32
  types: np.ndarray  # (n,) int32: the segment of each token


class Window(NamedTuple):
  """The tokens of a question and of a part of its context."""

  ids: np.ndarray  # (n,) int32
  types: np.ndarray  # (n,) int32
  example: int  # index of the question
  # (n, 2) int32: the first character of each token in the context, and the
  # one after its last; -1 for tokens outside the context.
  offsets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A tokenizer that adds special tokens, truncates and pads."""

  tokenizer: tokenizers.Tokenizer
  pad_id: int
  max_length: int  # number of positions of the model

  @property
  def text(self) -> str:
    """The text of a tokenizer.json."""
    plain = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
    plain.no_truncation()
    return plain.to_str(pretty=True)

  def special_tokens(self) -> dict[str, str]:
    """The special tokens by their roles, as in tokenizer_config.json."""
    first, *_, last = self.tokenizer.encode("a").tokens
    pad = self.tokenizer.id_to_token(self.pad_id)
    assert pad is not None  # `load` has checked it
    return {"pad_token": pad, "cls_token": first, "sep_token": last}

  def texts(
    self,
    first: Sequence[str],
    second: Sequence[str] | None = None,
    length: int = 0,
    truncation: Truncation = "longest_first",
  ) -> list[Row]:
    """Tokenizes texts or pairs of texts, in at most `length` tokens each.

    Args:
      first: texts.
      second: the second text of each pair; None: no pairs.
      length: maximum number of tokens, special tokens included; 0: the number
        of positions of the model.
      truncation: which text of a pair is truncated.

    Raises:
      UserError: `length` exceeds the positions of the model, or leaves no room
        for text.
    """
    length = length or self.max_length
    self._check_length(length, 1)
    truncation = "only_first" if second is None else truncation
    self.tokenizer.enable_truncation(length, strategy=truncation)
    try:
      encodings = self._encode(first, second)
    # The library has no exception type of its own for failed truncation.
    except UserError as error:
      if "Truncation" not in str(error):
        raise
      raise UserError(
        f"a pair cannot be truncated to {length} tokens by {truncation}: the"
        " other text alone has as many; use longest_first, or allow more tokens"
      ) from error
    return [Row(_array(e.ids), _array(e.type_ids)) for e in encodings]

  def windows(
    self,
    questions: Sequence[str],
    contexts: Sequence[str],
    length: int = 384,
    stride: int = 128,
    query: int = 64,
  ) -> list[Window]:
    """Tokenizes questions with their contexts, in windows of the context.

    Args:
      questions: stand first in each window, truncated to `query` tokens.
      contexts: one for each question; a long one is split into windows.
      length: maximum number of tokens of a window.
      stride: number of context tokens that neighbouring windows share.
      query: maximum number of tokens of a question.

    Returns:
      The windows of the first question, then those of the second, ...

    Raises:
      UserError: `length` exceeds the positions of the model, or is too small
        for `query` and `stride`.
    """
    self._check_length(
      length, query + stride + 1, ", task.query or task.stride"
    )
    self.tokenizer.no_truncation()
    short = [self._shorten(question, query) for question in questions]
    self.tokenizer.enable_truncation(
      length, stride=stride, strategy="only_second"
    )
    encodings = self._encode(short, contexts)
    return [
      _window(part, example)
      for example, encoding in enumerate(encodings)
      for part in (encoding, *encoding.overflowing)
    ]

  def pad(
    self,
    rows: Sequence[Row | Window],
    length: int = 0,
    count: int = 0,
    multiple: int = 32,
  ) -> dict[str, np.ndarray]:
    """Pads rows to one batch of arrays (B, T), int32.

    Args:
      rows: of `texts` or `windows`.
      length: T; 0: that of the longest row, rounded up to a `multiple`, so
        that few shapes are compiled.
      count: B; missing rows are all padding. 0: the number of rows.
      multiple: see `length`.

    Returns:
      `ids`, `mask` (1 on tokens, 0 on padding) and `types`.
    """
    longest = max(len(row.ids) for row in rows)
    rounded = -(-longest // multiple) * multiple
    shape = (count or len(rows), length or min(rounded, self.max_length))
    batch = {
      "ids": np.full(shape, self.pad_id, np.int32),
      "mask": np.zeros(shape, np.int32),
      "types": np.zeros(shape, np.int32),
    }
    for i, row in enumerate(rows):
      batch["ids"][i, : len(row.ids)] = row.ids
      batch["mask"][i, : len(row.ids)] = 1
      batch["types"][i, : len(row.ids)] = row.types
    return batch

  def _encode(
    self, first: Sequence[str], second: Sequence[str] | None
  ) -> list[tokenizers.Encoding]:
    given = first if second is None else zip(first, second, strict=True)
    with inputs.refusing("the tokenizer cannot encode the text"):
      return self.tokenizer.encode_batch(list(given))

  def _shorten(self, question: str, query: int) -> str:
    with inputs.refusing("the tokenizer cannot encode a question"):
      encoding = self.tokenizer.encode(question, add_special_tokens=False)
    if len(encoding) <= query:
      return question
    return question[: encoding.offsets[query - 1][1]]

  def _check_length(self, length: int, text: int, others: str = "") -> None:
    least = self.tokenizer.num_special_tokens_to_add(is_pair=True) + text
    if not least <= length <= self.max_length:
      raise UserError(
        f"texts cannot have {length} tokens: the model has {self.max_length}"
        f" positions, and special tokens and text need {least} or more; change"
        f" data.length{others}"
      )


def _array(values: Sequence) -> np.ndarray:
  return np.asarray(values, np.int32)


def _window(encoding: tokenizers.Encoding, example: int) -> Window:
  inside = np.array([part == 1 for part in encoding.sequence_ids])
  offsets = np.where(inside[:, None], _array(encoding.offsets), -1)
  ids, types = _array(encoding.ids), _array(encoding.type_ids)
  return Window(ids, types, example, offsets.astype(np.int32))


def load(folder: pathlib.Path, config: Config) -> Tokenizer:
  """Loads the tokenizer of a checkpoint.

  Args:
    folder: of the checkpoint.
    config: of the model, which must have an embedding for every token.

  Raises:
    UserError: there is no tokenizer, it cannot be read, or it does not fit the
      model.
  """
  path, tokenizer = _read(folder)
  tokenizer.no_padding()
  tokenizer.no_truncation()
  # A special token that is spelled in a text is text.
  tokenizer.encode_special_tokens = True
  with inputs.refusing(f"{path} cannot be used"):
    _check(tokenizer, config, path)
  return Tokenizer(tokenizer, config.pad_id, config.max_length)


def _read(folder: pathlib.Path) -> tuple[pathlib.Path, tokenizers.Tokenizer]:
  readers = {
    "tokenizer.json": lambda path, _: tokenizer_lib.parse(
      inputs.read_text(path), str(path)
    ),
    "vocab.txt": _word_pieces,
    "merges.txt": _byte_pairs,
  }
  for name, reader in readers.items():
    path = folder / name
    if path.is_file():
      settings = _settings(folder)
      with inputs.refusing(f"{path} cannot be read"):
        return path, reader(path, settings)
  raise UserError(
    f"{folder} has no tokenizer: neither tokenizer.json nor vocab.txt nor"
    " vocab.json with merges.txt; put one there"
  )


def _settings(folder: pathlib.Path) -> Fields:
  path = folder / "tokenizer_config.json"
  return inputs.read_fields(path) if path.exists() else Fields(str(path), {})


def _word_pieces(path: pathlib.Path, settings: Fields) -> tokenizers.Tokenizer:
  """BERT's tokenizer, from a vocab.txt."""
  tokenizer = tokenizers.Tokenizer(
    models.WordPiece.from_file(str(path), unk_token="[UNK]")
  )
  tokenizer.normalizer = normalizers.BertNormalizer(
    lowercase=settings.flag("do_lower_case", True),
    strip_accents=settings.flag("strip_accents", None),
    handle_chinese_chars=settings.flag("tokenize_chinese_chars", True),
  )
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece()
  ends = [(token, _id(tokenizer, token)) for token in ("[CLS]", "[SEP]")]
  tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B:1 [SEP]:1",
    special_tokens=ends,
  )
  return _with_special(tokenizer, ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))


def _byte_pairs(path: pathlib.Path, settings: Fields) -> tokenizers.Tokenizer:
  """RoBERTa's tokenizer, from a vocab.json and merges.txt."""
  vocabulary = path.with_name("vocab.json")
  inputs.check_regular(vocabulary)
  tokenizer = tokenizers.Tokenizer(
    models.BPE.from_file(str(vocabulary), str(path), unk_token="<unk>")
  )
  prefix = settings.flag("add_prefix_space", False)
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
  tokenizer.decoder = decoders.ByteLevel()
  ends = [(token, _id(tokenizer, token)) for token in ("</s>", "<s>")]
  tokenizer.post_processor = processors.RobertaProcessing(
    ends[0], ends[1], True, prefix
  )
  return _with_special(tokenizer, ("<s>", "<pad>", "</s>", "<unk>"))


def _id(tokenizer: tokenizers.Tokenizer, token: str) -> int:
  number = tokenizer.token_to_id(token)
  if number is None:
    raise ValueError(f"the vocabulary has no {token}")
  return number


def _with_special(
  tokenizer: tokenizers.Tokenizer, tokens: Sequence[str]
) -> tokenizers.Tokenizer:
  tokenizer.add_special_tokens(list(tokens))
  return tokenizer


def _check(
  tokenizer: tokenizers.Tokenizer, config: Config, path: pathlib.Path
) -> None:
  """Refuses a tokenizer that cannot be the one the model was trained with."""
  vocabulary = tokenizer.get_vocab(with_added_tokens=True)
  if not vocabulary:
    raise UserError(f"{path} has no tokens; put the model's own there")
  most = max(vocabulary.values())
  if most >= config.vocab_size:
    raise UserError(
      f"{path} has the id {most}, but the model's vocab_size is"
      f" {config.vocab_size}; it belongs to another model"
    )
  if tokenizer.id_to_token(config.pad_id) is None:
    raise UserError(
      f"{path} has no token {config.pad_id}, the model's pad_token_id; it"
      " belongs to another model"
    )
  pair = tokenizer.encode("a", "b")
  if not any(pair.special_tokens_mask):
    raise UserError(
      f"{path} adds no special tokens to a text; give it the post_processor"
      " that the model was trained with"
    )
  if max(pair.type_ids) >= config.n_types:
    raise UserError(
      f"{path} gives the second text the type {max(pair.type_ids)}, but the"
      f" model has type_vocab_size={config.n_types}; it belongs to another"
      " model"
    )
