"""Makes the runs of a table, unattended: resumes, reports, stops on request."""

import datetime
import math
import pathlib
import statistics
import time
from collections.abc import Callable

import jax

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
  lanes: int = 1,
  say: Callable[[str], None] = print,
) -> int:
  """Makes the runs of a table that have no result.

  Args:
    table: the table.
    tokens: number of tokens of each run.
    text: a name from `texts.TEXTS`, or a file.
    folder: folder of the results.
    work: folder for the checkpoints of unfinished runs.
    hours: time after which to stop; the runs under way are saved, and the next
      call continues them.
    lanes: most runs that are trained side by side, by one program.
    say: prints a line of progress.

  Returns:
    0 if all runs have a result, 130 after a stop.

  Raises:
    UserError: the text is missing.
  """
  _check(lanes)
  cache = corpus.cache_folder(DataConfig())
  parts = texts.prepare(text, cache)
  other = texts.prepare(table.other, cache).test if table.other else None
  current = lambda: plan(table, tokens, text, folder)
  end, durations = time.monotonic() + 3600 * hours, []
  with signals.stop_requests() as stop_requested:
    stopped = lambda: stop_requested() or time.monotonic() > end

    def make(runs: list[Run], out: pathlib.Path) -> list[Record] | None:
      now, begin = current(), time.monotonic()
      for i, run in enumerate(runs, start=now.done() + 1):
        say(f"{_clock()} {i}/{now.total}  {run.describe()}")
      records = _train(runs, parts, other, out, stopped)
      if records is not None:
        durations.append((time.monotonic() - begin) / len(runs))
        runs_left = now.total - now.done() - len(runs)
        left = runs_left * statistics.mean(durations) / 3600
        reached = "; ".join(map(_outcome, records))
        say(f"{_clock()} {reached}; about {left:.1f} hours left")
      return records

    complete = sweep.run_missing(
      lambda: current().missing(ahead=lanes > 1),
      make,
      folder / f"{table.name}.jsonl",
      work,
      stopped,
      sweep.Together(lanes, lambda run: training.program_of(run, parts)),
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


def _check(lanes: int) -> None:
  """Raises if runs cannot be trained side by side."""
  if lanes > 1 and jax.default_backend() == "cpu":
    raise UserError(
      f"--lanes is {lanes}, which is for a GPU or TPU: a CPU gains nothing from"
      " runs side by side, and batches of factorizations may hang on it. Leave"
      " it at 1, and start the command once a core"
    )


def _train(
  runs: list[Run],
  parts: texts.Parts,
  other: pathlib.Path | None,
  out: pathlib.Path,
  stopped: Callable[[], bool],
) -> list[Record] | None:
  try:
    return training.train(runs, parts, out, stopped, other)
  except UserError as error:
    raise UserError(f"{runs[0].describe()}: {error}") from error


def _outcome(record: Record) -> str:
  if record["status"] == "diverged":
    return "diverged"
  reached = perplexity(record["validation_loss"])
  return f"perplexity {reached:.2f} on the validation text"


def _clock() -> str:
  return datetime.datetime.now().strftime("%H:%M:%S")
