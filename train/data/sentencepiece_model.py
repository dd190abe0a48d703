"""Reads SentencePiece models as tokenizers of the `tokenizers` library.

Supported are the two kinds that language models use: unigram (T5), and byte
pair encoding with byte fallback (LLaMA, Mistral).
"""

import importlib
import pathlib
import re
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from train.common import inputs
from train.common.errors import UserError

SPACE = "▁"
INSIDE = re.compile(f"[^{SPACE}]{SPACE}")  # matches pieces of several words
WORD = tokenizers.Regex(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
UNIGRAM, BPE = 1, 2  # `model_type` in the file
CONTROL, UNKNOWN = 3, 2  # `type` of a piece
# Characters of a piece. SentencePiece trains pieces of up to 512 at most; only
# those that a user defines can be longer.
LONGEST = 4096
# Characters of all merges. A vocabulary of 256,000 pieces has ten million; long
# pieces that are made of each other can have as many as fill the memory.
MERGED = 100_000_000


def load(path: pathlib.Path) -> tokenizers.Tokenizer:
  """Reads a SentencePiece `.model` file.

  Raises:
    UserError: it is not such a file, or of a kind that is not supported.
  """
  proto = _parse(path)
  kind = proto.trainer_spec.model_type
  if kind not in (UNIGRAM, BPE):
    raise UserError(
      f"data.tokenizer {path} is a SentencePiece model of words or characters;"
      " unigram and bpe models are supported"
    )
  _check_pieces(proto, path)
  if proto.normalizer_spec.precompiled_charsmap:
    charsmap = proto.normalizer_spec.precompiled_charsmap
    check_map(charsmap, f"data.tokenizer {path}")
  name = f"data.tokenizer {path}"
  with inputs.refusing(f"{name} cannot be used"):
    model = _unigram(proto) if kind == UNIGRAM else _bpe(proto, name)
    return _make(proto, model)


def _make(proto: Any, model: models.Model) -> tokenizers.Tokenizer:
  """The tokenizer around a model."""
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.normalizer = _normalizer(proto.normalizer_spec)
  if not any(INSIDE.search(piece) for piece, _ in _pieces(proto)):
    # Split into words first, so that the time is linear in the text's length.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(WORD, "isolated")
  strip = [decoders.Strip(" ", 1, 0)]
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    + (strip if proto.normalizer_spec.add_dummy_prefix else [])
  )
  tokenizer.add_special_tokens(
    [p.piece for p in proto.pieces if p.type in (CONTROL, UNKNOWN)]
  )
  return tokenizer


def _parse(path: pathlib.Path) -> Any:
  try:
    pb2 = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
  except ImportError as error:
    raise UserError(
      f"data.tokenizer {path}: SentencePiece files need the package"
      " sentencepiece; pip install sentencepiece"
    ) from error
  proto, content = pb2.ModelProto(), inputs.read_bytes(path)
  with inputs.refusing(f"data.tokenizer {path} is not a SentencePiece model"):
    proto.ParseFromString(content)
  return proto


def _check_pieces(proto: Any, path: pathlib.Path) -> None:
  """Refuses pieces that no tokenizer can have."""
  for i, piece in enumerate(proto.pieces):
    if not 0 < len(piece.piece) <= LONGEST:
      raise UserError(
        f"data.tokenizer {path}: piece {i} has {len(piece.piece):,} characters;"
        f" pieces of 1 to {LONGEST:,} are supported"
      )
  if not any(piece.type == UNKNOWN for piece in proto.pieces):
    raise UserError(
      f"data.tokenizer {path} has no piece for unknown text; it is damaged, or"
      " not a SentencePiece model"
    )


def check_map(content: bytes, source: str) -> None:
  """Refuses a map of characters that does not have the size it says.

  `tokenizers` allocates that size first, and ends the process if it cannot.

  Args:
    content: begins with the size of a trie in bytes, which comes next.
    source: the file, as messages call it.
  """
  size = int.from_bytes(content[:4], "little")
  if size % 4 or not size <= len(content) - 4:
    raise UserError(
      f"{source}: its precompiled_charsmap is damaged: {len(content):,} bytes,"
      f" with a table of {size:,}"
    )


def _pieces(proto: Any) -> list[tuple[str, float]]:
  return [(piece.piece, piece.score) for piece in proto.pieces]


def _unknown(proto: Any) -> int:
  return next(i for i, p in enumerate(proto.pieces) if p.type == UNKNOWN)


def _unigram(proto: Any) -> models.Unigram:
  spec = proto.trainer_spec
  return models.Unigram(_pieces(proto), _unknown(proto), spec.byte_fallback)


def _bpe(proto: Any, name: str) -> models.BPE:
  """The BPE model.

  The file does not list merges: two pieces merge if their concatenation is a
  piece.

  Args:
    proto: the file.
    name: what messages call it.
  """
  ids = {piece: i for i, (piece, _) in enumerate(_pieces(proto))}
  special = {p.piece for p in proto.pieces if p.type in (CONTROL, UNKNOWN)}
  lengths = sorted({len(piece) for piece in ids})
  merges, merged = [], 0
  for piece, score in _pieces(proto):
    if piece in special:  # does not occur in a text
      continue
    # One after another: all halves of a long piece would fill the memory.
    halves = ((piece[:i], piece[i:]) for i in lengths if i < len(piece))
    known = [pair for pair in halves if pair[0] in ids and pair[1] in ids]
    merged += len(known) * len(piece)
    if merged > MERGED:
      raise UserError(
        f"{name}: its pieces merge in more ways than {MERGED:,} characters can"
        " list; use shorter pieces"
      )
    known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    merges += [(-score, *map(len, pair), pair) for pair in known]
  # Best score first; equal scores stay in the order of the pieces.
  merges.sort(key=lambda merge: merge[:1])
  return models.BPE(
    ids,
    [pair for *_, pair in merges],
    unk_token=proto.pieces[_unknown(proto)].piece,
    fuse_unk=True,
    byte_fallback=proto.trainer_spec.byte_fallback,
  )


def _normalizer(spec: Any) -> normalizers.Normalizer:
  """The normalization of a text, which ends by replacing spaces by SPACE."""
  steps: list[normalizers.Normalizer] = []
  if spec.precompiled_charsmap:
    steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
  if spec.remove_extra_whitespaces:
    steps.append(normalizers.Strip())
    steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
  if spec.add_dummy_prefix:
    steps.append(normalizers.Prepend(SPACE))
  steps.append(normalizers.Replace(" ", SPACE))
  return normalizers.Sequence(steps)
