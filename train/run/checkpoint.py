"""Checkpoints with Orbax: written in the background, restored on any mesh.

A checkpoint is written under a temporary name and renamed when it is complete.
Older ones are deleted after that. So a run that is killed at any moment keeps
its last complete checkpoint.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
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

from train.common import inputs, links
from train.common.errors import TrainingError, UserError
from train.common.fields import Fields, is_integer, is_number, shown
from train.parallel import multihost
from train.run.checksums import check_sums
from train.run.kept_folder import KeptFolder
from train.run.run_dir import FOLDER
from train.step.state import AbstractState, TrainState

PROGRESS = "progress"  # name of the JSON that is saved with the state
LOSS = "held_out_loss"
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name until it is complete
FULL = os.strerror(errno.ENOSPC)


class Progress(NamedTuple):
  """What a resumed run needs besides the arrays; JSON-able."""

  seconds: float  # of training so far
  data: Any  # position of this process in the data

  @staticmethod
  def check(saved: Any) -> dict[str, Any]:
    """What was saved beside a state, if every part has its type.

    Raises:
      Damaged: a part has another.
    """
    try:
      if not isinstance(saved, dict):
        raise UserError(f"{PROGRESS} is {shown(saved)}, not an object")
      fields = Fields(PROGRESS, saved)
      sums = fields.values.get("check_sums")
      if not isinstance(sums, list) or not all(map(is_integer, sums)):
        fields.refuse("check_sums", "a list of whole numbers")
      fields.number("seconds", low=0)
      if not isinstance(saved.get("data"), list) or not saved["data"]:
        fields.refuse("data", "the positions of all processes")
    except UserError as error:
      raise Damaged(str(error)) from None
    # Older checkpoints have none.
    if saved.get("digest", digest(saved)) != digest(saved):
      raise Damaged("its position in the data differs from what was saved")
    return saved


def digest(saved: dict[str, Any]) -> str:
  """A hash of the position in the data, which decides what comes next."""
  text = json.dumps(saved["data"], sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Damaged(Exception):
  """A checkpoint is not what was saved; the text says why."""


def steps_in(out: pathlib.Path) -> list[int]:
  """Steps of the checkpoints of a run, oldest first.

  Raises:
    UserError: there is a file in place of the folder.
  """
  folder = out / FOLDER
  if folder.exists() and not folder.is_dir():
    raise UserError(f"{folder} is a file; it must be the folder of checkpoints")
  if not folder.is_dir():
    return []
  return sorted(int(p.name) for p in folder.iterdir() if _is_step(p))


def _is_step(path: pathlib.Path) -> bool:
  """Whether a path is the folder of a checkpoint: its name is the step's."""
  name = path.name  # `isdigit` alone takes other scripts' digits as well
  plain = name.isascii() and name.isdigit() and name == str(int(name))
  return plain and path.is_dir()


def restore(
  out: pathlib.Path, abstract: AbstractState, say: Callable[[str], None] = print
) -> tuple[TrainState, Progress] | None:
  """Reads the newest good checkpoint onto the devices of `abstract`.

  A damaged one is reported and renamed, and the one before it is tried.

  Args:
    out: the run's folder.
    abstract: shapes and shardings of the state.
    say: prints what is wrong with damaged checkpoints.

  Returns:
    The state and what was saved with it; None if there is no checkpoint.

  Raises:
    UserError: there are checkpoints, and none can be restored.
  """
  reasons: dict[int, str] = {}  # step to why it cannot be restored
  for step in reversed(steps_in(out)):
    found, reason = None, None
    try:
      found = _load(out / FOLDER / str(step), abstract)
    # A broken file surfaces as many exception types.
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
    " --overwrite to start again, or name another --out"
  )


def _load(
  path: pathlib.Path, abstract: AbstractState
) -> tuple[TrainState, Progress]:
  """Reads one checkpoint and verifies its checksums."""
  target = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract.state,
    abstract.shardings,
  )
  links.check_tree(path)
  with reading_progress():
    loaded = ocp.load_checkpointables(
      str(path.resolve()), {"state": target, PROGRESS: None}
    )
  state, saved = loaded["state"], Progress.check(loaded[PROGRESS])
  if check_sums(state, abstract.mesh) != saved["check_sums"]:
    raise Damaged("its arrays differ from those that were saved")
  check_step(int(jax.device_get(state.step)), path)
  return state, Progress(saved["seconds"], _own(saved["data"]))


def check_step(step: int, path: pathlib.Path) -> None:
  """Raises for a checkpoint whose folder is named for another step."""
  if step != int(path.name):
    raise Damaged(
      f"it holds step {step}, so its folder was renamed; name it {step} again"
    )


def _own(positions: list[Any]) -> Any:
  """This process's position in the data, of those that were saved."""
  count = jax.process_count()
  if len(positions) == count:
    return positions[jax.process_index()]
  if all(position == positions[0] for position in positions):
    return positions[0]  # it counts the batches of all processes
  raise Damaged(
    f"it has the data positions of {len(positions)} processes, but there are"
    f" {count} now; continue with {len(positions)} processes"
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
      renamed = path.with_name(f"{step}.damaged")
      links.remove_folder(renamed)
      path.rename(renamed)
      say(
        f"checkpoint {path} is damaged ({reason}); it is renamed to"
        f" {renamed.name}, and {instead}"
      )

  multihost.run_on_first(rename)


def _reason(error: BaseException) -> str:
  """The message of an error in one line; its type if it has no message."""
  causes = [error]
  while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
    causes.append(cause)
  texts = [str(cause).strip() for cause in causes]
  if any(FULL in text for text in texts):
    return FULL
  messages = [text for text in reversed(texts) if text]
  line = messages[0].splitlines()[0] if messages else type(error).__name__
  return line if len(line) <= 300 else f"{line[:300]}..."


def silence_orbax() -> None:
  """Turns off Orbax's logs, which report each failure several times.

  `restore` and `Checkpoints` print what matters to the run.
  """
  for name in ("absl", "concurrent.futures", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def reading_progress() -> ocp.Context:
  """A context that reads progress as JSON; Orbax would take it for a tree."""
  registry = ocp.handlers.local_registry(include_global_registry=True)
  registry.add(ocp.handlers.JsonHandler, checkpointable_name=PROGRESS)
  context = ocp.Context()
  context.checkpointables.registry = registry
  return context


def held_out_loss(metrics: Any) -> float:
  """The loss that was saved with a checkpoint; infinite if it is no number."""
  loss = metrics.get(LOSS) if isinstance(metrics, dict) else None
  return float(loss) if loss is not None and is_number(loss) else math.inf


def _drop_damaged_losses(out: pathlib.Path) -> None:
  """Deletes files of losses that are no JSON, at which Orbax would fail."""
  for step in steps_in(out):
    path = out / FOLDER / str(step) / "metrics" / "metrics"
    if not path.exists() and not path.is_symlink():
      continue
    try:
      inputs.read_object(links.inside(path.parent, path.name))
    except UserError as error:
      print(f"note: {error}; the checkpoint does not count as a best one")
      links.remove_folder(path)
      path.unlink(missing_ok=True)


class Checkpoints:
  """Saves training states in a run's folder, in the background."""

  def __init__(self, out: pathlib.Path, keep: int, keep_best: int = 0):
    """Opens the folder, and removes what a killed save left there.

    Args:
      out: the run's folder.
      keep: number of newest checkpoints to keep.
      keep_best: number of checkpoints with the lowest held-out loss to keep
        besides.
    """
    self._folder = out.resolve() / FOLDER
    self._kept = KeptFolder(out.resolve())
    multihost.run_on_first(lambda: _drop_damaged_losses(out))
    self._policy = _preservation(keep, keep_best)
    self._waiter = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._writing: tuple[int, concurrent.futures.Future] | None = None
    self._orbax = self._open()
    self.latest = self._newest()  # step of the newest complete checkpoint
    self.failure = ""  # why the last save failed; "" if it did not

  def _open(self) -> Any:
    return ocp.training.Checkpointer(
      str(self._folder),
      context=reading_progress(),
      preservation_policy=self._policy,
      cleanup_tmp_directories=True,
    )

  def _newest(self) -> int | None:
    newest = self._orbax.latest
    return None if newest is None else newest.step

  def best(self) -> float:
    """The lowest held-out loss of any checkpoint; infinite without one."""
    losses = [held_out_loss(c.metrics) for c in self._orbax.checkpoints]
    return min(losses, default=math.inf)

  def save(
    self,
    state: TrainState,
    progress: Progress,
    loss: float | None = None,
    say: Callable[[str], None] = print,
  ) -> None:
    """Copies the state and writes it in the background.

    A save that fails does not end the training: the failure is printed,
    earlier checkpoints stay, and the next save tries again.

    Args:
      state: what to save; may be donated as soon as this returns.
      progress: what is saved with it.
      loss: the held-out loss of this state, if it is known.
      say: prints failures.

    Raises:
      TrainingError: the run's folder is not there any more.
    """
    if any(multihost.gather(self._kept.is_lost())):
      self._rescue(state, progress)
    self.settle(say)
    step = int(jax.device_get(state.step))
    if self.latest == step:
      return
    saved: dict[str, Any] = {
      "check_sums": check_sums(state, state.step.sharding.mesh),
      "seconds": progress.seconds,
      "data": multihost.gather(progress.data),
    }
    saved["digest"] = digest(saved)
    metrics = None if loss is None else {LOSS: loss}
    try:
      # Fetching 4-bit arrays is an implicit transfer even where they are saved.
      with jax.transfer_guard("allow"):
        response = self._orbax.save_checkpointables_async(
          step, {"state": state, PROGRESS: saved}, force=True, metrics=metrics
        )
      self._writing = (step, self._waiter.submit(response.result))
    # A full disk or a lost mount surfaces as many exception types.
    except Exception as error:
      self._give_up(step, _reason(error), say)

  def _rescue(self, state: TrainState, progress: Progress) -> None:
    """Saves a state beside the run's folder, which is gone, and says where."""
    step, out = int(jax.device_get(state.step)), self._kept.out
    lost = f"the folder {out} was deleted or replaced during training"
    if self._writing is not None:  # into the folder that is gone
      self._writing[1].exception()
      self._writing = None
    if jax.process_count() > 1:
      raise TrainingError(f"{lost}; nothing after step {self.latest} is saved")
    beside = self._kept.copy()
    others = Checkpoints(beside, keep=1)
    others.save(state, progress)
    others.close()
    if others.latest != step:
      raise TrainingError(f"{lost}, and {beside}: {others.failure}")
    raise TrainingError(
      f"{lost}. Step {step} is saved in {beside}: the same command with --out"
      f" {beside} continues"
    )

  def poll(self, say: Callable[[str], None] = print) -> None:
    """Reports a save in the background that has failed."""
    # Several processes do so together, in `settle` before the next save.
    if self._writing and self._writing[1].done() and jax.process_count() == 1:
      self.settle(say)

  def settle(self, say: Callable[[str], None] = print) -> None:
    """Waits for the save in the background, and reports it if it failed."""
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
    """Reports why a save failed, and removes what it left on the disk."""
    self.failure = reason
    with contextlib.suppress(Exception):
      self._orbax.close()
    if multihost.is_first():
      self._remove_unfinished()
    self._orbax = self._open()
    self.latest = self._newest()
    newest = (
      "there is no complete one"
      if self.latest is None
      else f"the newest complete one is of step {self.latest}"
    )
    say(
      f"the checkpoint of step {step} could not be written ({reason});"
      f" {newest}. The next save tries again: make room for it in"
      f" {self._folder}"
    )

  def _remove_unfinished(self, tries: int = 20) -> None:
    """Removes the folders of failed saves.

    Their threads may still be writing, so this is repeated until all are gone.
    """
    while unfinished := list(self._folder.glob(f"*{UNFINISHED}*")):
      for path in unfinished:
        shutil.rmtree(path, ignore_errors=True)
      tries -= 1
      if not tries:
        return
      time.sleep(0.05)

  def close(self) -> None:
    """Waits for the save in the background and ends the background work."""
    self.settle(say=lambda text: None)  # `failure` keeps the reason
    # What it was writing into a folder that is gone has failed.
    expected = (Exception,) if self._kept.is_lost() else ()
    with contextlib.suppress(*expected):
      self._orbax.close()
    self._waiter.shutdown()


def _preservation(keep: int, keep_best: int) -> Any:
  policies = ocp.training.preservation_policies
  newest = policies.LatestN(keep)
  if not keep_best:
    return newest
  best = policies.BestN(
    get_metric_fn=held_out_loss,
    reverse=True,
    n=keep_best,
    keep_checkpoints_without_metrics=False,
  )
  return policies.AnyPreservationPolicy([newest, best])
