"""Prepares a text for training: loads, holds out, tokenizes, makes batches.

A text in memory is tokenized as a whole, a stream while it is read. In both
cases the held-out rows are prepared once, here, and training batches come from
a `Loader` that runs ahead of the step.
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
from train.data.prefetch import Loader, State, check_position
from train.data.tokenizer import Encoder

SAMPLE = 2000  # documents of a stream whose token frequencies are counted
# Characters of a stream on which a tokenizer is trained.
TEXT_SAMPLE = 50_000_000


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A text that is ready for training: batches, held-out rows, tokenizer."""

  config: DataConfig
  encoder: Encoder
  feed: packing.Rows | stream.Stream
  held_out: np.ndarray  # (rows, length + 1) int32: rows of an evaluation
  held_out_bytes: int  # UTF-8 bytes of the text of the predicted tokens
  counts: np.ndarray  # (vocabulary,) of ids in (a sample of) the training text

  @property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer, without what the encoder adds."""
    return self.encoder.tokenizer

  @property
  def train_tokens(self) -> int | None:
    """Tokens in the training rows; None for a stream, which is not counted."""
    if isinstance(self.feed, stream.Stream):
      return None
    return int((self.feed.rows != packing.PAD).sum())

  @functools.cached_property
  def digest(self) -> str:
    """A digest that changes with the text or its tokens.

    It covers the tokenizer and the held-out rows, and all training rows of a
    text in memory. The training text of a stream is not covered.
    """
    digest = hashlib.blake2b(self.tokenizer.to_str().encode(), digest_size=16)
    digest.update(np.ascontiguousarray(self.held_out).data)
    if isinstance(self.feed, packing.Rows):
      digest.update(np.ascontiguousarray(self.feed.rows).data)
    return digest.hexdigest()

  def describe(self) -> str:
    """Sizes of the training and the held-out text, for the log."""
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
    """The training batches of one process; the caller closes the loader.

    Args:
      seed: of the order of the rows.
      part: index of this process's part of each global batch.
      parts: number of parts of a global batch. Processes that hold the same
        rows (where the mesh's tensor axis spans them) read the same part.
      state: a position from `Loader.state`; None: the beginning.

    Raises:
      UserError: the batch is not divisible by `parts`, or the position is of
        another text.
    """
    if self.config.batch % parts:
      raise UserError(
        f"data.batch is {self.config.batch}, which is not divisible by the"
        f" {parts} processes; use a multiple of {parts}"
      )
    state = self.feed.start(part, parts) if state is None else state
    check_position(state)
    batches = self.feed.batches(state, seed, part, parts)
    return Loader(batches, state, self.config.prefetch)


def cache_folder(config: SharedDataConfig) -> pathlib.Path:
  """The folder in which tokenizers and tokenized text are cached."""
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  folder = config.cache or pathlib.Path(base) / "galore_optax"
  return atomic_files.make_folder(pathlib.Path(folder), "data.cache")


def prepare(config: DataConfig, vocab_size: int) -> Corpus:
  """Loads the text of a run, holds documents out, tokenizes, and cuts rows.

  Of a stream, only the held-out rows are read, a sample for the frequencies
  of tokens, and a sample for the tokenizer if one is trained.

  Raises:
    UserError: the text or the tokenizer cannot be read, or the text is too
      short for one batch.
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
  chosen = packing.evenly(len(evaluated), config.eval_rows)
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
    return by_text and holdout.is_held_out(text, config.holdout_every)

  def keep(text: str) -> bool:
    return not is_held_out(text) and holdout.digest(text) not in digests

  shards = _shards(source, source.train)
  train = itertools.filterfalse(is_held_out, shards.documents())
  sample = _first(train, TEXT_SAMPLE)
  encoder = tokenizer_lib.find(config, vocab_size, sample, cache)
  if source.held_out is None:
    held_out = filter(is_held_out, shards.documents())
  else:
    held_out = _shards(source, source.held_out).documents()
  rows, widths, digests = _held_out_rows(
    held_out, encoder, config, config.eval_rows
  )
  if not len(rows):
    raise UserError(_no_held_out(source.name, config))
  sample = list(itertools.islice(filter(keep, shards.documents()), SAMPLE))
  if not sample:
    raise UserError(
      f"all documents of {source.name} are held out; name another text with"
      " data.validation, or leave it empty"
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
    _count(np.concatenate(encoder.encode(sample)), vocab_size),
  )


def _shards(source: sources.Source, documents: Any) -> stream.Shards:
  return stream.Shards(documents, source.field, source.name)


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
  """The first texts, up to about this many characters in total."""
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
  """Rows of held-out documents: the first `limit`, or all.

  Returns:
    Ids (rows, length + 1), the number of UTF-8 bytes of each id's text, and
    the digests of the documents that were read.
  """
  documents, digests, tokens = [], set(), 0
  for chunk in stream.chunks(texts):
    documents += encoder.measure(chunk)
    digests |= {holdout.digest(text) for text in chunk}
    tokens += sum(len(ids) for ids, _ in documents[-len(chunk) :])
    filled = tokens // (config.length + 1)
    if config.rows == "padded":
      filled = len(documents)
    if limit is not None and filled >= limit:
      break
  if not documents:
    empty = np.zeros((0, config.length + 1), np.int32)
    return empty, empty, digests
  ids, widths = zip(*documents, strict=True)
  if config.rows == "padded":
    rows = packing.pad(ids, config.length)
    sizes = packing.pad(widths, config.length, filler=0)
  else:
    rows = packing.pack(np.concatenate(ids), config.length)
    sizes = packing.pack(np.concatenate(widths), config.length)
  return rows[:limit], sizes[:limit], digests


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
  """The number of occurrences of each id of the vocabulary."""
  return np.bincount(ids[ids != packing.PAD], minlength=vocab_size)


def _check_size(
  name: str, config: DataConfig, train: np.ndarray, held_out: np.ndarray
) -> None:
  if len(train) < config.batch:
    raise UserError(
      f"{name} gives {len(train)} rows of {config.length + 1} tokens, fewer"
      f" than one batch of data.batch={config.batch}; lower data.batch or"
      f" data.length, or use a text of more than {train.size} tokens"
    )
  if not len(held_out):
    raise UserError(_no_held_out(name, config))


def _no_held_out(name: str, config: DataConfig) -> str:
  return (
    f"{name}: the held-out documents do not fill one row of data.length + 1 ="
    f" {config.length + 1} tokens; lower data.length or data.holdout_every, or"
    " use more text"
  )


def evaluation_batches(
  rows: np.ndarray, batch: int, part: int = 0, parts: int = 1
) -> Iterator[np.ndarray]:
  """Batches of the held-out rows, or one part of each batch.

  Yields:
    Rows (batch / parts, length + 1). The last batch is filled up with rows of
    padding, so that all batches have one shape.
  """
  size = batch // parts
  for start in range(part * size, len(rows) + part * size, batch):
    part_rows = rows[start : start + size]
    full = np.full((size, rows.shape[1]), packing.PAD, np.int32)
    full[: len(part_rows)] = part_rows
    yield full


def unigram_perplexity(counts: np.ndarray, targets: np.ndarray) -> float:
  """Perplexity of a model that predicts tokens by their frequency alone.

  Args:
    counts: (vocabulary,) occurrences in the training text. One is added to
      each, so that no token has probability zero.
    targets: held-out ids to predict, of any shape; padding is ignored.
  """
  counts = counts + 1.0
  nll = np.log(counts.sum()) - np.log(counts)[targets[targets != packing.PAD]]
  return float(np.exp(nll.mean()))
