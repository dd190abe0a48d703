"""Checkpoints with Orbax: written in the background, restored on any mesh.

A checkpoint is written beside its final name and renamed when it is whole,
and older ones are deleted after that: a run that is killed at any moment
keeps its last complete one.
"""

import concurrent.futures
import contextlib
import errno
import logging
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from train.common.errors import UserError
from train.parallel import multihost
from train.run.checksums import check_sums
from train.run.run_dir import FOLDER
from train.step.train_step import Placed, TrainState

PROGRESS = "progress"  # name of the JSON that lies beside the state
LOSS = "held_out_loss"
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name until it is whole
FULL = os.strerror(errno.ENOSPC)


class Progress(NamedTuple):
  """What a resumed run needs beside the arrays; JSON-able."""

  seconds: float  # of training so far
  data: Any  # position of this process in the data


class Damaged(Exception):
  """A checkpoint that cannot be what was saved; its text says why."""


def steps_in(out: pathlib.Path) -> list[int]:
  """Steps of the checkpoints of a run, oldest first."""
  folder = out / FOLDER
  if not folder.is_dir():
    return []
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def restore(
  out: pathlib.Path, placed: Placed, say: Callable[[str], None] = print
) -> tuple[TrainState, Progress] | None:
  """Reads the newest good checkpoint onto the devices of `placed`.

  A damaged one is named, set aside, and the one before it is tried.

  Args:
    out: the run's folder.
    placed: what was saved, and where it shall live now.
    say: told about damaged checkpoints.

  Returns:
    The state and what was saved with it; None where there is no checkpoint.

  Raises:
    UserError: there are checkpoints, and none can be restored.
  """
  reasons: dict[int, str] = {}
  for step in reversed(steps_in(out)):
    found, reason = None, None
    try:
      found = _load(out / FOLDER / str(step), placed)
    # Orbax and its storage raise whatever a broken file makes them meet.
    except Exception as error:
      reason = _reason(error)
    reason = next(filter(None, multihost.gather(reason)), None)
    if reason is None and found is not None:
      _set_aside(out, reasons, f"step {step} is used instead", say)
      return found
    reasons[step] = reason or "unknown"
  if not reasons:
    return None
  listed = "; ".join(f"step {n}: {reason}" for n, reason in reasons.items())
  raise UserError(
    f"no checkpoint in {out / FOLDER} can be restored ({listed}). Pass"
    " --overwrite to start anew, or name another --out"
  )


def _load(path: pathlib.Path, placed: Placed) -> tuple[TrainState, Progress]:
  """Reads one checkpoint and compares it with its check sums."""
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    placed.state,
    placed.shardings,
  )
  with _context():
    loaded = ocp.load_checkpointables(
      str(path.resolve()), {"state": abstract, PROGRESS: None}
    )
  state, progress = loaded["state"], loaded[PROGRESS]
  if check_sums(state, placed.shardings.step.mesh) != progress["check_sums"]:
    raise Damaged("its arrays are not those that were saved")
  return state, Progress(progress["seconds"], _own(progress["data"]))


def _own(positions: list[Any]) -> Any:
  """This process's of the positions in the data that were saved."""
  count = jax.process_count()
  if len(positions) == count:
    return positions[jax.process_index()]
  if all(position == positions[0] for position in positions):
    return positions[0]  # they count the batches of all processes
  raise Damaged(
    f"{len(positions)} processes read the data, each a part of its own, and"
    f" now there are {count}: go on with {len(positions)}"
  )


def _set_aside(
  out: pathlib.Path,
  reasons: dict[int, str],
  instead: str,
  say: Callable[[str], None],
) -> None:
  """Renames damaged checkpoints, so that their steps can be saved again."""

  def rename() -> None:
    for step, reason in reasons.items():
      path = out / FOLDER / str(step)
      aside = path.with_name(f"{step}.damaged")
      shutil.rmtree(aside, ignore_errors=True)
      path.rename(aside)
      say(
        f"checkpoint {path} is damaged ({reason}); it is kept as"
        f" {aside.name} and that of {instead}"
      )

  multihost.run_on_first(rename)


def _reason(error: BaseException) -> str:
  """What an error says in one line; its type where it says nothing."""
  causes = [error]
  while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
    causes.append(cause)
  texts = [str(cause).strip() for cause in causes]
  if any(FULL in text for text in texts):
    return FULL
  said = [text for text in reversed(texts) if text]
  line = said[0].splitlines()[0] if said else type(error).__name__
  return line if len(line) <= 160 else f"{line[:160]}..."


def silence_orbax() -> None:
  """Turns off what Orbax logs: each failure several times, at length.

  What matters to the run is said by `restore` and by `Checkpoints`.
  """
  for name in ("absl", "concurrent.futures", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _context() -> ocp.Context:
  """Says that the progress is JSON, which Orbax would take for a tree."""
  registry = ocp.handlers.local_registry(include_global_registry=True)
  registry.add(ocp.handlers.JsonHandler, checkpointable_name=PROGRESS)
  context = ocp.Context()
  context.checkpointables.registry = registry
  return context


class Checkpoints:
  """Saves training states in a run's folder, in the background."""

  def __init__(self, out: pathlib.Path, keep: int, keep_best: int = 0):
    """Opens the folder, and clears away what a killed save left there.

    Args:
      out: the run's folder.
      keep: newest checkpoints that stay.
      keep_best: of those with a held-out loss, best ones that stay too.
    """
    self._folder = out.resolve() / FOLDER
    self._policy = _preservation(keep, keep_best)
    self._waiter = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._writing: tuple[int, concurrent.futures.Future] | None = None
    self._orbax = self._open()
    self.latest = self._newest()  # step of the newest complete checkpoint
    self.failure = ""  # why the last save failed; "": it did not

  def _open(self) -> Any:
    return ocp.training.Checkpointer(
      str(self._folder),
      context=_context(),
      preservation_policy=self._policy,
      cleanup_tmp_directories=True,
    )

  def _newest(self) -> int | None:
    newest = self._orbax.latest
    return None if newest is None else newest.step

  def best(self) -> float:
    """The lowest held-out loss of the checkpoints; infinite without any."""
    losses = [
      c.metrics[LOSS] for c in self._orbax.checkpoints if c.metrics is not None
    ]
    return min(losses, default=math.inf)

  def save(
    self,
    state: TrainState,
    progress: Progress,
    loss: float | None = None,
    say: Callable[[str], None] = print,
  ) -> None:
    """Copies the state and writes it in the background.

    A save that fails does not end the training: the failure is said, the
    checkpoints before it stay, and the next save tries again.

    Args:
      state: what to save; may be donated as soon as this returns.
      progress: what goes with it.
      loss: the held-out loss of this state, where it is known.
      say: told about failures.
    """
    self.settle(say)
    step = int(jax.device_get(state.step))
    if self.latest == step:
      return
    saved = {
      "check_sums": check_sums(state, state.step.sharding.mesh),
      "seconds": progress.seconds,
      "data": multihost.gather(progress.data),
    }
    metrics = None if loss is None else {LOSS: loss}
    try:
      # Fetching 4-bit arrays is an implicit transfer even where they are saved.
      with jax.transfer_guard("allow"):
        response = self._orbax.save_checkpointables_async(
          step, {"state": state, PROGRESS: saved}, force=True, metrics=metrics
        )
      self._writing = (step, self._waiter.submit(response.result))
    # A full disk or a lost mount comes in the dress of many libraries.
    except Exception as error:
      self._give_up(step, _reason(error), say)

  def poll(self, say: Callable[[str], None] = print) -> None:
    """Tells about a save in the background that has ended with an error."""
    # Several processes look at it together, before the next save.
    if self._writing and self._writing[1].done() and jax.process_count() == 1:
      self.settle(say)

  def settle(self, say: Callable[[str], None] = print) -> None:
    """Waits for the write under way."""
    if self._writing is None:
      return
    (step, future), self._writing = self._writing, None
    error = future.exception()
    reasons = multihost.gather(error and _reason(error))
    reason = next(filter(None, reasons), None)
    if reason is None:
      self.latest, self.failure = step, ""
    else:
      self._give_up(step, reason, say)

  def _give_up(
    self, step: int, reason: str, say: Callable[[str], None]
  ) -> None:
    """Says why a save failed and clears away what it left on the disk."""
    self.failure = reason
    with contextlib.suppress(Exception):
      self._orbax.close()
    if multihost.is_first():
      self._sweep()
    self._orbax = self._open()
    self.latest = self._newest()
    kept = "none is" if self.latest is None else f"that of {self.latest} is"
    say(
      f"the checkpoint of step {step} could not be written ({reason});"
      f" {kept} complete. The next save tries again: make room for it in"
      f" {self._folder}"
    )

  def _sweep(self, tries: int = 20) -> None:
    """Frees the room that failed saves take.

    Threads of theirs may still write: a folder is removed until it is gone.
    """
    while left := list(self._folder.glob(f"*{UNFINISHED}*")):
      for path in left:
        shutil.rmtree(path, ignore_errors=True)
      tries -= 1
      if not tries:
        return
      time.sleep(0.05)

  def close(self) -> None:
    """Waits for the write under way and ends the background work."""
    self.settle(say=lambda text: None)  # `failure` says it
    self._orbax.close()
    self._waiter.shutdown()


def _preservation(keep: int, keep_best: int) -> Any:
  policies = ocp.training.preservation_policies
  newest = policies.LatestN(keep)
  if not keep_best:
    return newest
  best = policies.BestN(
    get_metric_fn=lambda metrics: metrics[LOSS],
    reverse=True,
    n=keep_best,
    keep_checkpoints_without_metrics=False,
  )
  return policies.AnyPreservationPolicy([newest, best])
