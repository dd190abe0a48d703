"""Works through a table, unattended: resumes, reports, stops when asked.

Several runners may work at one table, each on a run of its own: a run is
claimed by a lock on a file, which no kill can leave behind locked.
"""

import contextlib
import datetime
import fcntl
import math
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Iterator

from train.common.errors import UserError
from train.config.schema import DataConfig
from train.data import corpus
from train.experiments import results, tables, texts, training
from train.experiments.plan import Plan, Record, Run
from train.run import signals

STOPPED = 130
PATIENCE = 5.0  # seconds between looks at what other runners have done


def plan(
  table: tables.Table, tokens: int, text: str, folder: pathlib.Path
) -> Plan:
  """The table with the runs that are there."""
  return Plan(table, tokens, text, results.read_all(folder))


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
    work: folder for the checkpoints of runs under way.
    hours: after which it stops; the run under way is saved and goes on the
      next time.
    say: takes the lines of the report.

  Returns:
    0 if all are there, 130 if it was stopped.

  Raises:
    UserError: the text is not there.
  """
  parts = texts.prepare(text, corpus.cache_folder(DataConfig()))
  end, spent = time.monotonic() + 3600 * hours, []
  with signals.stop_requests() as asked:
    stopped = lambda: asked() or time.monotonic() > end
    while (now := plan(table, tokens, text, folder)).missing():
      if stopped():
        return _pause(now, say)
      begin = time.monotonic()
      with _claimed(now, folder, work) as run:
        if run is None:  # others are at work at what is left
          time.sleep(PATIENCE)
          continue
        say(f"{_clock()} {now.done() + 1}/{now.total}  {run.describe()}")
        found = _one(run, parts, work, stopped)
        if found is None:
          return _pause(now, say)
        with _locked(work / "lock"):
          results.append(folder / f"{table.name}.jsonl", found)
        shutil.rmtree(work / run.key)
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
def _claimed(
  now: Plan, folder: pathlib.Path, work: pathlib.Path
) -> Iterator[Run | None]:
  """The first missing run that no other runner is at; None if there is none."""
  for run in now.missing():
    path = work / f"{run.key}.lock"
    with _locked(path, wait=False) as mine:
      if not mine:
        continue
      # It may have been finished since the plan was made.
      missing = run.key not in results.read_all(folder)
      if missing:
        yield run
      if run.key in results.read_all(folder):
        path.unlink(missing_ok=True)
      if missing:
        return
  yield None


@contextlib.contextmanager
def _locked(path: pathlib.Path, *, wait: bool = True) -> Iterator[bool]:
  """Holds a file locked; tells whether it could, where it does not wait."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      yield False
      return
    yield True
