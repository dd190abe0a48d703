"""Which runs a table takes, in which order, and what they have decided.

The search is the same for every entry, on the first seed: all multipliers of
the matrices' learning rate at the first learning rate, then the other learning
rates at the best of them. The best by the validation text is run with the
other seeds. What comes next depends on what was found, so the plan is made
anew after each run.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from train.experiments.tables import Entry, Table

Record = dict[str, Any]
Point = tuple[float, float]  # learning rate, multiplier


@dataclasses.dataclass(frozen=True)
class Run:
  """One training."""

  entry: Entry
  settings: tuple[str, ...]  # of model and batches
  rate: float
  multiplier: float
  seed: int
  tokens: int
  text: str
  evaluations: int

  @property
  def key(self) -> str:
    """What tells it from other runs: all but names."""
    told = (
      self.entry.optimizer,
      self.settings + self.entry.settings,
      self.entry.gaps,
      f"{self.rate:g}",
      f"{self.multiplier:g}",
      self.seed,
      self.tokens,
      self.text,
    )
    text = json.dumps(told)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

  def describe(self) -> str:
    """Half a line."""
    return (
      f"{self.entry.name}, rate {self.rate:g}, multiplier {self.multiplier:g},"
      f" seed {self.seed}"
    )


@dataclasses.dataclass(frozen=True)
class Plan:
  """A table at one size on one text, with the runs that are there."""

  table: Table
  tokens: int
  text: str
  found: dict[str, Record]  # by the key of the run

  def run(self, entry: Entry, point: Point, seed: int) -> Run:
    """The run of an entry at a learning rate and multiplier."""
    return Run(
      entry,
      self.table.settings,
      *point,
      seed,
      self.tokens,
      self.text,
      self.table.evaluations,
    )

  def record(self, entry: Entry, point: Point, seed: int) -> Record | None:
    """What was found there, if it was run."""
    return self.found.get(self.run(entry, point, seed).key)

  def multipliers(self) -> list[Point]:
    """Points of the first part of the search."""
    return [(self.table.rates[0], m) for m in self.table.multipliers]

  def rates(self, entry: Entry) -> list[Point]:
    """Points of the second part, at the best multiplier so far."""
    best = self.best(entry, self.multipliers())
    return [(rate, best[1]) for rate in self.table.rates[1:]] if best else []

  def best(self, entry: Entry, points: list[Point]) -> Point | None:
    """The point of the lowest validation loss; None: none was run."""
    seed = self.table.seeds[0]
    known = [(p, self.record(entry, p, seed)) for p in points]
    tried = [(_loss(record), p) for p, record in known if record]
    return min(tried)[1] if tried else None

  def chosen(self, entry: Entry) -> Point | None:
    """The best of what was tried."""
    return self.best(entry, self.multipliers() + self.rates(entry))

  def tried(self, entry: Entry) -> int:
    """How many points of the search were run."""
    points = self.multipliers() + self.rates(entry)
    seed = self.table.seeds[0]
    return sum(self.record(entry, p, seed) is not None for p in points)

  @property
  def points(self) -> int:
    """How many points the search of an entry has."""
    return len(self.table.multipliers) + len(self.table.rates) - 1

  @property
  def total(self) -> int:
    """How many runs the table takes."""
    each = self.points + len(self.table.seeds) - 1
    return each * len(self.table.entries)

  def seeds(self, entry: Entry) -> list[Record]:
    """What was found at the chosen point, seed by seed."""
    point = self.chosen(entry)
    if point is None:
      return []
    known = (self.record(entry, point, seed) for seed in self.table.seeds)
    return [record for record in known if record]

  def missing(self) -> list[Run]:
    """What can be run now, in the order in which it should."""
    runs = []
    for group in self.table.groups:
      for part in (self._search, self._others, self._repeats):
        wanted = [run for run in part(group) if run.key not in self.found]
        runs += wanted
        if wanted:  # what comes after depends on these
          return runs
    return runs

  def _search(self, group: tuple[Entry, ...]) -> Iterator[Run]:
    for point in self.multipliers():
      for entry in group:
        yield self.run(entry, point, self.table.seeds[0])

  def _others(self, group: tuple[Entry, ...]) -> Iterator[Run]:
    yield from _in_turn(self.rates, group, self.run, self.table.seeds[:1])

  def _repeats(self, group: tuple[Entry, ...]) -> Iterator[Run]:
    def points(entry: Entry) -> list[Point]:
      chosen = self.chosen(entry)
      return [chosen] if chosen else []

    for seed in self.table.seeds[1:]:
      yield from _in_turn(points, group, self.run, (seed,))

  def done(self) -> int:
    """How many of the table's runs are there."""
    return sum(
      self.tried(entry) + max(0, len(self.seeds(entry)) - 1)
      for entry in self.table.entries
    )


def _in_turn(
  points: Callable[[Entry], list[Point]],
  group: tuple[Entry, ...],
  make: Callable[[Entry, Point, int], Run],
  seeds: tuple[int, ...],
) -> Iterator[Run]:
  """Runs of all entries: the first point of each, then the second."""
  found = [(entry, points(entry)) for entry in group]
  for index in range(max(len(each) for _, each in found)):
    for entry, each in found:
      if index < len(each):
        yield from (make(entry, each[index], seed) for seed in seeds)


def _loss(record: Record) -> float:
  """What is selected by; a run that diverged is worse than any other."""
  loss = record.get("validation_loss")
  return loss if loss is not None and math.isfinite(loss) else math.inf
