"""Token ids cut into rows of one length, packed or padded, and arrays of rows.

A row has `length + 1` ids: the model reads all but the last and predicts all
but the first. Packed rows hold documents end to end; a padded row holds one
document, cut off or filled up with PAD.
"""

import dataclasses
import itertools
from collections.abc import Generator, Sequence

import numpy as np

from train.common.errors import UserError
from train.data.prefetch import State

PAD = -1  # never predicted, never an id of the vocabulary


def pack(tokens: np.ndarray, length: int) -> np.ndarray:
  """Cuts the stream into rows of `length + 1`: inputs and their successors.

  No token is lost or used twice but the tail that fills no row.

  Args:
    tokens: (n,) ids.
    length: positions the model predicts in a row.

  Returns:
    (n // (length + 1), length + 1) ids.
  """
  rows = len(tokens) // (length + 1)
  return tokens[: rows * (length + 1)].reshape(rows, length + 1)


def pad(
  documents: Sequence[np.ndarray], length: int, filler: int = PAD
) -> np.ndarray:
  """Gives every document a row of `length + 1`, cut off or filled up.

  Args:
    documents: arrays (n,) of ids.
    length: positions the model predicts in a row.
    filler: what follows a short document.

  Returns:
    (documents, length + 1) int32.
  """
  rows = np.full((len(documents), length + 1), filler, np.int32)
  for row, ids in zip(rows, documents, strict=True):
    kept = ids[: length + 1]
    row[: len(kept)] = kept
  return rows


def spread(count: int, limit: int) -> np.ndarray:
  """At most `limit` of the numbers below `count`, evenly spread."""
  if count <= limit:
    return np.arange(count)
  return np.linspace(0, count - 1, limit).round().astype(int)


@dataclasses.dataclass(frozen=True)
class Rows:
  """Training rows in memory, read in an order of its own in each epoch.

  The order is a function of the seed and the number of batches read, so that
  number is the whole position. The global batch is the same however many
  parts it is cut into.
  """

  rows: np.ndarray  # (n, length + 1) int32
  batch: int  # rows in a global batch, n at most

  def start(self, part: int, parts: int) -> State:
    """The position before the first batch, the same for every part."""
    del part, parts
    return {"batches": 0}

  def batches(
    self, state: State, seed: int, part: int, parts: int
  ) -> Generator[tuple[np.ndarray, State], None, None]:
    """One part of each batch from a position on, with the position after.

    Every epoch goes through the rows once; those that fill no batch at its
    end wait for another epoch's order.

    Raises:
      UserError: the position is that of a stream.
    """
    if set(state) != {"batches"}:
      raise UserError(
        "the saved position is that of a stream, but the text is read as a"
        " whole now; continue with the data.stream of the run that saved it"
      )
    return self._batches(state["batches"], seed, part, self.batch // parts)

  def _batches(
    self, step: int, seed: int, part: int, size: int
  ) -> Generator[tuple[np.ndarray, State], None, None]:
    first, index = divmod(step, len(self.rows) // self.batch)
    for epoch in itertools.count(first):
      order = np.random.default_rng([seed, epoch]).permutation(len(self.rows))
      for start in range(
        index * self.batch, len(order) - self.batch + 1, self.batch
      ):
        step += 1
        mine = order[start + part * size : start + (part + 1) * size]
        yield self.rows[mine], {"batches": step}
      index = 0
