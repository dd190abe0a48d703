"""The exit status of a run, and the messages with which it ends."""

import contextlib
import pathlib
from collections.abc import Iterator

from train.common.errors import TrainingError
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
    text = "interrupted before there was anything to save"
    if steps:
      text = (
        f"interrupted; step {steps[-1]} is saved, and the same command"
        " continues from there"
      )
    raise KeyboardInterrupt(text) from None
