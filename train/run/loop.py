"""The training loop: steps, and between them records, evaluations, saves."""

import contextlib
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from train.common.errors import Diverged
from train.estimate import flops
from train.run import checkpoint, metrics
from train.run import progress as progress_lib
from train.run.job import Job
from train.step import train_step


class Outcome(NamedTuple):
  """How the loop ended."""

  state: train_step.TrainState
  stopped: bool  # by a signal, before the last step


class Watch:
  """What the loop tells while it runs: numbers, speed, the time so far."""

  def __init__(self, job: Job, start: int, skipped: int):
    self._job, self._begin = job, time.perf_counter()
    self._mark = (self._begin, job.feed.waited)
    self.progress = progress_lib.Progress(
      start, job.train.steps, job.run.log_every
    )
    self.speed = metrics.Throughput()
    self.say = self.progress.say
    self._cold = 0  # the last step with which something was compiled
    self._skipped = skipped  # steps so far that left the optimizer as it was
    self.resume()

  def step(
    self, compiled: Callable, step: int, state: train_step.TrainState
  ) -> tuple[train_step.TrainState, dict[str, jax.Array]]:
    """Runs a step; now and then with a look at the subspaces."""
    rows, watcher = self._job.put(next(self._job.feed)), self._job.watcher
    begin, known = time.perf_counter(), self._programs(compiled)
    if watcher and watcher.is_due(step - 1 - self._skipped):
      look = watcher.before(state, rows)
      state, values = compiled(state, rows)
      values |= watcher.after(look, state)
    else:
      state, values = compiled(state, rows)
    if self._programs(compiled) > known:
      self._leave_out(time.perf_counter() - begin, step)
    return state, values

  def _programs(self, compiled: Callable) -> int:
    """Programs that calls have compiled so far, none if that was done ahead."""
    watcher = self._job.watcher
    return train_step.count_programs(compiled) + (
      watcher.programs() if watcher else 0
    )

  def _leave_out(self, seconds: float, step: int) -> None:
    """Takes the time of a compilation for no time of training."""
    now, waited = self._mark
    self._begin, self._mark = self._begin + seconds, (now + seconds, waited)
    self._cold = step
    self.say(f"compiled   in {seconds:.1f} s, with step {step}")

  def resume(self) -> None:
    """Measures the speed from now on: what came before were no steps."""
    self.speed.pause()
    self.speed.update(0)

  def seconds(self) -> float:
    """Of training so far, those before an interruption included."""
    return self._job.seconds + time.perf_counter() - self._begin

  def wait_share(self) -> float:
    """Share of the time since the last call that went into waiting for data."""
    now = (time.perf_counter(), self._job.feed.waited)
    (then, before), self._mark = self._mark, now
    return (now[1] - before) / (now[0] - then)

  def record(self, step: int, values: dict[str, jax.Array]) -> bool:
    """Fetches the numbers of a step, shows them, and logs some.

    Returns:
      Whether too many steps in a row were skipped, this one the last.
    """
    fetched = {name: x.item() for name, x in jax.device_get(values).items()}
    in_row, skipped = fetched.pop("skips_in_row"), fetched.pop("skipped")
    tokens, job = fetched.pop("tokens"), self._job
    seen = {k: fetched.pop(k) for k in values if k.startswith("subspace/")}
    if step == self._cold:
      self.resume()  # part of it ran beside the compiler
    else:
      self.speed.update(tokens)
    self._skipped = skipped
    if in_row:
      self._tell_skip(step, fetched, in_row, skipped)
      return in_row >= job.train.max_skips
    # A skipped step leaves the optimizer's schedule where it was.
    lr = float(job.rates[step - 1 - skipped])
    rate = self.speed.rate
    mfu = flops.utilisation(rate, job.forward_flops)
    norm = fetched["grad_norm"]
    self.progress.update(step, fetched["loss"], lr, rate, tokens, norm, mfu)
    if seen and job.watcher:
      job.log.write(step, **job.watcher.values(seen))
    if step % job.run.log_every == 0 or step == job.train.steps:
      job.log.write(
        step,
        **fetched,
        lr=lr,
        tokens_per_second=round(rate, 1),
        mfu=mfu,
        skipped=skipped,
        seconds=round(self.seconds(), 3),
        wait_share=round(self.wait_share(), 4),
      )
    return False

  def _tell_skip(
    self, step: int, fetched: dict[str, float], in_row: int, skipped: int
  ) -> None:
    self.say(
      f"step {step:>5}  skipped: loss {fetched['loss']}, gradient norm"
      f" {fetched['grad_norm']} ({in_row} in a row, {skipped} in all)"
    )
    known = {k: v for k, v in fetched.items() if math.isfinite(v)}
    self._job.log.write(step, **known, skipped=skipped)


def train(
  job: Job, state: train_step.TrainState, stopped: Callable[[], bool]
) -> Outcome:
  """The training loop, from the state's step to the last or to a stop.

  Args:
    job: the run's parts.
    state: where to start; it is consumed.
    stopped: whether a stop was asked for, the same in every process.

  Raises:
    Diverged: too many steps in a row had no finite gradient.
  """
  steps, start = job.train.steps, int(state.step)
  if start == 0:
    job.evaluate(state, print)
  if start >= steps:
    return Outcome(state, stopped=False)
  compiled = compile_step(job, state)
  watch = Watch(job, start, int(state.skipped))
  with contextlib.closing(watch.progress), jax.transfer_guard("disallow"):
    numbers = range(start + 1, steps + 1)
    outcome = advance(job, state, compiled, watch, numbers, stopped)
  waited, seconds = job.feed.waited, watch.seconds() - job.seconds
  print(
    f"waited     {waited:.1f} s for data, {waited / seconds:.2%} of"
    f" {seconds:,.1f} s of training"
  )
  return outcome


def advance(
  job: Job,
  state: train_step.TrainState,
  compiled: Callable,
  watch: Watch,
  numbers: range,
  stopped: Callable[[], bool],
) -> Outcome:
  """Makes the steps of these numbers, with all that is due between them."""
  pending = None  # the step whose metrics are not fetched yet
  diverged = False
  for step in numbers:
    state, values = watch.step(compiled, step, state)
    stopping = stopped()
    # Step t runs while the numbers of step t - 1 are fetched and shown.
    if pending is not None:
      diverged = watch.record(*pending)
    pending = (step, values)
    job.checkpoints.poll(watch.say)
    due = actions(job, step, stopping or diverged)
    if not due:
      continue
    diverged |= watch.record(*pending)
    pending = None
    if diverged:
      due.add("save")
    settle(job, state, watch, due)
    if diverged:
      raise Diverged(_divergence(job, step))
    if stopping:
      return Outcome(state, stopped=step < job.train.steps)
  if pending is not None:
    watch.record(*pending)
  return Outcome(state, stopped=False)


def settle(
  job: Job, state: train_step.TrainState, watch: Watch, due: set[str]
) -> None:
  """Evaluates and saves, whatever of it is due."""
  loss = None
  if "evaluate" in due:
    loss = job.evaluate(state, watch.say)
    if job.run.keep_best and loss < job.checkpoints.best():
      due.add("save")
  if "save" in due and not train_step.all_finite(state.params):
    job.checkpoints.failure = "its weights are not finite"
    watch.say(f"not saved: {job.checkpoints.failure}")
  elif "save" in due:
    progress = checkpoint.Progress(watch.seconds(), job.feed.state())
    job.checkpoints.save(state, progress, loss, watch.say)
  watch.resume()


def actions(job: Job, step: int, stopping: bool) -> set[str]:
  """What is due after `step` steps: `evaluate` and `save`."""
  last = step == job.train.steps
  due = set()
  if last or step % job.run.eval_every == 0:
    due.add("evaluate")
  if last or stopping or step % job.run.checkpoint_every == 0:
    due.add("save")
  return due


def _divergence(job: Job, step: int) -> str:
  job.checkpoints.settle()
  return (
    f"step {step}: no finite gradient in {job.train.max_skips} steps in a"
    f" row (train.max_skips). The weights from before them are saved as step"
    f" {job.checkpoints.latest}. Try a smaller optimizer.learning_rate (now"
    f" {job.rates.max():g}), a longer optimizer.warmup or"
    " optimizer.clip, in another --out"
  )


def compile_step(job: Job, state: train_step.TrainState) -> Callable:
  """Compiles the training step for exactly these shapes and shardings."""
  begin = time.perf_counter()
  rows = job.batch_shape
  packed = any(x.dtype == jnp.int4 for x in jax.tree.leaves(state))
  if packed or rows is None:
    # One program does not fit batches of several shapes; and one compiled
    # ahead refuses 4-bit arguments (jax 0.10.2: it takes packed and unpacked
    # layouts for different ones). `jit` sees to both.
    print("compiling  with the first step ...", flush=True)
    return job.train_step
  print("compiling  ...", flush=True)
  compiled = job.train_step.lower(state, rows).compile()
  if job.watcher:
    job.watcher.compile(state, rows)
  print(f"compiled   in {time.perf_counter() - begin:.1f} s", flush=True)
  return compiled
