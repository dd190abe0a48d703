"""The training loop: steps, and between them logs, evaluations and saves."""

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
from train.step import state as state_lib
from train.step import train_step


class Outcome(NamedTuple):
  """How the loop ended."""

  state: state_lib.TrainState
  stopped: bool  # by a signal, before the last step


class Reporter:
  """Runs steps, and shows and logs their metrics, speed and time."""

  def __init__(self, job: Job, start: int, skipped: int):
    self._job, self._begin = job, time.perf_counter()
    self._last_wait = (self._begin, job.feed.waited)  # when, and how much
    self.progress = progress_lib.Progress(
      start, job.train.steps, job.run.log_every
    )
    self.speed = metrics.Throughput()
    self.say = self.progress.say
    self._compiled_at = 0  # the last step that compiled something
    self._skipped = skipped  # steps so far that did not update the optimizer
    self.resume()

  def step(
    self, compiled: Callable, step: int, state: state_lib.TrainState
  ) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
    """Runs a step, and measures the subspaces where that is due."""
    rows, watcher = self._job.put(next(self._job.feed)), self._job.watcher
    begin, programs = time.perf_counter(), self._programs(compiled)
    if watcher and watcher.is_due(step - 1 - self._skipped):
      before = watcher.before(state, rows)
      state, values = compiled(state, rows)
      values |= watcher.after(before, state)
    else:
      state, values = compiled(state, rows)
    if self._programs(compiled) > programs:
      self._exclude_compilation(time.perf_counter() - begin, step)
    return state, values

  def _programs(self, compiled: Callable) -> int:
    """Number of programs that calls compiled; those compiled ahead are none."""
    watcher = self._job.watcher
    return train_step.count_programs(compiled) + (
      watcher.programs() if watcher else 0
    )

  def _exclude_compilation(self, seconds: float, step: int) -> None:
    """Excludes compilation from training time."""
    since, waited = self._last_wait
    self._begin += seconds
    self._last_wait = (since + seconds, waited)
    self._compiled_at = step
    self.say(f"compiled   in {seconds:.1f} s, with step {step}")

  def resume(self) -> None:
    """Restarts the measurement of speed, after something else than steps."""
    self.speed.pause()
    self.speed.update(0)

  def seconds(self) -> float:
    """Seconds of training so far, including those before an interruption."""
    return self._job.seconds + time.perf_counter() - self._begin

  def wait_share(self) -> float:
    """Fraction of the time since the last call spent waiting for data."""
    now, waited = time.perf_counter(), self._job.feed.waited
    (since, before), self._last_wait = self._last_wait, (now, waited)
    return (waited - before) / (now - since)

  def record(self, step: int, values: dict[str, jax.Array]) -> bool:
    """Fetches the metrics of a step, shows them, and logs them if that is due.

    Returns:
      Whether this step was skipped and too many before it were, too.
    """
    fetched = {name: x.item() for name, x in jax.device_get(values).items()}
    in_row, skipped = fetched.pop("skips_in_row"), fetched.pop("skipped")
    tokens, job = fetched.pop("tokens"), self._job
    subspaces = {
      name: fetched.pop(name) for name in values if name.startswith("subspace/")
    }
    if step == self._compiled_at:
      self.resume()  # part of the step ran while the compiler worked
    else:
      self.speed.update(tokens)
    self._skipped = skipped
    if in_row:
      self._report_skip(step, fetched, in_row, skipped)
      return in_row >= job.train.max_skips
    # The schedule counts updates, and a skipped step makes none.
    lr = float(job.rates[step - 1 - skipped])
    rate = self.speed.rate
    mfu = flops.utilization(rate, job.forward_flops)
    norm = fetched["grad_norm"]
    self.progress.update(step, fetched["loss"], lr, rate, tokens, norm, mfu)
    if subspaces and job.watcher:
      job.log.write(step, **job.watcher.values(subspaces))
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

  def _report_skip(
    self, step: int, fetched: dict[str, float], in_row: int, skipped: int
  ) -> None:
    self.say(
      f"step {step:>5}  skipped: loss {fetched['loss']}, gradient norm"
      f" {fetched['grad_norm']} ({in_row} in a row, {skipped} in all)"
    )
    finite = {k: v for k, v in fetched.items() if math.isfinite(v)}
    self._job.log.write(step, **finite, skipped=skipped)


def train(
  job: Job, state: state_lib.TrainState, stopped: Callable[[], bool]
) -> Outcome:
  """Trains from the state's step to the last step, or until a stop.

  Args:
    job: the run's parts.
    state: where to start; it is consumed.
    stopped: whether a stop was requested; the same in every process.

  Raises:
    Diverged: too many steps in a row had no finite gradient.
  """
  steps, start = job.train.steps, int(state.step)
  if start == 0:
    job.evaluate(state, print)
  if start >= steps:
    return Outcome(state, stopped=False)
  compiled = compile_step(job, state)
  reporter = Reporter(job, start, int(state.skipped))
  with contextlib.closing(reporter.progress), jax.transfer_guard("disallow"):
    numbers = range(start + 1, steps + 1)
    outcome = advance(job, state, compiled, reporter, numbers, stopped)
  waited, seconds = job.feed.waited, reporter.seconds() - job.seconds
  print(
    f"trained    in {seconds:,.1f} s, of which {waited:.1f} s"
    f" ({waited / seconds:.2%}) waiting for data"
  )
  return outcome


def advance(
  job: Job,
  state: state_lib.TrainState,
  compiled: Callable,
  reporter: Reporter,
  numbers: range,
  stopped: Callable[[], bool],
) -> Outcome:
  """Runs the steps of these numbers, and whatever is due between them."""
  pending = None  # the step whose metrics have not been fetched yet
  diverged = False
  for step in numbers:
    state, values = reporter.step(compiled, step, state)
    stopping = stopped()
    # While step t runs, the metrics of step t - 1 are fetched and shown.
    if pending is not None:
      diverged = reporter.record(*pending)
    pending = (step, values)
    job.checkpoints.poll(reporter.say)
    due = due_actions(job, step, stopping or diverged)
    if not due:
      continue
    diverged |= reporter.record(*pending)
    pending = None
    if diverged:
      due.add("save")
    evaluate_and_save(job, state, reporter, due)
    if diverged:
      raise Diverged(_divergence(job, step))
    if stopping:
      return Outcome(state, stopped=step < job.train.steps)
  if pending is not None:
    reporter.record(*pending)
  return Outcome(state, stopped=False)


def evaluate_and_save(
  job: Job, state: state_lib.TrainState, reporter: Reporter, due: set[str]
) -> None:
  """Evaluates and saves the state, as far as that is due."""
  loss = None
  if "evaluate" in due:
    loss = job.evaluate(state, reporter.say)
    if job.run.keep_best and loss < job.checkpoints.best():
      due.add("save")
  if "save" in due and not state_lib.all_finite(state.params):
    job.checkpoints.failure = "its weights are not finite"
    reporter.say(f"not saved: {job.checkpoints.failure}")
  elif "save" in due:
    progress = checkpoint.Progress(reporter.seconds(), job.feed.state())
    job.checkpoints.save(state, progress, loss, reporter.say)
  reporter.resume()


def due_actions(job: Job, step: int, stopping: bool) -> set[str]:
  """What is due after `step` steps, of `evaluate` and `save`."""
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
    f" row (train.max_skips). The weights from before are saved as step"
    f" {job.checkpoints.latest}. Try a smaller optimizer.learning_rate (now"
    f" {job.rates.max():g}), a longer optimizer.warmup or"
    " optimizer.clip, in another --out"
  )


def compile_step(job: Job, state: state_lib.TrainState) -> Callable:
  """Compiles the training step for exactly these shapes and shardings."""
  begin = time.perf_counter()
  rows = job.batch_shape
  packed = any(x.dtype == jnp.int4 for x in jax.tree.leaves(state))
  if packed or rows is None:
    # A program compiled ahead takes batches of one shape only, and refuses
    # 4-bit arguments (jax 0.10.2 takes their packed and unpacked layouts for
    # different ones). `jit` handles both.
    print("compiling  with the first step ...", flush=True)
    return job.train_step
  print("compiling  ...", flush=True)
  compiled = job.train_step.lower(state, rows).compile()
  if job.watcher:
    job.watcher.compile(state, rows)
  print(f"compiled   in {time.perf_counter() - begin:.1f} s", flush=True)
  return compiled
