"""Makes batches from a text that is read and tokenized on demand.

The processes divide the shards of a data set among them. Each reads its shards
one after another, in another order in each epoch. `buffer` documents form a
block, which is shuffled as a whole. A position is the beginning of the current
block and how much of it was used, so a resumed run reads one block again and
nothing before it. (`datasets` has a shuffle buffer of its own, but its saved
state does not include the contents of the buffer.)
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

TABLE = 1000  # examples that are read at once
# Limits of what is tokenized at once, on all cores: documents, characters.
CHUNK, CHARACTERS = 256, 1_000_000


@dataclasses.dataclass(frozen=True)
class Position:
  """A position among the tokens that one process reads."""

  epoch: int = 0
  shard: int = 0  # the block's first shard: index in the epoch's shard order
  example: int = 0  # the block's first example in that shard
  block: int = 0  # index of the block in the epoch
  document: int = 0  # index in the block's shuffled order
  offset: int = 0  # tokens of that document that have been used


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
  """Groups of texts, limited in number (CHUNK) and size (CHARACTERS)."""
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
  """The shards of an iterable dataset, which can be read separately."""

  def __init__(
    self, documents: datasets.IterableDataset, field: str, name: str
  ):
    self._documents, self._field, self.name = documents, field, name
    self.count = documents.num_shards

  def texts(self, shard: int, start: int = 0) -> Iterator[str | None]:
    """The texts of a shard from example `start` on.

    Earlier examples are read, as a compressed file requires, but not converted.
    """
    part = self._documents.shard(num_shards=self.count, index=shard)
    name = f"{self.name}, shard {shard + 1} of {self.count}"
    tables: Iterator[pa.Table] = part.with_format("arrow").iter(TABLE)
    while True:
      with sources.reading(name):
        table = next(tables, None)
      if table is None:
        return
      sources.check_field(
        dict(zip(table.column_names, table.schema.types, strict=True)),
        name,
        self._field,
      )
      with sources.reading(name):
        texts = table[self._field].slice(start).to_pylist()
      yield from texts
      start = max(0, start - table.num_rows)

  def documents(self) -> Iterator[str]:
    """All documents that are not blank, in the order of the files."""
    for shard in range(self.count):
      for text in self.texts(shard):
        if text is not None and not sources.blank(text):
          yield text


@dataclasses.dataclass(frozen=True)
class Stream:
  """Training rows from a text that is read on demand."""

  shards: Shards
  keep: Callable[[str], bool]  # whether to train on a document
  encoder: Encoder
  packed: bool
  length: int
  batch: int  # rows in a global batch
  buffer: int  # documents in a block

  def start(self, part: int, parts: int) -> State:
    """The position before the first batch of a part."""
    return self._state(Position(), part, parts)

  def _state(self, at: Position, part: int, parts: int) -> State:
    shared = {"part": part, "parts": parts, "shards": self.shards.count}
    return dataclasses.asdict(at) | shared

  def batches(
    self, state: State, seed: int, part: int, parts: int
  ) -> Generator[tuple[np.ndarray, State], None, None]:
    """One part of each batch, from a position on, with the position after it.

    Raises:
      UserError: the position is of another part, or of other shards.
    """
    expected = self.start(part, parts)
    if set(state) != set(expected):
      raise UserError(
        "the saved position is of a text in memory, but the text is now"
        " streamed; continue with the data.stream of the run that saved it"
      )
    for name, change in (
      ("parts", "; a stream continues with the same number of parts only"),
      ("part", "; each process must continue its own part"),
      ("shards", "; the data has changed"),
    ):
      if state[name] != expected[name]:
        raise UserError(
          f"{self.shards.name}: the saved position has {name}={state[name]},"
          f" but now {name}={expected[name]}{change}"
        )
    names = [field.name for field in dataclasses.fields(Position)]
    at = Position(**{name: state[name] for name in names})
    return self._batches(at, seed, part, parts)

  def _batches(
    self, at: Position, seed: int, part: int, parts: int
  ) -> Generator[tuple[np.ndarray, State], None, None]:
    # The next block is read while this one is tokenized.
    blocks = Prefetch(self._blocks(at, seed, part, parts), 1)
    with contextlib.closing(blocks):
      documents = self._encoded(blocks, at.document)
      cutter = self._pack if self.packed else self._pad
      for rows, after in cutter(documents, at.offset, self.batch // parts):
        yield rows, self._state(after, part, parts)

  def _read(
    self, at: Position, seed: int, part: int, parts: int
  ) -> Iterator[tuple[int, int, str | None]]:
    """The texts of a part in one epoch, each with the position after it.

    A part has every `parts`-th shard, the same in all epochs, so that no
    document is read by two parts. If there are fewer shards than parts, it has
    every `parts`-th example of each shard.
    """
    whole = self.shards.count >= parts
    mine = range(part, self.shards.count, parts) if whole else None
    mine = np.asarray(mine if whole else range(self.shards.count))
    permutation = np.random.default_rng([seed, at.epoch]).permutation(mine)
    for index in range(at.shard, len(permutation)):
      example = at.example if index == at.shard else 0
      for text in self.shards.texts(int(permutation[index]), example):
        example += 1
        if whole or (example - 1) % parts == part:
          yield index, example, text

  def _blocks(
    self, at: Position, seed: int, part: int, parts: int
  ) -> Iterator[tuple[Position, list[str]]]:
    """Blocks of shuffled documents from a position on, without end."""
    # Zero while the epoch has had no document to train on.
    at, used = dataclasses.replace(at, document=0, offset=0), at.block
    while True:
      texts = self._read(at, seed, part, parts)
      while block := list(itertools.islice(texts, self.buffer)):
        chosen = [
          text
          for *_, text in block
          if text is not None and not sources.blank(text) and self.keep(text)
        ]
        rng = np.random.default_rng([seed, at.epoch, at.block, part])
        yield at, [chosen[i] for i in rng.permutation(len(chosen))]
        used += len(chosen)
        shard, example, _ = block[-1]
        at = Position(at.epoch, shard, example, at.block + 1)
      if not used:
        raise UserError(
          f"{self.shards.name} has no document to train on"
          + (f" for part {part + 1} of {parts}" if parts > 1 else "")
        )
      at, used = Position(at.epoch + 1), 0

  def _encoded(
    self, blocks: Iterator[tuple[Position, list[str]]], first: int
  ) -> Iterator[tuple[Position, np.ndarray]]:
    """Documents as ids, from document `first` of the first block on."""
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
    """Batches of `size` packed rows, each with the position after it."""
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
    """Batches of `size` padded rows, each with the position after it."""
    if offset:  # the document at the position is already in a batch
      next(documents)
    while True:
      taken = list(itertools.islice(documents, size))
      (first, _), (last, ids) = taken[0], taken[-1]
      self._check_epochs(first.epoch, last.epoch)
      rows = packing.pad([ids for _, ids in taken], self.length)
      yield rows, dataclasses.replace(last, offset=len(ids))

  def _check_epochs(self, first: int, last: int) -> None:
    """Raises if one batch spans a whole epoch: the text is too short."""
    if last > first + 1:
      raise UserError(
        f"{self.shards.name} has fewer rows of {self.length + 1} tokens than"
        f" one batch of data.batch={self.batch}; lower data.batch or"
        " data.length, or give more text"
      )
