"""The training loop: steps, and between them records, evaluations, saves."""

import contextlib
import math
import time
from collections.abc import Callable

import jax

from train import config as configs
from train import data, metrics
from train import mesh as meshes
from train import step as steps
from train.errors import TrainingError
from train.evaluate import evaluate
from train.job import Job


def train(
  job: Job, state: steps.TrainState, stopped: Callable[[], bool]
) -> steps.TrainState:
  """The training loop, from the state's step to the last or to a stop."""
  config, start = job.config, int(state.step)
  if start == 0:
    evaluate(job, state, print)
  if start == config.train.steps:
    return state
  compiled = compile_step(job, state)
  progress = metrics.Progress(start, config.train.steps, config.run.log_every)
  speed = metrics.Throughput()
  pending = None  # the step whose metrics are not fetched yet

  with contextlib.closing(progress), jax.transfer_guard("disallow"):
    for index in range(start, config.train.steps):
      state, values = compiled(state, next_batch(job, index))
      # Step t runs while the numbers of step t - 1 are fetched and shown.
      if pending is not None:
        record(job, progress, speed, *pending)
      pending = (index + 1, values)
      due = actions(config, index + 1, stopped())
      if not due:
        continue
      record(job, progress, speed, *pending)
      pending = None
      if "evaluate" in due:
        evaluate(job, state, progress.say)
      if "save" in due:
        job.checkpoints.save(state)
      speed.pause()
      if stopped():
        break
  return state


def actions(config: configs.Config, step: int, stopping: bool) -> set[str]:
  """What is due after `step` updates: `evaluate` and `save`."""
  last = step == config.train.steps
  due = set()
  if last or step % config.run.eval_every == 0:
    due.add("evaluate")
  if last or stopping or step % config.run.checkpoint_every == 0:
    due.add("save")
  return due


def next_batch(job: Job, index: int) -> jax.Array:
  """The rows of step `index` on the devices."""
  config = job.config
  rows = data.batch_at(
    job.corpus.train, config.data.batch, config.train.seed, index
  )
  return meshes.put_batch(rows, job.sharding)


def compile_step(job: Job, state: steps.TrainState) -> Callable:
  """Compiles the training step for exactly these shapes and shardings."""
  begin = time.perf_counter()
  rows = next_batch(job, 0)
  compiled = job.train_step.lower(state, rows).compile()
  print(f"compiled   in {time.perf_counter() - begin:.1f} s", flush=True)
  return compiled


def record(
  job: Job,
  progress: metrics.Progress,
  speed: metrics.Throughput,
  step: int,
  values: dict[str, jax.Array],
) -> None:
  """Fetches the numbers of a step, shows them, and logs some.

  Raises:
    TrainingError: the loss or the gradient is not finite.
  """
  fetched = {name: float(x) for name, x in jax.device_get(values).items()}
  config = job.config
  if not all(map(math.isfinite, fetched.values())):
    raise TrainingError(
      f"step {step}: loss {fetched['loss']}, gradient norm"
      f" {fetched['grad_norm']}; the newest checkpoint is of step"
      f" {job.checkpoints.latest or 0}. Try a smaller"
      f" optimizer.learning_rate (now {config.optimizer.learning_rate}), a"
      " longer optimizer.warmup or optimizer.clip"
    )
  tokens = config.data.batch * config.data.length
  speed.update(tokens)
  lr = float(job.rates[step - 1])
  progress.update(step, fetched["loss"], lr, speed.rate, tokens)
  if step % config.run.log_every == 0 or step == config.train.steps:
    rate = round(speed.rate, 1)
    job.log.write(step, **fetched, lr=lr, tokens_per_second=rate)
