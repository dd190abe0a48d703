"""Which runs a table takes, in which order, and what they have decided.

The search is the same for every entry, on the first seed: from the best that is
there to its neighbours, multipliers of the matrices' learning rate and learning
rates, each down and up, until it has a worse one on all four sides. The best by
the validation text is run with the other seeds. What comes next depends on what
was found, so the plan is made anew after each run.
"""

import dataclasses
import hashlib
import json
import math
from typing import Any

from train.experiments.tables import Entry, Line, Table

Record = dict[str, Any]
Point = tuple[float, float]  # learning rate, multiplier
USUAL = 8  # runs of a search


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

  def search(self, entry: Entry) -> tuple[list[Point], Point | None]:
    """The points of an entry that were tried, and the next to try."""
    tried = self.tried(entry)
    if not tried:
      return [], (self.table.rates.start, self.table.multipliers.start)
    around = self._around(self._best(entry, tried))
    return tried, next((point for point in around if point not in tried), None)

  def tried(self, entry: Entry) -> list[Point]:
    """All points that are there, also of a search from another start."""
    rates = self.table.rates.values()
    multipliers = self.table.multipliers.values()
    seed = self.table.seeds[0]
    return [
      (rate, multiplier)
      for rate in rates
      for multiplier in multipliers
      if self.record(entry, (rate, multiplier), seed)
    ]

  def _around(self, point: Point) -> list[Point]:
    """The neighbours of a point, multipliers first."""
    rate, multiplier = point
    return [
      *((rate, near) for near in _near(multiplier, self.table.multipliers)),
      *((near, multiplier) for near in _near(rate, self.table.rates)),
    ]

  def _best(self, entry: Entry, tried: list[Point]) -> Point:
    """The point of the lowest validation loss."""
    seed = self.table.seeds[0]
    loss = lambda p: _loss(self.record(entry, p, seed) or {})
    return min(tried, key=lambda point: (loss(point), point))

  def chosen(self, entry: Entry) -> Point | None:
    """The best of what was tried; None: nothing was."""
    tried, _ = self.search(entry)
    return self._best(entry, tried) if tried else None

  def complete(self, entry: Entry) -> bool:
    """Whether the search has ended."""
    return self.search(entry)[1] is None

  def planned(self, entry: Entry) -> int:
    """How many runs an entry takes; until its search has ended a guess."""
    tried, wanted = self.search(entry)
    grid = len(self.table.multipliers.values()) + len(self.table.rates.values())
    guess = max(len(tried) + 1, min(USUAL, grid - 1))
    return (guess if wanted else len(tried)) + len(self.table.seeds) - 1

  @property
  def total(self) -> int:
    """How many runs the table takes, as far as that is known."""
    return sum(map(self.planned, self.table.entries))

  def seeds(self, entry: Entry) -> list[Record]:
    """What was found at the chosen point, seed by seed."""
    point = self.chosen(entry)
    if point is None:
      return []
    known = (self.record(entry, point, seed) for seed in self.table.seeds)
    return [record for record in known if record]

  def missing(self) -> list[Run]:
    """What can be run now; the first is what should be."""
    return [
      run
      for group in self.table.groups
      for run in self._searches(group) or self._repeats(group)
    ]

  def _searches(self, group: tuple[Entry, ...]) -> list[Run]:
    """A run of each entry whose search has not ended, the least tried first."""
    found = [(entry, *self.search(entry)) for entry in group]
    found.sort(key=lambda each: len(each[1]))
    seed = self.table.seeds[0]
    return [self.run(entry, point, seed) for entry, _, point in found if point]

  def _repeats(self, group: tuple[Entry, ...]) -> list[Run]:
    chosen = [(entry, self.chosen(entry)) for entry in group]
    runs = [
      self.run(entry, point, seed)
      for seed in self.table.seeds[1:]
      for entry, point in chosen
      if point
    ]
    return [run for run in runs if run.key not in self.found]

  def done(self) -> int:
    """How many of the table's runs are there."""
    return sum(
      len(self.search(entry)[0]) + max(0, len(self.seeds(entry)) - 1)
      for entry in self.table.entries
    )


def _near(value: float, line: Line) -> list[float]:
  """What stands beside a value, the lower first."""
  values = line.values()
  at = values.index(value)
  return [values[i] for i in (at - 1, at + 1) if 0 <= i < len(values)]


def _loss(record: Record) -> float:
  """What is selected by; a run that diverged is worse than any other."""
  loss = record.get("validation_loss")
  return loss if loss is not None and math.isfinite(loss) else math.inf
