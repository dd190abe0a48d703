"""Time of a training step under each method, measured in one process.

The times in the records of a table cannot be compared: the runs were made at
different times, under different loads of the machine.
"""

import contextlib
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from train.common import atomic_files
from train.config.schema import DataConfig
from train.data import corpus as corpus_lib
from train.experiments import texts, training
from train.experiments.plan import Plan, Run
from train.measure import machine, trial

FILE = "steps.json"
ROUNDS = 3
WARM_UP = 2  # steps before any time is measured
PARTS = 10  # a round is a tenth of a run, in which every basis is refreshed


def measure(
  plan: Plan,
  folder: pathlib.Path,
  rounds: int = ROUNDS,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Times whole training steps of all variants of a table.

  The variants alternate: in every round, each makes the steps of one gap with
  its refreshes. The results are medians over the rounds: of processor seconds
  per step, and of the ratio to the first variant's seconds in the same round.

  Args:
    plan: The table; each variant is timed at its chosen point.
    folder: Folder of the results; the times are written to `steps.json` there.
    rounds: Number of rounds.
    say: Called with a line of progress for each variant.
  """
  parts = texts.prepare(plan.text, corpus_lib.cache_folder(DataConfig()))
  start = plan.table.rates.start, plan.table.multipliers.start
  runs = {
    variant.name: plan.run(variant, plan.chosen(variant) or start, 0)
    for variant in plan.table.variants
  }
  with contextlib.ExitStack() as stack:
    steppers = {}
    for name, run in runs.items():
      steppers[name] = stack.enter_context(_stepper(run, parts))
      say(f"compiled  {name}")
    times = [
      {name: make_steps() for name, make_steps in steppers.items()}
      for _ in range(rounds)
    ]
  command = (
    f"python -m train.experiments time {plan.table.name}"
    f" --tokens {plan.tokens} --text {plan.text}"
  )
  results = {
    **machine.provenance(command),
    "rounds": rounds,
    "tables": _load(folder) | {plan.table.name: _medians(times)},
  }
  atomic_files.write_text(folder / FILE, json.dumps(results, indent=2) + "\n")
  return results


@contextlib.contextmanager
def _stepper(run: Run, parts: texts.Parts) -> Iterator[Callable[[], float]]:
  """Yields a function that times a round of steps, in seconds per step."""
  config = training.config_of(run, parts)
  with trial.start(config) as trained:
    job, state = trained.job, trained.state

    def make_steps(count: int = max(1, config.train.steps // PARTS)) -> float:
      nonlocal state
      begin = time.process_time()
      with jax.set_mesh(trained.setup.mesh):
        for _ in range(count):
          state, _ = job.train_step(state, job.put(next(job.feed)))
        jax.block_until_ready(state)
      return (time.process_time() - begin) / count

    make_steps(WARM_UP)
    yield make_steps


def _medians(rounds: list[dict[str, float]]) -> dict[str, Any]:
  """Medians over the rounds, by name of the variant."""
  first, *_ = rounds[0]
  return {
    name: {
      "cpu_seconds": round(statistics.median(x[name] for x in rounds), 4),
      "ratio": round(statistics.median(x[name] / x[first] for x in rounds), 3),
    }
    for name in rounds[0]
  }


def _load(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / FILE
  if not path.exists():
    return {}
  return json.loads(path.read_text(encoding="utf-8"))["tables"]


def ratios(folder: pathlib.Path, table: str) -> dict[str, float]:
  """The step times of a table's variants, relative to the first variant's."""
  by_name = _load(folder).get(table, {})
  return {name: times["ratio"] for name, times in by_name.items()}
