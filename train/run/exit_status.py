"""The exit status of a run, and the messages with which it ends."""

import contextlib
import errno
import pathlib
import sys
from collections.abc import Callable, Iterator

from train.common.errors import TrainingError, UserError
from train.run import checkpoint
from train.run.job import Job
from train.run.loop import Outcome


def report_end(job: Job, outcome: Outcome, start: int) -> int | None:
  """Reports how training ended, unless its results are still to be reported.

  Args:
    job: the run's parts.
    outcome: what the loop returned.
    start: the step that it started from.

  Returns:
    The exit status if training was interrupted; None if all steps are done.

  Raises:
    TrainingError: the last state could not be saved.
  """
  step = int(outcome.state.step)
  saved = job.checkpoints.latest
  if saved != step:
    raise TrainingError(
      f"step {step} is done, but its state could not be saved"
      f" ({job.checkpoints.failure}); the newest complete checkpoint is of"
      f" step {saved}. Make room and run the same command, which continues"
      " from there"
    )
  if outcome.stopped:
    print(
      f"stopped after step {step}, which is saved; the same command continues"
      " the run"
    )
    return 130
  if start == step:
    print(f"the run is complete: all {step} steps were done before")
  return None


@contextlib.contextmanager
def saying_what_is_saved(out: pathlib.Path) -> Iterator[None]:
  """Gives a program that is ended at once a message about its checkpoints.

  Args:
    out: the run's folder.
  """
  try:
    yield
  except KeyboardInterrupt:
    steps = checkpoint.steps_in(out)
    if not steps:
      raise
    raise KeyboardInterrupt(
      f"interrupted; step {steps[-1]} is saved, and the same command continues"
      " from there"
    ) from None


def report_errors(action: Callable[[], int]) -> int:
  """Runs a command and prints its errors in one line.

  Returns:
    The exit status: 0 done, 1 diverged, 2 wrong input, 130 interrupted.
  """
  try:
    return action()
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except TrainingError as error:
    print(f"stopped: {error}", file=sys.stderr)
    return 1
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    print(
      f"stopped: {error.filename or '--out'}: {error.strerror}; make room and"
      " run the same command, which continues from the newest checkpoint",
      file=sys.stderr,
    )
    return 1
  except KeyboardInterrupt as interrupt:
    nothing = "interrupted before there was anything to save"
    print(str(interrupt) or nothing, file=sys.stderr)
    return 130
