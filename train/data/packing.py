"""Makes rows of token ids of one length, packed or padded.

A row has `length + 1` ids: the model reads all but the last and predicts all
but the first. Packed rows hold documents end to end. A padded row holds one
document, truncated or filled up with PAD.
"""

import dataclasses
import itertools
from collections.abc import Generator, Sequence

import numpy as np

from train.common.errors import UserError
from train.data.prefetch import State

PAD = -1  # is never predicted, and is not an id of the vocabulary


def pack(tokens: np.ndarray, length: int) -> np.ndarray:
  """Cuts tokens into rows of `length + 1`.

  Each token is in one row; the tail that does not fill a row is dropped.

  Args:
    tokens: (n,) ids.
    length: number of tokens that the model predicts in a row.

  Returns:
    (n // (length + 1), length + 1) ids.
  """
  rows = len(tokens) // (length + 1)
  return tokens[: rows * (length + 1)].reshape(rows, length + 1)


def pad(
  documents: Sequence[np.ndarray], length: int, filler: int = PAD
) -> np.ndarray:
  """Puts each document in a row of `length + 1`, truncated or filled up.

  Args:
    documents: arrays (n,) of ids.
    length: number of tokens that the model predicts in a row.
    filler: the value after a short document.

  Returns:
    (documents, length + 1) int32.
  """
  rows = np.full((len(documents), length + 1), filler, np.int32)
  for row, ids in zip(rows, documents, strict=True):
    ids = ids[: length + 1]
    row[: len(ids)] = ids
  return rows


def evenly(count: int, limit: int) -> np.ndarray:
  """At most `limit` of the indices below `count`, evenly spaced."""
  if count <= limit:
    return np.arange(count)
  return np.linspace(0, count - 1, limit).round().astype(int)


@dataclasses.dataclass(frozen=True)
class Rows:
  """Training rows in memory, shuffled anew in each epoch.

  The order depends on the seed and the epoch only, so a position is the number
  of batches that have been read. The global batch does not depend on the
  number of parts that it is divided into.
  """

  rows: np.ndarray  # (n, length + 1) int32
  batch: int  # rows in a global batch; at most n

  def start(self, part: int, parts: int) -> State:
    """The position before the first batch; the same for every part."""
    del part, parts
    return {"batches": 0}

  def batches(
    self, state: State, seed: int, part: int, parts: int
  ) -> Generator[tuple[np.ndarray, State], None, None]:
    """One part of each batch, from a position on, with the position after it.

    An epoch reads each row at most once; rows at its end that do not fill a
    batch are skipped.

    Raises:
      UserError: the position is that of a stream.
    """
    if set(state) != {"batches"}:
      raise UserError(
        "the saved position is of a stream, but the text is now read as a"
        " whole; continue with the data.stream of the run that saved it"
      )
    return self._batches(state["batches"], seed, part, self.batch // parts)

  def _batches(
    self, step: int, seed: int, part: int, size: int
  ) -> Generator[tuple[np.ndarray, State], None, None]:
    first, index = divmod(step, len(self.rows) // self.batch)
    for epoch in itertools.count(first):
      permutation = np.random.default_rng([seed, epoch]).permutation(
        len(self.rows)
      )
      for start in range(
        index * self.batch, len(permutation) - self.batch + 1, self.batch
      ):
        step += 1
        mine = permutation[start + part * size : start + (part + 1) * size]
        yield self.rows[mine], {"batches": step}
      index = 0
