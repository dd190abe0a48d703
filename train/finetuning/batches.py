"""Batches of examples of many lengths, in an order that only a seed decides.

Every method sees the same batches: the order knows the seed, the epoch and
the lengths, and nothing else. As rows of like length share a batch, little
of it is padding, and the few lengths that occur are compiled once each.
"""

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from train.data.prefetch import State

Batch = dict[str, np.ndarray]
GROUP = 32  # batches whose rows are sorted by length together


@dataclasses.dataclass(frozen=True)
class Feed:
  """Training rows and how they become batches."""

  lengths: np.ndarray  # (n,) tokens of each row
  collate: Callable[[Any, int], Batch]  # rows, and how many to make
  batch: int  # rows in a global batch
  group: bool  # whether rows of like length share a batch

  @property
  def steps(self) -> int:
    """Batches in an epoch; what is left over waits for another order."""
    return len(self.lengths) // self.batch

  def batches(
    self, state: State, seed: int, part: int, parts: int
  ) -> Generator[tuple[Batch, State], None, None]:
    """One part of each batch from a position on, with the position after.

    Args:
      state: `{"batches": how many were read}`.
      seed: of the order.
      part: which part of each batch: from 0.
      parts: into how many it is cut; they have one shape.
    """
    done = state["batches"]
    first, index = divmod(done, self.steps)
    size = self.batch // parts
    for epoch in itertools.count(first):
      order = self.order(seed, epoch)
      for rows in order[index:]:
        done += 1
        # Padded together, so that every process makes the same shape.
        whole = self.collate(rows, self.batch)
        own = slice(part * size, (part + 1) * size)
        yield {k: v[own] for k, v in whole.items()}, {"batches": done}
      index = 0

  def order(self, seed: int, epoch: int) -> np.ndarray:
    """The rows of each batch of an epoch: (steps, batch) numbers."""
    source = np.random.default_rng([seed, epoch])
    mixed = source.permutation(len(self.lengths))[: self.steps * self.batch]
    if not self.group:
      return mixed.reshape(-1, self.batch)
    found = []
    for start in range(0, len(mixed), GROUP * self.batch):
      near = mixed[start : start + GROUP * self.batch]
      near = near[np.argsort(self.lengths[near], kind="stable")]
      batches = near.reshape(-1, self.batch)
      found.append(source.permutation(batches))
    return np.concatenate(found)


def in_order(
  lengths: np.ndarray,
  collate: Callable[[Any, int], Batch],
  batch: int,
) -> Iterator[tuple[np.ndarray, Batch]]:
  """Batches that cover all rows once, the longest first.

  Args:
    lengths: (n,) tokens of each row.
    collate: makes a batch of rows; those that are missing are empty.
    batch: rows in a batch.

  Yields:
    The numbers of the rows, and their batch: as many rows or more.
  """
  order = np.argsort(-np.asarray(lengths), kind="stable")
  for start in range(0, len(order), batch):
    rows = order[start : start + batch]
    yield rows, collate(rows, batch)
