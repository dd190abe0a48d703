"""A run's parts, built once before its loop starts."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train import checkpoint, data, metrics, optimizer
from train import config as configs
from train import mesh as meshes
from train import step as steps


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """What the loop works with, built once by `prepare`."""

  config: configs.Config
  out: pathlib.Path
  corpus: data.Corpus
  sharding: jax.sharding.NamedSharding  # of a batch
  placed: steps.Placed
  tx: optax.GradientTransformationExtraArgs
  rates: np.ndarray  # (steps,) learning rate of each step
  train_step: Any  # jitted
  eval_step: Callable
  checkpoints: checkpoint.Checkpoints
  log: metrics.Log


def prepare(
  config: configs.Config,
  out: pathlib.Path,
  corpus: data.Corpus,
  mesh: jax.sharding.Mesh,
) -> tuple[Job, steps.TrainState]:
  """Lays the model out, makes or restores its state, compiles the steps."""
  tx = optimizer.make_optimizer(config.optimizer, config.train.steps)
  placed = steps.place(config.model, tx, mesh)
  checkpoints = checkpoint.Checkpoints(out, config.run.keep)
  if checkpoints.latest is None:
    state = steps.init_state(config.model, tx, placed, config.train.seed)
  else:
    state = checkpoints.restore(placed)
    print(f"continuing from the checkpoint of step {checkpoints.latest}")
  schedule = optimizer.make_schedule(config.optimizer, config.train.steps)
  job = Job(
    config=config,
    out=out,
    corpus=corpus,
    sharding=meshes.batch_sharding(mesh),
    placed=placed,
    tx=tx,
    rates=np.asarray(jax.vmap(schedule)(jnp.arange(config.train.steps))),
    train_step=steps.make_train_step(tx, placed),
    eval_step=steps.make_eval_step(placed),
    checkpoints=checkpoints,
    log=metrics.Log(out, checkpoints.latest or 0),
  )
  return job, state
