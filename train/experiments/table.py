"""What a table of runs is: variants, a search, and what all runs share."""

from typing import NamedTuple

Settings = tuple[str, ...]


class SearchRange(NamedTuple):
  """Numbers to search, from `start` on, each a factor from the next."""

  start: float
  low: float
  high: float
  factor: float = 2.0

  def values(self) -> list[float]:
    """All numbers of the range in ascending order."""
    numbers = [self.start]
    while numbers[0] / self.factor >= self.low:
      numbers.insert(0, numbers[0] / self.factor)
    while numbers[-1] * self.factor <= self.high:
      numbers.append(numbers[-1] * self.factor)
    return numbers


class Variant(NamedTuple):
  """A method with its settings: a row of a table.

  Attributes:
    name: Short name.
    label: Name in the printed table.
    optimizer: Optimizer of the preset.
    settings: Fields of the config that define the variant.
    gaps: Approximate number of bases that a matrix has in a run; ReLoRA has
      half as many cycles.
    at: Learning rate and multiplier, if they are fixed and not searched.
  """

  name: str
  label: str
  optimizer: str
  settings: Settings = ()
  gaps: int = 10
  at: tuple[float, float] | None = None


class Table(NamedTuple):
  """Variants that are compared with each other.

  Attributes:
    name: Name on the command line, and of the file of records.
    title: Title of the printed table.
    groups: The variants, in groups that are finished one after the other.
    settings: Fields of the config that all variants share.
    rates: Learning rates to search.
    multipliers: Multipliers of the matrices' learning rate to search.
    seeds: Seeds; the search is made on the first one.
    tokens: Tokens of a run of full size.
    evaluations: How often a run is evaluated on the validation text.
    contenders: Most points among which all seeds decide.
    text: The text to train on, unless the command names another.
    other: A text of another kind, which is only reported on; "" for none.
  """

  name: str
  title: str
  groups: tuple[tuple[Variant, ...], ...]
  settings: Settings
  rates: SearchRange
  multipliers: SearchRange
  seeds: tuple[int, ...]
  tokens: int
  evaluations: int = 2
  contenders: int = 3
  text: str = "speeches"
  other: str = ""

  @property
  def is_long(self) -> bool:
    """Whether the table also reports the stability of its runs."""
    return self.evaluations > 2

  @property
  def variants(self) -> tuple[Variant, ...]:
    """All variants, group by group."""
    return tuple(variant for group in self.groups for variant in group)
