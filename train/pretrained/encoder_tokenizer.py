"""Texts, pairs of texts and windows of long texts as a BERT reads them.

    tokenizer = encoder_tokenizer.load(folder, config)
    rows = tokenizer.texts(first, second, length=128)
    windows = tokenizer.windows(questions, contexts, length=384, stride=128)
    batch = tokenizer.pad(rows)         # {"ids", "mask", "types"}, each (B, T)

A folder's tokenizer is its tokenizer.json, or what older checkpoints have: a
vocab.txt (WordPiece) or a vocab.json with merges.txt (RoBERTa's bytes).
"""

import dataclasses
import json
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

from train.common.errors import UserError
from train.models.encoder_config import Config

Cut = Literal["longest_first", "only_first", "only_second"]


class Row(NamedTuple):
  """One text or pair of texts with the tokens that go around them."""

  ids: np.ndarray  # (n,) int32
  types: np.ndarray  # (n,) int32: the segment of each token


class Window(NamedTuple):
  """A question and a part of its context."""

  ids: np.ndarray  # (n,) int32
  types: np.ndarray  # (n,) int32
  example: int  # which question
  # (n, 2) int32: where in the context's characters a token begins and ends;
  # -1 outside the context.
  offsets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A tokenizer that knows what to put around texts, and how to pad."""

  tokenizer: tokenizers.Tokenizer
  pad_id: int
  max_length: int  # positions of the model

  @property
  def text(self) -> str:
    """The text of a tokenizer.json."""
    plain = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
    plain.no_truncation()
    return plain.to_str(pretty=True)

  def special_tokens(self) -> dict[str, str]:
    """The tokens that pad and that stand around a text, by their roles."""
    first, *_, last = self.tokenizer.encode("a").tokens
    pad = self.tokenizer.id_to_token(self.pad_id)
    assert pad is not None  # `load` has looked
    return {"pad_token": pad, "cls_token": first, "sep_token": last}

  def texts(
    self,
    first: Sequence[str],
    second: Sequence[str] | None = None,
    length: int = 0,
    cut: Cut = "longest_first",
  ) -> list[Row]:
    """Each text, or each pair of texts, in at most `length` tokens.

    Args:
      first: texts.
      second: their partners; None: there are none.
      length: tokens that are kept, those around the texts counted; 0: as
        many as the model has positions for.
      cut: what a pair that is too long loses tokens from.

    Raises:
      UserError: `length` is more than the model has positions for, or leaves
        no room for text.
    """
    length = length or self.max_length
    self._check_length(length, 1)
    cut = "only_first" if second is None else cut
    self.tokenizer.enable_truncation(length, strategy=cut)
    try:
      found = self._encode(first, second)
    # The library has no class of its own for what it cannot cut.
    except Exception as error:
      if "Truncation" not in str(error):
        raise
      raise UserError(
        f"a pair cannot be cut {cut} to {length} tokens, as the other text"
        " alone has as many; cut longest_first, or allow more tokens"
      ) from error
    return [Row(_array(e.ids), _array(e.type_ids)) for e in found]

  def windows(
    self,
    questions: Sequence[str],
    contexts: Sequence[str],
    length: int = 384,
    stride: int = 128,
    query: int = 64,
  ) -> list[Window]:
    """Each question with its context, which long contexts share out.

    Args:
      questions: they come first, and whole: up to `query` tokens.
      contexts: as many; each fills as many windows as it needs.
      length: tokens of a window, at most.
      stride: tokens that two neighbouring windows have in common.
      query: tokens that are kept of a question.

    Returns:
      The windows of the first question, then those of the second, ...

    Raises:
      UserError: `length` is more than the model has positions for, or too
        small for `query` and `stride`.
    """
    self._check_length(
      length, query + stride + 1, ", task.query or task.stride"
    )
    self.tokenizer.no_truncation()
    short = [self._shorten(question, query) for question in questions]
    self.tokenizer.enable_truncation(
      length, stride=stride, strategy="only_second"
    )
    found = self._encode(short, contexts)
    return [
      _window(part, example)
      for example, encoding in enumerate(found)
      for part in (encoding, *encoding.overflowing)
    ]

  def pad(
    self,
    rows: Sequence[Row | Window],
    length: int = 0,
    count: int = 0,
    multiple: int = 32,
  ) -> dict[str, np.ndarray]:
    """Rows as one batch of arrays (B, T), int32.

    Args:
      rows: of `texts` or `windows`.
      length: T; 0: that of the longest row, rounded up to a `multiple`, so
        that few shapes are compiled.
      count: B; rows that are missing are all padding. 0: as many as given.
      multiple: see `length`.

    Returns:
      `ids`, `mask` (1 where a token stands) and `types`.
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
    return self.tokenizer.encode_batch(list(given))

  def _shorten(self, question: str, query: int) -> str:
    found = self.tokenizer.encode(question, add_special_tokens=False)
    if len(found) <= query:
      return question
    return question[: found.offsets[query - 1][1]]

  def _check_length(self, length: int, text: int, others: str = "") -> None:
    around = self.tokenizer.num_special_tokens_to_add(is_pair=True)
    if not around + text <= length <= self.max_length:
      raise UserError(
        f"texts of {length} tokens cannot be made: the model has"
        f" {self.max_length} positions, and {around + text} is the least that"
        " holds the tokens around two texts and what is asked of the texts;"
        f" change data.length{others}"
      )


def _array(values: Sequence) -> np.ndarray:
  return np.asarray(values, np.int32)


def _window(encoding: tokenizers.Encoding, example: int) -> Window:
  inside = np.array([part == 1 for part in encoding.sequence_ids])
  offsets = np.where(inside[:, None], _array(encoding.offsets), -1)
  ids, types = _array(encoding.ids), _array(encoding.type_ids)
  return Window(ids, types, example, offsets.astype(np.int32))


def load(folder: pathlib.Path, config: Config) -> Tokenizer:
  """The tokenizer that lies beside a checkpoint.

  Args:
    folder: the checkpoint's.
    config: of the model, which must have room for the vocabulary.

  Raises:
    UserError: there is none, it cannot be read, or it does not fit.
  """
  path, tokenizer = _read(folder)
  tokenizer.no_padding()
  tokenizer.no_truncation()
  # A text that spells a special token does not mean it.
  tokenizer.encode_special_tokens = True
  _check(tokenizer, config, path)
  return Tokenizer(tokenizer, config.pad_id, config.max_length)


def _read(folder: pathlib.Path) -> tuple[pathlib.Path, tokenizers.Tokenizer]:
  readers = {
    "tokenizer.json": lambda path, _: tokenizers.Tokenizer.from_file(str(path)),
    "vocab.txt": _word_pieces,
    "merges.txt": _byte_pairs,
  }
  for name, reader in readers.items():
    path = folder / name
    if path.is_file():
      try:
        return path, reader(path, _settings(folder))
      # The library raises a bare Exception for whatever it cannot parse.
      except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason})") from error
  raise UserError(
    f"{folder} has no tokenizer: neither tokenizer.json nor vocab.txt nor"
    " vocab.json with merges.txt"
  )


def _settings(folder: pathlib.Path) -> dict:
  path = folder / "tokenizer_config.json"
  return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _word_pieces(path: pathlib.Path, settings: dict) -> tokenizers.Tokenizer:
  """BERT's, of a vocab.txt."""
  tokenizer = tokenizers.Tokenizer(
    models.WordPiece.from_file(str(path), unk_token="[UNK]")
  )
  tokenizer.normalizer = normalizers.BertNormalizer(
    lowercase=settings.get("do_lower_case", True),
    strip_accents=settings.get("strip_accents"),
    handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
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


def _byte_pairs(path: pathlib.Path, settings: dict) -> tokenizers.Tokenizer:
  """RoBERTa's, of a vocab.json and merges.txt."""
  vocabulary = str(path.with_name("vocab.json"))
  tokenizer = tokenizers.Tokenizer(
    models.BPE.from_file(vocabulary, str(path), unk_token="<unk>")
  )
  prefix = settings.get("add_prefix_space", False)
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
  tokenizer.decoder = decoders.ByteLevel()
  ends = [(token, _id(tokenizer, token)) for token in ("</s>", "<s>")]
  tokenizer.post_processor = processors.RobertaProcessing(
    ends[0], ends[1], True, prefix
  )
  return _with_special(tokenizer, ("<s>", "<pad>", "</s>", "<unk>"))


def _id(tokenizer: tokenizers.Tokenizer, token: str) -> int:
  found = tokenizer.token_to_id(token)
  if found is None:
    raise ValueError(f"the vocabulary has no {token}")
  return found


def _with_special(
  tokenizer: tokenizers.Tokenizer, tokens: Sequence[str]
) -> tokenizers.Tokenizer:
  tokenizer.add_special_tokens(list(tokens))
  return tokenizer


def _check(
  tokenizer: tokenizers.Tokenizer, config: Config, path: pathlib.Path
) -> None:
  """Refuses what would not give the model what it was trained on."""
  most = max(tokenizer.get_vocab(with_added_tokens=True).values())
  if most >= config.vocab_size:
    raise UserError(
      f"{path} has the id {most}, but the model's vocab_size is"
      f" {config.vocab_size}; it is another model's"
    )
  if tokenizer.id_to_token(config.pad_id) is None:
    raise UserError(
      f"{path} has no token {config.pad_id}, the model's pad_token_id; it is"
      " another model's"
    )
  pair = tokenizer.encode("a", "b")
  if not any(pair.special_tokens_mask):
    raise UserError(
      f"{path} puts no tokens around a text; give it the post_processor that"
      " the model was trained with"
    )
  if max(pair.type_ids) >= config.n_types:
    raise UserError(
      f"{path} numbers the second text {max(pair.type_ids)}, but the model"
      f" has type_vocab_size={config.n_types}; it is another model's"
    )
