"""A run's parts, built once before its loop starts."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import galore_optax
from train.config import schema
from train.data import corpus as corpus_lib
from train.data import prefetch
from train.estimate import flops
from train.parallel import mesh as mesh_lib
from train.parallel import multihost
from train.pretrained import llama_checkpoint
from train.run import checkpoint, metrics, perplexity, sinks, subspace_watch
from train.step import adapters, optimizer, per_layer
from train.step import train_step as train_step_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """What the loop works with, built once by `prepare`."""

  config: schema.Config
  out: pathlib.Path
  corpus: corpus_lib.Corpus
  mesh: jax.sharding.Mesh
  part: tuple[int, int]  # of each batch: which this process feeds, of how many
  placed: train_step_lib.Placed
  tx: optax.GradientTransformationExtraArgs
  rates: np.ndarray  # (steps,) learning rate of each update
  train_step: Any  # jitted
  eval_step: Callable
  feed: prefetch.Loader  # this process's part of the batches to come
  checkpoints: checkpoint.Checkpoints
  log: metrics.Log
  watcher: subspace_watch.Watcher
  seconds: float  # of training before this start

  def put(self, rows: Any) -> Any:
    """Moves this process's rows of a batch to its devices."""
    return mesh_lib.put_batch(rows, mesh_lib.batch_sharding(self.mesh))

  def batch_shape(self) -> Any:
    """The shape of every batch; None where they have several."""
    config = self.config.data
    return jax.ShapeDtypeStruct(
      (config.batch, config.length + 1),
      "int32",
      sharding=mesh_lib.batch_sharding(self.mesh),
    )

  def forward_flops(self) -> float:
    """FLOPs a token of the model's forward pass."""
    return flops.forward_per_token(self.config.model, self.config.data.length)

  def evaluate(
    self, state: train_step_lib.TrainState, say: Callable[[str], None]
  ) -> float:
    """Says and logs how good the model is; the lower the number the better."""
    return perplexity.evaluate(self, state, say)

  def close(self) -> None:
    """Ends the background work: the data's, then the checkpoints'."""
    self.feed.close()
    self.checkpoints.close()
    self.log.close()


class Silent(metrics.Log):
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
  mesh: jax.sharding.Mesh,
) -> tuple[Job, train_step_lib.TrainState]:
  """Lays the model out, makes or restores its state, opens its files."""
  tx, method = per_layer.make(config, mesh)
  reparametrised = adapters.make(config.optimizer)
  placed = train_step_lib.place(config.model, method, mesh, reparametrised)
  restored = checkpoint.restore(out, placed)
  if restored is None:
    given, seed = llama_checkpoint.initial_params(config), config.train.seed
    state = train_step_lib.init_state(config.model, method, placed, seed, given)
    progress = checkpoint.Progress(0.0, None)
  else:
    state, progress = restored
    print(f"continuing from the checkpoint of step {int(state.step)}")
  part = mesh_lib.part_of_batch(mesh)
  done = int(state.step)
  job = Job(
    config=config,
    out=out,
    corpus=corpus,
    mesh=mesh,
    part=part,
    placed=placed,
    tx=tx,
    rates=rates_of(config),
    train_step=train_step_lib.make_train_step(
      method, placed, config.train, config.optimizer.accumulate
    ),
    eval_step=train_step_lib.make_eval_step(placed, config.parts),
    feed=make_feed(corpus, config, part, progress.data),
    checkpoints=checkpoint.Checkpoints(
      out, config.run.keep, config.run.keep_best
    ),
    log=open_log(config, out, done) if multihost.is_first() else Silent(),
    watcher=subspace_watch.Watcher(
      config, placed, galore_optax.describe(tx, placed.weights)
    ),
    seconds=progress.seconds,
  )
  return job, state


def open_log(
  config: schema.SharedConfig, out: pathlib.Path, done: int
) -> metrics.Log:
  """The log, from step `done` on, and where else its numbers go."""
  others = sinks.open_sinks(config.run.sinks, out, schema.flatten(config), done)
  return metrics.Log(out, done, others)


def rates_of(config: schema.Config) -> np.ndarray:
  """The learning rate of each update, as the schedule will give it."""
  count = config.train.steps
  schedule = optimizer.make_schedule(config.optimizer, count)
  with jax.default_device(jax.local_devices()[0]):
    return np.asarray(jax.vmap(schedule)(np.arange(count)))


def make_feed(
  corpus: corpus_lib.Corpus,
  config: schema.Config,
  part: tuple[int, int],
  position: dict[str, int] | None,
) -> prefetch.Loader:
  """The batches of this process, from a saved position or the beginning."""
  return corpus.loader(config.train.seed, *part, state=position)
