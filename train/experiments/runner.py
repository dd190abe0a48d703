"""Makes the runs of a table, unattended: resumes, reports, stops on request."""

import datetime
import math
import pathlib
import statistics
import time
from collections.abc import Callable

from train.common.errors import UserError
from train.config.schema import DataConfig
from train.data import corpus
from train.experiments import results, sweep, texts, training
from train.experiments.plan import Plan, Record, Run, perplexity
from train.experiments.table import Table
from train.run import signals

STOPPED = 130


def plan(table: Table, tokens: int, text: str, folder: pathlib.Path) -> Plan:
  """The plan of a table, with the results there are."""
  return Plan(table, tokens, text, results.read_all(folder))


def work_through(
  table: Table,
  *,
  tokens: int,
  text: str,
  folder: pathlib.Path,
  work: pathlib.Path,
  hours: float = math.inf,
  say: Callable[[str], None] = print,
) -> int:
  """Makes the runs of a table that have no result.

  Args:
    table: the table.
    tokens: number of tokens of each run.
    text: a name from `texts.TEXTS`, or a file.
    folder: folder of the results.
    work: folder for the checkpoints of unfinished runs.
    hours: time after which to stop; the run under way is saved, and the next
      call continues it.
    say: prints a line of progress.

  Returns:
    0 if all runs have a result, 130 after a stop.

  Raises:
    UserError: the text is missing.
  """
  cache = corpus.cache_folder(DataConfig())
  parts = texts.prepare(text, cache)
  other = texts.prepare(table.other, cache).test if table.other else None
  current = lambda: plan(table, tokens, text, folder)
  end, durations = time.monotonic() + 3600 * hours, []
  with signals.stop_requests() as stop_requested:
    stopped = lambda: stop_requested() or time.monotonic() > end

    def make(run: Run, _: pathlib.Path) -> Record | None:
      now, begin = current(), time.monotonic()
      say(f"{_clock()} {now.done() + 1}/{now.total}  {run.describe()}")
      record = _train(run, parts, other, work, stopped)
      if record is not None:
        durations.append(time.monotonic() - begin)
        runs_left = now.total - now.done() - 1
        left = runs_left * statistics.mean(durations) / 3600
        say(f"{_clock()} {_outcome(record)}; about {left:.1f} hours left")
      return record

    complete = sweep.run_missing(
      lambda: current().missing(),
      make,
      folder / f"{table.name}.jsonl",
      work,
      stopped,
    )
  now = current()
  if complete:
    say(f"{table.name}: all {now.total} runs are done")
    return 0
  say(
    f"{_clock()} stopped with {now.done()} of {now.total} runs done; the same"
    " command continues"
  )
  return STOPPED


def _train(
  run: Run,
  parts: texts.Parts,
  other: pathlib.Path | None,
  work: pathlib.Path,
  stopped: Callable[[], bool],
) -> Record | None:
  try:
    return training.train(run, parts, work, stopped, other)
  except UserError as error:
    raise UserError(f"{run.describe()}: {error}") from error


def _outcome(record: Record) -> str:
  if record["status"] == "diverged":
    return "diverged"
  reached = perplexity(record["validation_loss"])
  return f"perplexity {reached:.2f} on the validation text"


def _clock() -> str:
  return datetime.datetime.now().strftime("%H:%M:%S")
