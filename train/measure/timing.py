"""Times of things that run in turn, in one process.

The machine's other work changes over minutes; what runs in turn shares it.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import jax


def clock() -> float:
  """Seconds: of the processor where it computes, of the clock elsewhere.

  Processor seconds count the work of all threads; a busy machine disturbs them
  less than the clock.
  """
  if jax.default_backend() == "cpu":
    return time.process_time()
  return time.perf_counter()


def seconds(run: Callable[[], object]) -> float:
  """Seconds of one run, until its result is there."""
  begin = clock()
  jax.block_until_ready(run())
  return clock() - begin


@dataclasses.dataclass(frozen=True)
class Budget:
  """How often something is timed.

  Attributes:
    most: times at most.
    least: times at least.
    limit: seconds after which it is enough, once there are `least`.
  """

  most: int = 9
  least: int = 3
  limit: float = 20.0

  def asks(self, times: list[float]) -> bool:
    """Whether another time is wanted after these."""
    if len(times) < self.least:
      return True
    return len(times) < self.most and sum(times) < self.limit


def interleave(
  runs: Mapping[str, Callable[[], object]], budget: Budget
) -> dict[str, list[float]]:
  """Times several things in turn, after a first run of each that is not timed.

  Args:
    runs: name to what is run; its result is waited for.
    budget: of each of them.

  Returns:
    Name to seconds, in the order in which they were measured.
  """
  times: dict[str, list[float]] = {name: [] for name in runs}
  for run in runs.values():
    jax.block_until_ready(run())
  while wanted := [name for name in runs if budget.asks(times[name])]:
    for name in wanted:
      times[name].append(seconds(runs[name]))
  return times


def median(times: list[float]) -> float:
  """The middle one."""
  return statistics.median(times)


def text_table(head: list[str], rows: list[list[str]]) -> str:
  """Columns for a terminal: the first to the left, the others to the right."""
  columns = list(zip(head, *rows, strict=True))
  widths = [max(map(len, column)) for column in columns]
  lines = []
  for row in [head, *rows]:
    cells = [
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
  """The same for a Markdown page."""
  rule = ["---"] + ["--:"] * (len(head) - 1)
  return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def mib(size: float) -> str:
  """Bytes as MiB."""
  return f"{size / 2**20:,.1f}" if size < 2**30 else f"{size / 2**20:,.0f}"


def short(value: float | None) -> str:
  """A number with three digits, or a dash."""
  if value is None:
    return "-"
  if abs(value) >= 100:
    return f"{value:,.0f}"
  return f"{value:#.3g}".rstrip(".")
