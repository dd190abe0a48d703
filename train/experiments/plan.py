"""Which runs a table takes, in which order, and what they have decided.

The search is the same for every entry, on the first seed: from the best that is
there to its neighbours, multipliers of the matrices' learning rate and learning
rates, each down and up, until it has a worse one on all four sides. One seed
does not tell close ones apart: a second that comes near the best by the
validation text is run with the other seeds, too, and that with the better mean
is chosen; its neighbours are tried if they were not. What comes next depends on
what was found, so the plan is made anew after each run.
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
NEAR = 0.01  # nats of validation loss that the first seed cannot tell apart


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
    if entry.at:
      return [], None
    tried = self.tried(entry)
    if not tried:
      return [], (self.table.rates.start, self.table.multipliers.start)
    first = self.near(entry)
    wanted = self._around(first[0])
    if not self._unrepeated(entry):
      wanted += self._around(self._best(entry, first))
    return tried, next((point for point in wanted if point not in tried), None)

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

  def near(self, entry: Entry) -> list[Point]:
    """Points about as good as the best by the first seed, which comes first.

    And what has all seeds already, for these say more than the first.
    """
    if entry.at:
      return [entry.at]
    seed = self.table.seeds[0]
    losses = {
      point: _loss(self.record(entry, point, seed) or {})
      for point in self.tried(entry)
    }
    best = min(losses.values(), default=math.inf)
    order = sorted(losses, key=lambda point: (losses[point], point))
    most = self.table.near if math.isfinite(best) else 1
    return [
      point
      for i, point in enumerate(order)
      if (i < most and losses[point] <= best + NEAR)
      or (losses[point] < math.inf and self._repeated(entry, point))
    ]

  def _best(self, entry: Entry, points: list[Point]) -> Point:
    """The least mean loss of the validation text; more seeds come first."""

    def rank(point: Point) -> tuple[int, float]:
      losses = [_loss(record) for record in self._records(entry, point)]
      return -len(losses), sum(losses) / max(1, len(losses))

    return min(points, key=rank)

  def _records(self, entry: Entry, point: Point) -> list[Record]:
    known = (self.record(entry, point, seed) for seed in self.table.seeds)
    return [record for record in known if record]

  def chosen(self, entry: Entry) -> Point | None:
    """The best of what was tried; None: nothing was."""
    near = self.near(entry)
    return self._best(entry, near) if near else None

  def _repeated(self, entry: Entry, point: Point) -> bool:
    return len(self._records(entry, point)) == len(self.table.seeds)

  def complete(self, entry: Entry) -> bool:
    """Whether the search has ended, and what is close has all seeds."""
    return self.searched(entry) and not self._unrepeated(entry)

  def searched(self, entry: Entry) -> bool:
    """Whether the search has ended, but for what other seeds may tell."""
    return self.search(entry)[1] is None

  def planned(self, entry: Entry) -> int:
    """How many runs an entry takes; until its search has ended a guess."""
    tried, wanted = self.search(entry)
    grid = len(self.table.multipliers.values()) + len(self.table.rates.values())
    guess = max(len(tried) + 1, min(USUAL, grid - 1))
    repeats = (len(self.table.seeds) - 1) * max(1, len(self.near(entry)))
    return (guess if wanted else len(tried) + bool(entry.at)) + repeats

  @property
  def total(self) -> int:
    """How many runs the table takes, as far as that is known."""
    return sum(map(self.planned, self.table.entries))

  def seeds(self, entry: Entry) -> list[Record]:
    """What was found at the chosen point, seed by seed."""
    point = self.chosen(entry)
    return self._records(entry, point) if point else []

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
    """The other seeds, one after the other for all entries."""
    runs = [run for entry in group for run in self._unrepeated(entry)]
    return sorted(runs, key=lambda run: self.table.seeds.index(run.seed))

  def _unrepeated(self, entry: Entry) -> list[Run]:
    """What is missing at the points that come near the best."""
    runs = [
      self.run(entry, point, seed)
      for point in self.near(entry)
      for seed in self.table.seeds
    ]
    return [run for run in runs if run.key not in self.found]

  def done(self) -> int:
    """How many of the table's runs are there."""
    first, *others = self.table.seeds
    return sum(
      self.run(entry, point, seed).key in self.found
      for entry in self.table.entries
      for seed, points in (
        (first, [entry.at] if entry.at else self.tried(entry)),
        *((other, self.near(entry)) for other in others),
      )
      for point in points
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
