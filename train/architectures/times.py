"""Times of the training steps of AdamW and GaLore, side by side."""

import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from train.architectures import loop, tables
from train.architectures.catalog import Entry
from train.common import atomic_files
from train.measure import machine

FILE = "times.json"
ROUNDS = 5
WARM_UP = 2  # steps before any time is measured


def measure(
  entries: Sequence[Entry],
  folder: pathlib.Path,
  rounds: int = ROUNDS,
  say: Callable[[str], None] = print,
) -> None:
  """Times whole training steps, and writes their medians to `times.json`.

  The methods alternate: in every round, each makes the steps of one gap, with
  its refreshes. The machine's load changes over minutes, so that ratios can be
  trusted where seconds cannot.

  Args:
    entries: The architectures.
    folder: Folder of the records.
    rounds: Number of rounds.
    say: Prints a line for each architecture.
  """
  for entry in entries:
    found = load(folder) | {entry.name: _medians(entry, rounds)}
    content = {"architectures": found}
    content |= machine.provenance("python -m train.architectures time")
    atomic_files.write_text(folder / FILE, json.dumps(content, indent=2) + "\n")
    say(f"{entry.name}: {found[entry.name]}")


def _medians(entry: Entry, rounds: int) -> dict[str, dict[str, float]]:
  """Method to its processor seconds a step, and to its ratio to AdamW's."""
  first = tables.ADAMW.optimizer
  methods = [variant.optimizer for variant in tables.table(entry).variants]
  steppers = {method: _stepper(entry, method) for method in methods}
  seconds = [
    {method: stepper() for method, stepper in steppers.items()}
    for _ in range(rounds)
  ]
  return {
    method: {
      "cpu_seconds": round(statistics.median(x[method] for x in seconds), 5),
      "ratio": round(
        statistics.median(x[method] / x[first] for x in seconds), 2
      ),
    }
    for method in methods
  }


def _stepper(entry: Entry, method: str) -> Callable[[], float]:
  """A function that makes the steps of one gap; seconds of a step."""
  config = entry.module().Config()
  rates = loop.Rates(method, tables.RATES.start, tables.MULTIPLIERS.start)
  trainer = loop.build(entry, config, rates)
  state = trainer.start(0)
  batches = entry.prepare(config).batches(0)

  def make_steps(count: int) -> float:
    nonlocal state
    waiting = [next(batches) for _ in range(count)]
    loss: Any = 0.0
    begin = time.process_time()
    for batch in waiting:
      state, loss = trainer.step(state, batch)
    jax.block_until_ready(loss)
    return (time.process_time() - begin) / count

  make_steps(WARM_UP)
  return lambda: make_steps(config.gap)


def load(folder: pathlib.Path) -> dict[str, Any]:
  """The times of each architecture; none if they were not measured."""
  path = folder / FILE
  if not path.exists():
    return {}
  return json.loads(path.read_text(encoding="utf-8"))["architectures"]
