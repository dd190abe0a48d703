"""From text to batches: load, hold out, tokenize, cut, share out.

A text in memory is tokenised as a whole, a stream as it is read. Either way a
run evaluates on rows that are prepared here, once, and trains on batches that
a `Loader` makes ahead of the step.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import datasets
import numpy as np
import tokenizers

from train.common import atomic_files
from train.common.errors import UserError
from train.config.schema import DataConfig, SharedDataConfig
from train.data import holdout, packing, sources, stream
from train.data import tokenizer as tokenizer_lib
from train.data.prefetch import Loader, State
from train.data.tokenizer import Encoder

SAMPLE = 2000  # documents of a stream in which token frequencies are counted
# Characters of a stream that a tokenizer is trained on.
TEXT_SAMPLE = 50_000_000


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A text that is ready to train on: batches, held-out rows, tokenizer."""

  config: DataConfig
  encoder: Encoder
  feed: packing.Rows | stream.Stream
  held_out: np.ndarray  # (rows, length + 1) int32: what an evaluation reads
  held_out_bytes: (
    int  # UTF-8 bytes that the predicted held-out tokens stand for
  )
  counts: np.ndarray  # (vocabulary,) of each id in (a sample of) the training

  @property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """Turns text into ids and back."""
    return self.encoder.tokenizer

  @property
  def train_tokens(self) -> int | None:
    """Tokens in the training rows; None for a stream, which is not counted."""
    if isinstance(self.feed, stream.Stream):
      return None
    return int((self.feed.rows != packing.PAD).sum())

  @functools.cached_property
  def digest(self) -> str:
    """Tells other text, or other tokens of it, apart; of a stream what it can.

    That is the tokenizer and what is evaluated; in memory all rows, too.
    """
    found = hashlib.blake2b(self.tokenizer.to_str().encode(), digest_size=16)
    found.update(np.ascontiguousarray(self.held_out).data)
    if isinstance(self.feed, packing.Rows):
      found.update(np.ascontiguousarray(self.feed.rows).data)
    return found.hexdigest()

  def describe(self) -> str:
    """What is trained on and evaluated, in half a line."""
    known = self.train_tokens
    size = "streamed" if known is None else f"{known:,} training tokens"
    held_out = int((self.held_out != packing.PAD).sum())
    return (
      f"{size}, {held_out:,} evaluated; a step reads {self.config.batch} x"
      f" {self.config.length}, {self.config.rows}"
    )

  def loader(
    self,
    seed: int,
    part: int = 0,
    parts: int = 1,
    state: State | None = None,
  ) -> Loader:
    """The batches of one process; close it in the end.

    Args:
      seed: decides the order of the rows.
      part: which part of each global batch: from 0, in the order of the rows.
      parts: into how many the batch is cut. Processes that hold the same rows
        (a mesh whose tensor axis spans them) have the same part.
      state: a position that `Loader.state` gave; None: the beginning.

    Raises:
      UserError: the batch does not divide into `parts`, or the position is
        not one of this text.
    """
    if self.config.batch % parts:
      raise UserError(
        f"data.batch is {self.config.batch}, which {parts} processes do not"
        f" divide; use a multiple of {parts}"
      )
    state = self.feed.start(part, parts) if state is None else state
    batches = self.feed.batches(state, seed, part, parts)
    return Loader(batches, state, self.config.prefetch)


def cache_folder(config: SharedDataConfig) -> pathlib.Path:
  """Where tokenizers and tokenized text are kept between runs."""
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  folder = config.cache or pathlib.Path(base) / "galore_optax"
  return atomic_files.make_folder(pathlib.Path(folder), "data.cache")


def prepare(config: DataConfig, vocab_size: int) -> Corpus:
  """Loads the text of a run and holds out, tokenizes and cuts it.

  Of a stream no more is read than the held-out rows, a sample for the
  frequencies of its tokens and, where one is trained, for the tokenizer.

  Raises:
    UserError: the text or its tokenizer cannot be read, or it is too short
      for one batch.
  """
  cache = cache_folder(config)
  source = sources.load(config, cache)
  if source.streamed:
    return _prepare_stream(source, config, vocab_size, cache)
  return _prepare_whole(source, config, vocab_size, cache)


def _prepare_whole(
  source: sources.Source,
  config: DataConfig,
  vocab_size: int,
  cache: pathlib.Path,
) -> Corpus:
  train, held_out = cast(datasets.Dataset, source.train), source.held_out
  if held_out is None:
    train, held_out = holdout.split(train, config.holdout_every)
  texts: list[str] = list(cast(Any, held_out)["text"])
  train = holdout.without(train, texts, source.name)
  encoder = tokenizer_lib.find(config, vocab_size, train["text"], cache)
  evaluated, widths, _ = _held_out_rows(texts, encoder, config)
  chosen = packing.spread(len(evaluated), config.eval_rows)
  feed = packing.Rows(_training_rows(train, encoder, config), config.batch)
  _check_size(source.name, config, feed.rows, evaluated)
  return Corpus(
    config,
    encoder,
    feed,
    evaluated[chosen],
    int(widths[chosen, 1:].sum()),
    _count(feed.rows, vocab_size),
  )


def _prepare_stream(
  source: sources.Source,
  config: DataConfig,
  vocab_size: int,
  cache: pathlib.Path,
) -> Corpus:
  def is_held_out(text: str) -> bool:
    by_text = source.held_out is None
    return by_text and holdout.chosen(text, config.holdout_every)

  def keep(text: str) -> bool:
    return not is_held_out(text) and holdout.digest(text) not in taken

  shards = _shards(source, source.train)
  train = itertools.filterfalse(is_held_out, shards.documents())
  sample = _first(train, TEXT_SAMPLE)
  encoder = tokenizer_lib.find(config, vocab_size, sample, cache)
  if source.held_out is None:
    held_out = filter(is_held_out, shards.documents())
  else:
    held_out = _shards(source, source.held_out).documents()
  rows, widths, taken = _held_out_rows(
    held_out, encoder, config, config.eval_rows
  )
  if not len(rows):
    raise UserError(_no_held_out(source.name, config))
  seen = list(itertools.islice(filter(keep, shards.documents()), SAMPLE))
  if not seen:
    raise UserError(
      f"{source.name} has no document that is not held out; name other text"
      " with data.validation, or set it empty"
    )
  feed = stream.Stream(
    shards,
    keep,
    encoder,
    config.rows == "packed",
    config.length,
    config.batch,
    config.shuffle_buffer,
  )
  return Corpus(
    config,
    encoder,
    feed,
    rows,
    int(widths[:, 1:].sum()),
    _count(np.concatenate(encoder.encode(seen)), vocab_size),
  )


def _shards(source: sources.Source, documents: Any) -> stream.Shards:
  return stream.Shards(documents, source.field, source.name)


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
  """Texts up to about so many characters in all."""
  for text in texts:
    yield text
    characters -= len(text)
    if characters <= 0:
      return


def _held_out_rows(
  texts: Iterable[str],
  encoder: Encoder,
  config: DataConfig,
  limit: int | None = None,
) -> tuple[np.ndarray, np.ndarray, set[int]]:
  """Rows of held-out documents, the first `limit` or all.

  Returns:
    (rows, length + 1) ids and the bytes that each stands for, and digests of
    the documents that were read for them.
  """
  documents, taken, tokens = [], set(), 0
  for chunk in stream.chunks(texts):
    documents += encoder.measure(chunk)
    taken |= {holdout.digest(text) for text in chunk}
    tokens += sum(len(ids) for ids, _ in documents[-len(chunk) :])
    filled = tokens // (config.length + 1)
    if config.rows == "padded":
      filled = len(documents)
    if limit is not None and filled >= limit:
      break
  if not documents:
    empty = np.zeros((0, config.length + 1), np.int32)
    return empty, empty, taken
  ids, widths = zip(*documents, strict=True)
  if config.rows == "padded":
    rows = packing.pad(ids, config.length)
    sizes = packing.pad(widths, config.length, filler=0)
  else:
    rows = packing.pack(np.concatenate(ids), config.length)
    sizes = packing.pack(np.concatenate(widths), config.length)
  return rows[:limit], sizes[:limit], taken


def _training_rows(
  documents: datasets.Dataset, encoder: Encoder, config: DataConfig
) -> np.ndarray:
  """All documents as rows (n, length + 1) int32."""
  with sources.quiet():
    tokens = documents.map(
      lambda texts: {"ids": encoder.encode(texts)},
      batched=True,
      input_columns="text",
      remove_columns=["text"],
    )
  tokens = cast(datasets.Dataset, tokens)
  columns: Any = tokens.with_format("numpy", dtype=np.int32).iter(1000)
  ids = [ids for batch in columns for ids in batch["ids"]]
  if config.rows == "padded":
    return packing.pad(ids, config.length)
  return packing.pack(np.concatenate(ids), config.length)


def _count(ids: np.ndarray, vocab_size: int) -> np.ndarray:
  """How often each id of the vocabulary occurs."""
  return np.bincount(ids[ids != packing.PAD], minlength=vocab_size)


def _check_size(
  name: str, config: DataConfig, train: np.ndarray, held_out: np.ndarray
) -> None:
  if len(train) < config.batch:
    raise UserError(
      f"{name} gives {len(train)} rows of {config.length + 1} tokens, fewer"
      f" than one batch of data.batch={config.batch}; lower data.batch or"
      f" data.length, or give more text than {train.size} tokens"
    )
  if not len(held_out):
    raise UserError(_no_held_out(name, config))


def _no_held_out(name: str, config: DataConfig) -> str:
  return (
    f"{name}: the held-out documents do not fill one row of data.length + 1 ="
    f" {config.length + 1} tokens; lower data.length or data.holdout_every, or"
    " give more text"
  )


def evaluation_batches(
  rows: np.ndarray, batch: int, part: int = 0, parts: int = 1
) -> Iterator[np.ndarray]:
  """Batches that cover the held-out rows, or one part of each batch.

  Yields:
    Rows (batch / parts, length + 1): the last batch is filled up with rows
    of padding, so that all have one shape.
  """
  size = batch // parts
  for start in range(part * size, len(rows) + part * size, batch):
    found = rows[start : start + size]
    full = np.full((size, rows.shape[1]), packing.PAD, np.int32)
    full[: len(found)] = found
    yield full


def unigram_perplexity(counts: np.ndarray, targets: np.ndarray) -> float:
  """Perplexity of a model that knows only how often each token occurs.

  Args:
    counts: (vocabulary,) occurrences in the training text. One is added to
      each, so that no token is impossible.
    targets: held-out ids to predict, any shape; padding is left out.
  """
  counts = counts + 1.0
  nll = np.log(counts.sum()) - np.log(counts)[targets[targets != packing.PAD]]
  return float(np.exp(nll.mean()))
