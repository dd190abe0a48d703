"""Makes the missing runs of a sweep until all have a result.

A sweep can be stopped at any time; started again, it continues the run that
was under way. Several processes may work on one sweep. Each claims a run with
a lock on a file, which the operating system releases when the process ends,
however it ends.
"""

import contextlib
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import filelock

from train.experiments import results

POLL_SECONDS = 5.0  # wait before other processes' runs are checked again


class Run(Protocol):
  """One run of a sweep."""

  @property
  def key(self) -> str:
    """Identifies the run; names its folder and its lock."""
    ...


AnyRun = TypeVar("AnyRun", bound=Run)


def run_missing(
  missing: Callable[[], Sequence[AnyRun]],
  make: Callable[[AnyRun, pathlib.Path], dict[str, Any] | None],
  path: pathlib.Path,
  work: pathlib.Path,
  stopped: Callable[[], bool],
) -> bool:
  """Makes the missing runs, one after another, and records their results.

  Args:
    missing: lists the runs without a result, the next one first. It is called
      again before each run.
    make: makes a run in its folder, where an earlier attempt may have left a
      checkpoint; returns the result, or None if it was stopped.
    path: file of results, to which each run adds a line.
    work: folder for the runs' own folders and locks; processes that work on
      the same sweep share it.
    stopped: whether to stop before the next run.

  Returns:
    Whether all runs have a result; False after a stop.
  """
  while runs := missing():
    if stopped():
      return False
    with claim(runs, missing, work) as run:
      if run is None:  # other processes are making all that is left
        time.sleep(POLL_SECONDS)
        continue
      result = make(run, work / run.key)
      if result is None:
        return False
      with filelock.FileLock(work / "lock"):
        results.append(path, result)
      shutil.rmtree(work / run.key, ignore_errors=True)
  return True


@contextlib.contextmanager
def claim(
  runs: Sequence[AnyRun],
  missing: Callable[[], Sequence[AnyRun]],
  work: pathlib.Path,
) -> Iterator[AnyRun | None]:
  """Locks the first run that no other process is making; None: there is none.

  Args:
    runs: the candidates.
    missing: lists the runs without a result; called again under the lock,
      because another process may have finished the run in the meantime.
    work: folder of the locks.
  """
  is_missing = lambda run: run.key in {other.key for other in missing()}
  work.mkdir(parents=True, exist_ok=True)
  for run in runs:
    path = work / f"{run.key}.lock"
    try:
      lock = filelock.FileLock(path).acquire(blocking=False)
    except filelock.Timeout:
      continue
    with lock:
      wanted = is_missing(run)
      if wanted:
        yield run
      if not is_missing(run):
        path.unlink(missing_ok=True)
      if wanted:
        return
  yield None
