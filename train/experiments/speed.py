"""How long a step takes under each method, side by side in one process.

Times that were taken in the runs of a table are no comparison: these were made
at other times, beside other work.
"""

import contextlib
import datetime
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from train.common import atomic_files
from train.config.schema import DataConfig
from train.data import corpus as corpus_lib
from train.experiments import texts, training
from train.experiments.plan import Plan, Run
from train.measure import machine
from train.parallel import mesh as mesh_lib
from train.run import job as job_lib
from train.step import setup as setup_lib

FILE = "steps.json"
LAPS = 3
WARM = 2  # steps before anything is measured
PARTS = 10  # of a run: a lap is one, in which every basis is refreshed


def measure(
  plan: Plan,
  folder: pathlib.Path,
  laps: int = LAPS,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Times whole training steps of all entries of a table.

  Entries take turns: each makes the steps of one gap, refreshes included, then
  the next one does. What is kept are medians over the laps, of processor
  seconds a step and of their ratio to the first entry's in the same lap.

  Args:
    plan: the table; each entry is taken at its chosen point.
    folder: of the results; what was found goes to `steps.json` there.
    laps: how often each has its turn.
    say: takes a line an entry.
  """
  parts = texts.prepare(plan.text, corpus_lib.cache_folder(DataConfig()))
  start = plan.table.rates.start, plan.table.multipliers.start
  runs = {
    entry.name: plan.run(entry, plan.chosen(entry) or start, 0)
    for entry in plan.table.entries
  }
  with contextlib.ExitStack() as stack:
    walkers = {}
    for name, run in runs.items():
      walkers[name] = stack.enter_context(_walking(run, parts))
      say(f"compiled  {name}")
    times = [
      {name: walk(_lap(runs[name])) for name, walk in walkers.items()}
      for _ in range(laps)
    ]
  found = {
    "command": f"python -m train.experiments time {plan.table.name}"
    f" --tokens {plan.tokens} --text {plan.text}",
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "machine": machine.machine(),
    "versions": machine.versions(),
    "laps": laps,
    "tables": _load(folder) | {plan.table.name: _medians(times)},
  }
  atomic_files.write_text(folder / FILE, json.dumps(found, indent=2) + "\n")
  return found


def _lap(run: Run) -> int:
  shape = training.config_of(run, texts.Parts(*[pathlib.Path()] * 3))
  return max(1, shape.train.steps // PARTS)


@contextlib.contextmanager
def _walking(run: Run, parts: texts.Parts):
  """A function that makes steps of a run, and gives their mean time."""
  config = training.config_of(run, parts)
  corpus = corpus_lib.prepare(config.data, config.model.vocab_size)
  mesh = mesh_lib.make_mesh(config.mesh, config.data.batch)
  with tempfile.TemporaryDirectory() as out, jax.set_mesh(mesh):
    with training.aside(pathlib.Path(out) / "log.txt"):
      setup = setup_lib.make(config.model, config.optimizer, config.train, mesh)
      job, state = job_lib.prepare(config, pathlib.Path(out), corpus, setup)

    def walk(count: int) -> float:
      nonlocal state
      begin = time.process_time()
      for _ in range(count):
        state, _ = job.train_step(state, job.put(next(job.feed)))
      jax.block_until_ready(state)
      return (time.process_time() - begin) / count

    try:
      walk(WARM)
      yield walk
    finally:
      job.close()


def _medians(times: list[dict[str, float]]) -> dict[str, Any]:
  first, *_ = times[0]
  return {
    name: {
      "cpu_seconds": round(statistics.median(lap[name] for lap in times), 4),
      "ratio": round(
        statistics.median(lap[name] / lap[first] for lap in times), 3
      ),
    }
    for name in times[0]
  }


def _load(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / FILE
  if not path.exists():
    return {}
  return json.loads(path.read_text(encoding="utf-8"))["tables"]


def ratios(folder: pathlib.Path, table: str) -> dict[str, float]:
  """Name of an entry to its step's time, of the first entry's."""
  found = _load(folder).get(table, {})
  return {name: times["ratio"] for name, times in found.items()}
