"""Works through a table, unattended: resumes, reports, stops when asked."""

import contextlib
import datetime
import fcntl
import math
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Iterator

from train import data, stopping
from train.config import DataConfig
from train.errors import UserError
from train.experiments import records, tables, texts, training
from train.experiments.plan import Plan, Record, Run

STOPPED = 130


def plan(
  table: tables.Table, tokens: int, text: str, folder: pathlib.Path
) -> Plan:
  """The table with the runs that are there."""
  return Plan(table, tokens, text, records.read_all(folder))


def work_through(
  table: tables.Table,
  *,
  tokens: int,
  text: str,
  folder: pathlib.Path,
  work: pathlib.Path,
  hours: float = math.inf,
  say: Callable[[str], None] = print,
) -> int:
  """Makes the runs of a table that are missing.

  Args:
    table: what to run.
    tokens: of one run.
    text: one of `texts.TEXTS`, or a file.
    folder: of the results.
    work: folder for the checkpoints of the run under way.
    hours: after which it stops; the run under way is saved and goes on the
      next time.
    say: takes the lines of the report.

  Returns:
    0 if all are there, 130 if it was stopped.

  Raises:
    UserError: another runner is at work here, or the text is not there.
  """
  parts = texts.prepare(text, data.cache_folder(DataConfig()))
  end, spent = time.monotonic() + 3600 * hours, []
  with _alone(work), stopping.stop_requests() as asked:
    stopped = lambda: asked() or time.monotonic() > end
    while runs := (now := plan(table, tokens, text, folder)).missing():
      if stopped():
        return _pause(now, say)
      begin = time.monotonic()
      say(f"{_clock()} {now.done() + 1}/{now.total}  {runs[0].describe()}")
      found = _one(runs[0], parts, work, stopped)
      if found is None:
        return _pause(now, say)
      records.append(folder / f"{table.name}.jsonl", found)
      shutil.rmtree(work / runs[0].key)
      spent.append(time.monotonic() - begin)
      left = (now.total - now.done() - 1) * statistics.mean(spent) / 3600
      say(f"{_clock()} {_outcome(found)}; about {left:.1f} hours left")
  say(f"{table.name}: all {now.total} runs are there")
  return 0


def _one(
  run: Run,
  parts: texts.Parts,
  work: pathlib.Path,
  stopped: Callable[[], bool],
) -> Record | None:
  try:
    return training.train(run, parts, work, stopped)
  except UserError as error:
    raise UserError(f"{run.describe()}: {error}") from error


def _outcome(found: Record) -> str:
  if found["status"] == "diverged":
    return "diverged"
  return (
    f"perplexity {math.exp(min(found['validation_loss'], 700)):.2f} on the"
    " validation text"
  )


def _pause(now: Plan, say: Callable[[str], None]) -> int:
  say(
    f"{_clock()} stopped with {now.done()} of {now.total} runs done; the same"
    " command goes on"
  )
  return STOPPED


def _clock() -> str:
  return datetime.datetime.now().strftime("%H:%M:%S")


@contextlib.contextmanager
def _alone(work: pathlib.Path) -> Iterator[None]:
  """Holds the folder of the work, or says that another process does."""
  work.mkdir(parents=True, exist_ok=True)
  with (work / "lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f"another runner is at work in {work}; wait for it, or give another"
        " --work"
      ) from None
    yield
