"""Timing of several programs in alternation, within one process.

The load of a machine changes over minutes. Programs that alternate see the same
load, so that their ratio can be trusted where their seconds cannot.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping

import jax


def clock() -> float:
  """Seconds of processor time on a CPU backend, of wall-clock time elsewhere.

  Processor time counts the work of all threads, and other processes disturb it
  less than wall-clock time.
  """
  if jax.default_backend() == "cpu":
    return time.process_time()
  return time.perf_counter()


def seconds(run: Callable[[], object]) -> float:
  """Seconds that one call takes until its result is ready."""
  begin = clock()
  jax.block_until_ready(run())
  return clock() - begin


@dataclasses.dataclass(frozen=True)
class Budget:
  """How often a program is timed.

  Attributes:
    most: Maximum number of times.
    least: Minimum number of times.
    limit: Seconds after which timing ends, once `least` times are there.
  """

  most: int = 9
  least: int = 3
  limit: float = 20.0

  def asks(self, times: list[float]) -> bool:
    """Whether to time once more after these times."""
    if len(times) < self.least:
      return True
    return len(times) < self.most and sum(times) < self.limit


def interleave(
  runs: Mapping[str, Callable[[], object]], budget: Budget
) -> dict[str, list[float]]:
  """Times several functions in alternation, after one untimed call of each.

  Args:
    runs: Functions by name; each is timed until its result is ready.
    budget: How often each of them is timed.

  Returns:
    Seconds by name, in the sequence in which they were measured.
  """
  times: dict[str, list[float]] = {name: [] for name in runs}
  for run in runs.values():
    jax.block_until_ready(run())
  while wanted := [name for name in runs if budget.asks(times[name])]:
    for name in wanted:
      times[name].append(seconds(runs[name]))
  return times
