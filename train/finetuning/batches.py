"""Batches of examples of different lengths, in an order that a seed decides.

The order depends on the seed, the epoch and the lengths only, so every method
is trained on the same batches. Rows of similar length share a batch: this
leaves little padding, and few shapes to compile.
"""

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from train.common.errors import UserError
from train.data.prefetch import State

Batch = dict[str, np.ndarray]
GROUP = 32  # batches whose rows are sorted by length together


@dataclasses.dataclass(frozen=True)
class TrainBatches:
  """The batches of training rows, epoch after epoch."""

  lengths: np.ndarray  # (n,) tokens of each row
  collate: Callable[[Any, int], Batch]  # makes a batch of rows and a size
  size: int  # rows in a global batch
  group: bool  # whether rows of similar length share a batch

  @property
  def per_epoch(self) -> int:
    """Batches in an epoch; it leaves out rows that do not fill a batch."""
    return len(self.lengths) // self.size

  def iterate(
    self, state: State, seed: int, part: int, parts: int
  ) -> Generator[tuple[Batch, State], None, None]:
    """One process's part of each batch, and the position after that batch.

    Args:
      state: the position to start at, `{"batches": number of batches read}`.
      seed: decides the order.
      part: index of the part.
      parts: number of parts of equal shape that a batch is divided into.
    """
    if set(state) != {"batches"}:
      raise UserError(
        f"the checkpoint's position in the data is {state}, and not one of a"
        " fine-tuning run; --overwrite starts the run again"
      )
    done = state["batches"]
    first, index = divmod(done, self.per_epoch)
    size = self.size // parts
    for epoch in itertools.count(first):
      for rows in self.rows_of_epoch(seed, epoch)[index:]:
        done += 1
        # Padded before it is divided, so all processes get the same shape.
        whole = self.collate(rows, self.size)
        own = slice(part * size, (part + 1) * size)
        yield {k: v[own] for k, v in whole.items()}, {"batches": done}
      index = 0

  def rows_of_epoch(self, seed: int, epoch: int) -> np.ndarray:
    """The indices of the rows in each batch of an epoch: (batches, size)."""
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(self.lengths))
    shuffled = shuffled[: self.per_epoch * self.size]
    if not self.group:
      return shuffled.reshape(-1, self.size)
    groups = []
    for start in range(0, len(shuffled), GROUP * self.size):
      rows = shuffled[start : start + GROUP * self.size]
      rows = rows[np.argsort(self.lengths[rows], kind="stable")]
      groups.append(rng.permutation(rows.reshape(-1, self.size)))
    return np.concatenate(groups)


def longest_first(
  lengths: np.ndarray,
  collate: Callable[[Any, int], Batch],
  size: int,
) -> Iterator[tuple[np.ndarray, Batch]]:
  """Batches that contain every row once, in descending order of length.

  Args:
    lengths: (n,) tokens of each row.
    collate: makes a batch of rows and a size; missing rows are padding.
    size: rows in a batch.

  Yields:
    The indices of the rows, and their batch, which may end with padding rows.
  """
  descending = np.argsort(-np.asarray(lengths), kind="stable")
  for start in range(0, len(descending), size):
    rows = descending[start : start + size]
    yield rows, collate(rows, size)
