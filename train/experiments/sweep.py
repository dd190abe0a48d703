"""Makes the missing runs of a sweep until all have a result.

A sweep can be stopped at any time; started again, it continues the run that
was under way. Several processes may work on one sweep. Each claims a run with
a lock on a file, which the operating system releases when the process ends,
however it ends.
"""

import contextlib
import hashlib
import pathlib
import shutil
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

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


class Together(NamedTuple):
  """Which runs are made side by side.

  Attributes:
    most: how many at most.
    kind: of a run; those of one kind may be made together.
  """

  most: int
  kind: Callable[[Any], Hashable]


def run_missing(
  missing: Callable[[], Sequence[AnyRun]],
  make: Callable[[list[AnyRun], pathlib.Path], list[dict[str, Any]] | None],
  path: pathlib.Path,
  work: pathlib.Path,
  stopped: Callable[[], bool],
  together: Together | None = None,
) -> bool:
  """Makes the missing runs, one after another, and records their results.

  Args:
    missing: lists the runs without a result, the next one first. It is called
      again before each run.
    make: makes runs in a folder, where an earlier attempt may have left a
      checkpoint; returns their results, or None if they were stopped. It gets
      one run, or several with `together`.
    path: file of results, to which each run adds a line.
    work: folder for the runs' own folders and locks; processes that work on
      the same sweep share it.
    stopped: whether to stop before the next run.
    together: which runs are made side by side; None: one at a time.

  Returns:
    Whether all runs have a result; False after a stop.
  """
  while runs := missing():
    if stopped():
      return False
    with claim(runs, missing, work, together) as claimed:
      if not claimed:  # other processes are making all that is left
        time.sleep(POLL_SECONDS)
        continue
      folder = work / _name(claimed)
      made = make(claimed, folder)
      if made is None:
        return False
      with filelock.FileLock(work / "lock"):
        results.append(path, *made)
      shutil.rmtree(folder, ignore_errors=True)
  return True


def _name(runs: Sequence[Run]) -> str:
  """The name of the folder of runs that are made together."""
  if len(runs) == 1:
    return runs[0].key
  keys = " ".join(run.key for run in runs)
  return hashlib.blake2b(keys.encode(), digest_size=8).hexdigest()


@contextlib.contextmanager
def claim(
  runs: Sequence[AnyRun],
  missing: Callable[[], Sequence[AnyRun]],
  work: pathlib.Path,
  together: Together | None = None,
) -> Iterator[list[AnyRun]]:
  """Locks the first run that no other process is making, and others like it.

  Args:
    runs: the candidates.
    missing: lists the runs without a result; called again under the lock,
      because another process may have finished the run in the meantime.
    work: folder of the locks.
    together: which runs may be locked with the first one.

  Yields:
    The locked runs; none if other processes are making all of them.
  """
  work.mkdir(parents=True, exist_ok=True)
  most, kind = together or Together(1, lambda _: None)
  with contextlib.ExitStack() as locks:
    claimed: list[AnyRun] = []
    for run in runs:
      if claimed and kind(run) != kind(claimed[0]):
        continue
      if _lock(run, missing, work, locks):
        claimed.append(run)
      if len(claimed) == most:
        break
    yield claimed


def _lock(
  run: AnyRun,
  missing: Callable[[], Sequence[AnyRun]],
  work: pathlib.Path,
  locks: contextlib.ExitStack,
) -> bool:
  """Locks a run that has no result, until `locks` is closed."""
  path = work / f"{run.key}.lock"
  is_missing = lambda: run.key in {other.key for other in missing()}
  try:
    lock = filelock.FileLock(path).acquire(blocking=False)
  except filelock.Timeout:
    return False

  def release() -> None:
    if not is_missing():
      path.unlink(missing_ok=True)
    lock.lock.release()

  if not is_missing():
    release()
    return False
  locks.callback(release)
  return True
