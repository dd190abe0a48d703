"""Which runs a table needs, in which sequence, and which point they choose.

Every variant is searched in the same way, on the first seed. A point is a
learning rate and a multiplier of the matrices' learning rate. From the best
point so far, the search tries the neighboring multipliers and learning rates,
below and above, until the best point has a worse neighbor on all four sides.

One seed cannot tell close points apart. So the contenders, whose validation
loss comes near the best, are run with the other seeds too, and the point with
the best mean is chosen. Its neighbors are then tried as well. What comes next
depends on the results, so the plan is made again after each run.
"""

import dataclasses
import functools
import hashlib
import json
import math
from typing import Any

from train.experiments.table import SearchRange, Table, Variant

Record = dict[str, Any]
Point = tuple[float, float]  # learning rate, multiplier
USUAL = 8  # runs that a search takes, for estimates
NEAR = 0.01  # nats of validation loss that the first seed cannot tell apart


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run."""

  variant: Variant
  settings: tuple[str, ...]  # of model and batches
  rate: float
  multiplier: float
  seed: int
  tokens: int
  text: str
  evaluations: int
  other: str = ""  # a text of another kind, which is only reported on

  @property
  def key(self) -> str:
    """A digest of what distinguishes this run from others, except for names."""
    return _key(self)

  def describe(self) -> str:
    """The run in a few words, for messages."""
    return (
      f"{self.variant.name}, rate {self.rate:g}, multiplier"
      f" {self.multiplier:g}, seed {self.seed}"
    )


@functools.lru_cache(maxsize=100_000)  # a plan asks for the same keys often
def _key(run: Run) -> str:
  identity = (
    run.variant.optimizer,
    run.settings + run.variant.settings,
    run.variant.gaps,
    f"{run.rate:g}",
    f"{run.multiplier:g}",
    run.seed,
    run.tokens,
    run.text,
  )
  text = json.dumps(identity)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclasses.dataclass(frozen=True)
class Plan:
  """A table at one size on one text, with the records of finished runs."""

  table: Table
  tokens: int
  text: str
  records: dict[str, Record]  # by the run's key

  def run(self, variant: Variant, point: Point, seed: int) -> Run:
    """The run of a variant at a point."""
    return Run(
      variant,
      self.table.settings,
      *point,
      seed,
      self.tokens,
      self.text,
      self.table.evaluations,
      self.table.other,
    )

  def record(self, variant: Variant, point: Point, seed: int) -> Record | None:
    """The record of a variant at a point, if that run has finished."""
    return self.records.get(self.run(variant, point, seed).key)

  def search(self, variant: Variant) -> tuple[list[Point], list[Point]]:
    """The points of a variant that were tried, and those to try next."""
    if variant.at:
      return [], []
    tried = self.tried(variant)
    if not tried:
      start = self.table.rates.start, self.table.multipliers.start
      return [], [start, *self._neighbors(start)]
    contenders = self.contenders(variant)
    wanted = self._neighbors(contenders[0])
    if not self._missing_seeds(variant):
      wanted += self._neighbors(self._best(variant, contenders))
    return tried, [point for point in wanted if point not in tried]

  def tried(self, variant: Variant) -> list[Point]:
    """All points with a record, even from a search with another start."""
    seed = self.table.seeds[0]
    return [
      (rate, multiplier)
      for rate in self.table.rates.values()
      for multiplier in self.table.multipliers.values()
      if self.record(variant, (rate, multiplier), seed)
    ]

  def _neighbors(self, point: Point) -> list[Point]:
    """The neighbors of a point, multipliers first."""
    rate, multiplier = point
    multipliers = _beside(multiplier, self.table.multipliers)
    rates = _beside(rate, self.table.rates)
    return [
      *((rate, other) for other in multipliers),
      *((other, multiplier) for other in rates),
    ]

  def contenders(self, variant: Variant) -> list[Point]:
    """The points among which all seeds decide, best of the first seed first.

    Those are the points about as good as the best of the first seed, and points
    that have all seeds already, which say more than the first alone.
    """
    if variant.at:
      return [variant.at]
    seed = self.table.seeds[0]
    losses = {
      point: _loss(self.record(variant, point, seed) or {})
      for point in self.tried(variant)
    }
    best = min(losses.values(), default=math.inf)
    ranking = sorted(losses, key=lambda point: (losses[point], point))
    most = self.table.contenders if math.isfinite(best) else 1
    return [
      point
      for i, point in enumerate(ranking)
      if (i < most and losses[point] <= best + NEAR)
      or (losses[point] < math.inf and self._has_all_seeds(variant, point))
    ]

  def _best(self, variant: Variant, points: list[Point]) -> Point:
    """The point with the most seeds; of several, the least mean loss."""

    def rank(point: Point) -> tuple[int, float]:
      losses = [_loss(record) for record in self._records(variant, point)]
      return -len(losses), sum(losses) / max(1, len(losses))

    return min(points, key=rank)

  def _records(self, variant: Variant, point: Point) -> list[Record]:
    """The records of a point, seed by seed."""
    known = (self.record(variant, point, seed) for seed in self.table.seeds)
    return [record for record in known if record]

  def chosen(self, variant: Variant) -> Point | None:
    """The best point that was tried; None if there is none."""
    contenders = self.contenders(variant)
    return self._best(variant, contenders) if contenders else None

  def _has_all_seeds(self, variant: Variant, point: Point) -> bool:
    return len(self._records(variant, point)) == len(self.table.seeds)

  def complete(self, variant: Variant) -> bool:
    """Whether the search has ended and all contenders have all seeds."""
    return self.searched(variant) and not self._missing_seeds(variant)

  def searched(self, variant: Variant) -> bool:
    """Whether no point is left to try, by the seeds that there are."""
    return not self.search(variant)[1]

  def planned(self, variant: Variant) -> int:
    """Number of runs of a variant; an estimate until its search has ended."""
    tried, wanted = self.search(variant)
    grid = len(self.table.multipliers.values()) + len(self.table.rates.values())
    guess = max(len(tried) + 1, min(USUAL, grid - 1))
    repeats = (len(self.table.seeds) - 1) * max(
      1, len(self.contenders(variant))
    )
    return (guess if wanted else len(tried) + bool(variant.at)) + repeats

  @property
  def total(self) -> int:
    """Number of runs that the table takes, as far as it is known."""
    return sum(map(self.planned, self.table.variants))

  def chosen_records(self, variant: Variant) -> list[Record]:
    """The records of the chosen point, seed by seed."""
    point = self.chosen(variant)
    return self._records(variant, point) if point else []

  def missing(self, ahead: bool = False) -> list[Run]:
    """All runs that can be made now; the first is the one to make next.

    Args:
      ahead: whether a search tries all neighbors of its best point at once,
        although the first of them may show that the others are not needed.
    """
    return [
      run
      for group in self.table.groups
      for run in self._searches(group, ahead) or self._repeats(group)
    ]

  def _searches(self, group: tuple[Variant, ...], ahead: bool) -> list[Run]:
    """The next runs of each unfinished search, the least advanced first."""
    searches = [(variant, *self.search(variant)) for variant in group]
    searches.sort(key=lambda search: len(search[1]))
    seed = self.table.seeds[0]
    return [
      self.run(variant, point, seed)
      for variant, _, points in searches
      for point in (points if ahead else points[:1])
    ]

  def _repeats(self, group: tuple[Variant, ...]) -> list[Run]:
    """The missing runs on other seeds, one seed after the other."""
    runs = [run for variant in group for run in self._missing_seeds(variant)]
    return sorted(runs, key=lambda run: self.table.seeds.index(run.seed))

  def _missing_seeds(self, variant: Variant) -> list[Run]:
    """The runs that the contenders of a variant still lack."""
    runs = [
      self.run(variant, point, seed)
      for point in self.contenders(variant)
      for seed in self.table.seeds
    ]
    return [run for run in runs if run.key not in self.records]

  def done(self) -> int:
    """Number of the table's runs that have finished."""
    first, *others = self.table.seeds
    return sum(
      self.run(variant, point, seed).key in self.records
      for variant in self.table.variants
      for seed, points in (
        (first, [variant.at] if variant.at else self.tried(variant)),
        *((other, self.contenders(variant)) for other in others),
      )
      for point in points
    )


def _beside(value: float, searched: SearchRange) -> list[float]:
  """The values next to a value of a search range, the lower first."""
  values = searched.values()
  index = values.index(value)
  return [values[i] for i in (index - 1, index + 1) if 0 <= i < len(values)]


def _loss(record: Record) -> float:
  """The validation loss, which decides; infinite for a run that diverged."""
  loss = record.get("validation_loss")
  return loss if loss is not None and math.isfinite(loss) else math.inf


def perplexity(loss: float) -> float:
  """The perplexity of a loss in nats per token; finite for any finite loss."""
  return math.exp(min(loss, 700))
