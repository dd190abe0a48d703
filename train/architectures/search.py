"""Makes the runs that the comparisons lack, unattended; resumes and stops."""

import math
import pathlib
import time
from collections.abc import Callable, Sequence

from train.architectures import loop, tables
from train.architectures.catalog import Entry
from train.experiments import results, sweep
from train.experiments.plan import Plan, Record, Run
from train.measure import machine
from train.run import program_cache, signals

FOLDER = pathlib.Path("docs/results/architectures")
STOPPED = 130


def plan(entry: Entry, folder: pathlib.Path) -> Plan:
  """The comparison of an architecture, with the results there are."""
  table = tables.table(entry)
  records = results.read_all(folder)
  return Plan(table, table.tokens, table.text, records)


def work_through(
  entries: Sequence[Entry],
  folder: pathlib.Path,
  work: pathlib.Path,
  hours: float = math.inf,
  say: Callable[[str], None] = print,
) -> int:
  """Makes the missing runs of architectures, one architecture after the other.

  Args:
    entries: The architectures.
    folder: Folder of the records: a file for each architecture.
    work: Folder for locks; processes that share the work share it.
    hours: Time after which no run is started.
    say: Prints a line of progress.

  Returns:
    0 if all runs have a result, 130 after a stop.
  """
  program_cache.enable()
  end = time.monotonic() + 3600 * hours
  with signals.stop_requests() as requested:
    stopped = lambda: requested() or time.monotonic() > end
    for entry in entries:
      current = lambda entry=entry: plan(entry, folder)

      def make(
        runs: list[Run],
        out: pathlib.Path,
        entry: Entry = entry,
        current: Callable[[], Plan] = current,
      ) -> list[Record]:
        del out  # a run takes a minute: it is not saved on the way
        now = current()
        record = _train(entry, runs[0])
        loss = record.get("validation_loss")
        reached = record["status"] if loss is None else f"{loss:.4f}"
        count = f"{now.done() + 1}/{now.total}"
        say(f"{count}  {entry.name}, {runs[0].describe()}: {reached}")
        return [record]

      path = folder / f"{entry.name}.jsonl"
      missing = lambda current=current: current().missing()
      if not sweep.run_missing(missing, make, path, work, stopped):
        say("stopped; the same command continues")
        return STOPPED
  return 0


def _train(entry: Entry, run: Run) -> Record:
  config = entry.module().Config()
  rates = loop.Rates(run.variant.optimizer, run.rate, run.multiplier)
  return {
    "key": run.key,
    "entry": run.variant.name,
    "learning_rate": run.rate,
    "multiplier": run.multiplier,
    "seed": run.seed,
    "tokens": run.tokens,
    "text": run.text,
    **loop.run(entry, config, rates, run.seed).record,
    **machine.provenance(command(entry, rates, run.seed)),
  }


def command(entry: Entry, rates: loop.Rates, seed: int) -> str:
  """The command that makes a run."""
  return (
    f"python -m train.architectures {entry.name} --optimizer {rates.method}"
    f" --rate {rates.rate:g} --multiplier {rates.multiplier:g} --seed {seed}"
  )
