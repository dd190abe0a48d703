"""Batches of a text that is read and tokenised as it is needed.

The shards of a set are shared out among the processes and read one after
another, in an order of each epoch's own; `buffer` documents at a time form a
block, which is shuffled as a whole. A position is where the current block
begins, and how far it was used: on resuming, one block is read again, and
nothing before it. (`datasets` has a shuffle buffer of its own, but its saved
state leaves out what the buffer held.)
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator

import datasets
import numpy as np
import pyarrow as pa

from train.common.errors import UserError
from train.data import packing, sources
from train.data.prefetch import Prefetch, State
from train.data.tokenizer import Encoder

TABLE = 1000  # examples that are read together
# What is tokenised together, on all cores: many short documents or few long.
CHUNK, CHARACTERS = 256, 1_000_000


@dataclasses.dataclass(frozen=True)
class Position:
  """A place among the tokens that one process reads."""

  epoch: int = 0
  shard: int = 0  # where the block begins: place in the epoch's order of shards
  example: int = 0  # and in that shard
  block: int = 0  # number of the block in the epoch
  document: int = 0  # in the block's shuffled order
  offset: int = 0  # tokens of that document that are used up


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
  """The texts in groups that are neither too many nor too long at once."""
  group, characters = [], 0
  for text in texts:
    group.append(text)
    characters += len(text)
    if len(group) == CHUNK or characters >= CHARACTERS:
      yield group
      group, characters = [], 0
  if group:
    yield group


class Shards:
  """The shards of an iterable dataset, each of which can be read alone."""

  def __init__(
    self, documents: datasets.IterableDataset, field: str, name: str
  ):
    self._documents, self._field, self.name = documents, field, name
    self.count = documents.num_shards

  def texts(self, shard: int, start: int = 0) -> Iterator[str | None]:
    """The texts of a shard from example `start` on.

    Those before it are read, as a compressed file must be, but not unpacked.
    """
    part = self._documents.shard(num_shards=self.count, index=shard)
    where = f"{self.name}, shard {shard + 1} of {self.count}"
    tables: Iterator[pa.Table] = part.with_format("arrow").iter(TABLE)
    while True:
      with sources.reading(where):
        table = next(tables, None)
      if table is None:
        return
      sources.check_field(
        dict(zip(table.column_names, table.schema.types, strict=True)),
        where,
        self._field,
      )
      yield from table[self._field].slice(start).to_pylist()
      start = max(0, start - table.num_rows)

  def documents(self) -> Iterator[str]:
    """All documents that say something, once, in the order of the files."""
    for shard in range(self.count):
      for text in self.texts(shard):
        if text is not None and not sources.blank(text):
          yield text


@dataclasses.dataclass(frozen=True)
class Stream:
  """Training rows of a text that is read on demand."""

  shards: Shards
  keep: Callable[[str], bool]  # whether a document may be trained on
  encoder: Encoder
  packed: bool
  length: int
  batch: int  # rows in a global batch
  buffer: int  # documents in a block

  def start(self, part: int, parts: int) -> State:
    """The position of a part before its first batch."""
    return self._state(Position(), part, parts)

  def _state(self, at: Position, part: int, parts: int) -> State:
    shared = {"part": part, "parts": parts, "shards": self.shards.count}
    return dataclasses.asdict(at) | shared

  def batches(
    self, state: State, seed: int, part: int, parts: int
  ) -> Generator[tuple[np.ndarray, State], None, None]:
    """One part of each batch from a position on, with the position after.

    Raises:
      UserError: the position is not one of this part of these shards.
    """
    expected = self.start(part, parts)
    if set(state) != set(expected):
      raise UserError(
        "the saved position is that of text in memory, but the text is"
        " streamed now; continue with the data.stream of the run that saved it"
      )
    for name, what in (
      ("parts", "parts of a batch (a stream continues with as many only)"),
      ("part", "as number of the part that this process reads"),
      ("shards", "shards (the data has changed)"),
    ):
      if state[name] != expected[name]:
        raise UserError(
          f"{self.shards.name}: the saved position is one of {state[name]}"
          f" {what}, now there are {expected[name]}"
        )
    names = [field.name for field in dataclasses.fields(Position)]
    at = Position(**{name: state[name] for name in names})
    return self._batches(at, seed, part, parts)

  def _batches(
    self, at: Position, seed: int, part: int, parts: int
  ) -> Generator[tuple[np.ndarray, State], None, None]:
    # Reading the next block goes on while this one is tokenised.
    blocks = Prefetch(self._blocks(at, seed, part, parts), 1)
    with contextlib.closing(blocks):
      documents = self._encoded(blocks, at.document)
      cutter = self._pack if self.packed else self._pad
      for rows, after in cutter(documents, at.offset, self.batch // parts):
        yield rows, self._state(after, part, parts)

  def _read(
    self, at: Position, seed: int, part: int, parts: int
  ) -> Iterator[tuple[int, int, str | None]]:
    """One epoch's texts of a part, each with the place of the next one.

    A part has every `parts`-th shard in all epochs, so that no document is
    ever read by two; if there are fewer shards than parts, it has every
    `parts`-th example of each shard.
    """
    whole = self.shards.count >= parts
    mine = range(part, self.shards.count, parts) if whole else None
    mine = np.asarray(mine if whole else range(self.shards.count))
    order = np.random.default_rng([seed, at.epoch]).permutation(mine)
    for place in range(at.shard, len(order)):
      example = at.example if place == at.shard else 0
      for text in self.shards.texts(int(order[place]), example):
        example += 1
        if whole or (example - 1) % parts == part:
          yield place, example, text

  def _blocks(
    self, at: Position, seed: int, part: int, parts: int
  ) -> Iterator[tuple[Position, list[str]]]:
    """Blocks of shuffled documents from the one at a position on, for ever."""
    at, kept = dataclasses.replace(at, document=0, offset=0), at.block
    while True:
      texts = self._read(at, seed, part, parts)
      while block := list(itertools.islice(texts, self.buffer)):
        chosen = [
          text
          for *_, text in block
          if text is not None and not sources.blank(text) and self.keep(text)
        ]
        order = np.random.default_rng([seed, at.epoch, at.block, part])
        yield at, [chosen[i] for i in order.permutation(len(chosen))]
        kept += len(chosen)
        shard, example, _ = block[-1]
        at = Position(at.epoch, shard, example, at.block + 1)
      if not kept:
        raise UserError(
          f"{self.shards.name} has no document to train on"
          + (f" for part {part + 1} of {parts}" if parts > 1 else "")
        )
      at, kept = Position(at.epoch + 1), 0

  def _encoded(
    self, blocks: Iterator[tuple[Position, list[str]]], first: int
  ) -> Iterator[tuple[Position, np.ndarray]]:
    """Documents as ids, from number `first` of the first block on."""
    for at, texts in blocks:
      number = first
      for chunk in chunks(texts[first:]):
        for ids in self.encoder.encode(chunk):
          yield dataclasses.replace(at, document=number), ids
          number += 1
      first = 0

  def _pack(
    self,
    documents: Iterator[tuple[Position, np.ndarray]],
    offset: int,
    size: int,
  ) -> Iterator[tuple[np.ndarray, Position]]:
    """Batches of `size` rows with the position of the token after each."""
    need = size * (self.length + 1)
    pieces, missing, begun = [], need, None
    for at, ids in documents:
      begun = at.epoch if begun is None else begun
      while missing <= len(ids) - offset:
        pieces.append(ids[offset : offset + missing])
        offset += missing
        rows = np.concatenate(pieces).reshape(size, self.length + 1)
        self._check_epochs(begun, at.epoch)
        yield rows, dataclasses.replace(at, offset=offset)
        pieces, missing, begun = [], need, at.epoch
      pieces.append(ids[offset:])
      missing -= len(ids) - offset
      offset = 0

  def _pad(
    self,
    documents: Iterator[tuple[Position, np.ndarray]],
    offset: int,
    size: int,
  ) -> Iterator[tuple[np.ndarray, Position]]:
    """Batches of `size` documents with the position after each."""
    if offset:  # the document at the position is in a batch already
      next(documents)
    while True:
      taken = list(itertools.islice(documents, size))
      (first, _), (last, ids) = taken[0], taken[-1]
      self._check_epochs(first.epoch, last.epoch)
      rows = packing.pad([ids for _, ids in taken], self.length)
      yield rows, dataclasses.replace(last, offset=len(ids))

  def _check_epochs(self, first: int, last: int) -> None:
    """Raises if a batch needed a whole epoch, beside its two ends."""
    if last > first + 1:
      raise UserError(
        f"{self.shards.name} has fewer rows of {self.length + 1} tokens than"
        f" one batch of data.batch={self.batch}; lower data.batch or"
        " data.length, or give more text"
      )
