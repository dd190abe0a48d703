"""The parts of a run, built once before the training loop starts."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from train.config import schema
from train.data import corpus as corpus_lib
from train.data import prefetch
from train.estimate import flops
from train.parallel import mesh as mesh_lib
from train.parallel import multihost
from train.run import checkpoint, metrics, perplexity, sinks, subspace_watch
from train.step import losses as losses_lib
from train.step import optimizer
from train.step import state as state_lib
from train.step import train_step as train_step_lib
from train.step.setup import Setup

Say = Callable[[str], None]  # prints a line, without breaking a progress bar
Evaluate = Callable[[state_lib.TrainState, Say], float]


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """What the training loop works with, whatever is trained.

  What differs between pre-training and fine-tuning is given as functions and
  values, so that neither has to override anything of the other.
  """

  out: pathlib.Path
  train: schema.SharedTrainConfig
  run: schema.SharedRunConfig
  rates: np.ndarray  # (steps,) learning rate of each update
  train_step: Any  # jitted
  eval_step: Callable  # jitted; what `evaluate` runs
  put: Callable[[Any], Any]  # moves this process's rows to its devices
  evaluate: Evaluate  # reports, logs and returns a score; lower is better
  batch_shape: Any  # shape and sharding of all batches; None: they vary
  forward_flops: float  # a token, of the forward pass
  feed: prefetch.Loader  # this process's rows of the batches to come
  checkpoints: checkpoint.Checkpoints
  log: metrics.Log
  watcher: subspace_watch.Watcher | None
  seconds: float  # of training before this start

  def close(self) -> None:
    """Ends the background work: the data's, then the checkpoints'."""
    self.feed.close()
    self.checkpoints.close()
    self.log.close()


class NullLog(metrics.Log):
  """The log of the processes that write no files."""

  def __init__(self):
    pass

  def write(self, step: int, **values: Any) -> None:
    """Writes nothing."""

  def close(self) -> None:
    """Closes nothing."""


def prepare(
  config: schema.Config,
  out: pathlib.Path,
  corpus: corpus_lib.Corpus,
  setup: Setup,
  watcher: subspace_watch.Watcher | None = None,
  initial_params: Callable[[], dict | None] = lambda: None,
) -> tuple[Job, state_lib.TrainState]:
  """Builds a pre-training job, with a new or a restored training state.

  Args:
    config: the run.
    out: its folder.
    corpus: the text that it reads.
    setup: its model and optimizer.
    watcher: measures subspaces; None for no measurements.
    initial_params: see `restore_or_init`.
  """
  mesh, abstract = setup.mesh, setup.abstract
  state, progress = restore_or_init(
    out, setup.updater, abstract, config.train.seed, initial_params
  )
  part = mesh_lib.batch_part(mesh)
  sharding = mesh_lib.batch_sharding(mesh)
  put = lambda rows: mesh_lib.put_batch(rows, sharding)
  eval_step = losses_lib.make_eval_step(abstract, config.parts)
  log = open_log(config, out, int(state.step))
  evaluator = perplexity.Evaluator(
    corpus, config.data.batch, part, eval_step, put, log
  )
  job = Job(
    out=out,
    train=config.train,
    run=config.run,
    rates=learning_rates(config.optimizer, config.train.steps),
    train_step=train_step_lib.make_train_step(
      setup.updater,
      abstract,
      config.train,
      config.optimizer.accumulate,
      reduce=config.mesh.reduce,
    ),
    eval_step=eval_step,
    put=put,
    evaluate=evaluator,
    batch_shape=jax.ShapeDtypeStruct(
      (config.data.batch, config.data.length + 1), "int32", sharding=sharding
    ),
    forward_flops=flops.forward_per_token(
      abstract.graphdef, abstract.weights, config.data.length
    ),
    feed=corpus.loader(config.train.seed, *part, state=progress.data),
    checkpoints=checkpoint.Checkpoints(
      out, config.run.keep, config.run.keep_best
    ),
    log=log,
    watcher=watcher,
    seconds=progress.seconds,
  )
  return job, state


def restore_or_init(
  out: pathlib.Path,
  updater: state_lib.Updater,
  abstract: state_lib.AbstractState,
  seed: int,
  initial_params: Callable[[], dict | None] = lambda: None,
) -> tuple[state_lib.TrainState, checkpoint.Progress]:
  """The state of the newest checkpoint, or a new one where there is none.

  Args:
    out: the run's folder.
    updater: what updates the weights.
    abstract: where the state lives.
    seed: of fresh weights.
    initial_params: reads the weights to start from, arrays on the host; called
      only where there is no checkpoint. It returns None for fresh weights.

  Raises:
    UserError: there are checkpoints, and none can be restored.
  """
  restored = checkpoint.restore(out, abstract)
  if restored is None:
    params = initial_params()
    state = state_lib.init_state(updater, abstract, seed, params)
    return state, checkpoint.Progress(0.0, None)
  print(f"continuing from the checkpoint of step {int(restored[0].step)}")
  return restored


def open_log(
  config: schema.SharedConfig, out: pathlib.Path, resumed_at: int
) -> metrics.Log:
  """The run's log with its sinks; in all processes but the first a null one.

  Args:
    config: the run.
    out: its folder.
    resumed_at: the step that the run goes on from, or 0.
  """
  if not multihost.is_first():
    return NullLog()
  fields = schema.flatten(config)
  others = sinks.open_sinks(config.run.sinks, out, fields, resumed_at)
  return metrics.Log(out, resumed_at, others)


def learning_rates(config: schema.OptimizerConfig, steps: int) -> np.ndarray:
  """The learning rate of each update, as the schedule will give it."""
  schedule = optimizer.make_schedule(config, steps)
  with jax.default_device(jax.local_devices()[0]):
    return np.asarray(jax.vmap(schedule)(np.arange(steps)))
