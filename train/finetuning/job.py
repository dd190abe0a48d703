"""A fine-tuning run's parts, built once before its loop starts."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import galore_optax
from train.common.errors import UserError
from train.config import schema
from train.config.schema import SharedTrainConfig
from train.data import prefetch
from train.estimate import jaxpr_cost
from train.finetuning import evaluation, freeze
from train.finetuning.batches import Batch, Feed
from train.finetuning.config import Config
from train.finetuning.model_protocol import Learner
from train.finetuning.tasks import Task
from train.parallel import mesh as mesh_lib
from train.parallel import multihost
from train.run import checkpoint, subspace_watch
from train.run import job as job_lib
from train.step import adapters, optimizer, train_step

DROPOUT = 2**31 - 1  # stands for it where a run's key is divided


@dataclasses.dataclass(frozen=True)
class Material:
  """The examples of a run as its model reads them."""

  task: Task
  train: Any  # prepared by the learner
  evaluated: list[Any]
  feed: Feed


@dataclasses.dataclass(frozen=True, eq=False)
class Job(job_lib.Job):
  """What the loop works with, for a task."""

  learner: Learner
  material: Material

  def put(self, rows: Any) -> Any:
    """Moves this process's part of a batch to its devices."""
    sharding = mesh_lib.batch_sharding(self.mesh)
    return {k: mesh_lib.put_batch(v, sharding) for k, v in rows.items()}

  def batch_shape(self) -> None:
    """Batches are as long as their longest row."""
    return None

  def forward_flops(self) -> float:
    """FLOPs a token of the forward pass, at the length of the longest row."""
    material, learner = self.material, self.learner
    longest = [int(np.argmax(material.train.lengths))]
    batch = learner.collate(material.train, longest, 1)
    shapes = {
      k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()
    }
    run = lambda w, b: learner.loss(w, b, None)
    traced = jax.make_jaxpr(run)(self.placed.weights, shapes)
    tokens = int(material.train.lengths[longest[0]])
    return jaxpr_cost.count_flops(traced.jaxpr) / tokens

  def evaluate(
    self, state: train_step.TrainState, say: Callable[[str], None]
  ) -> float:
    """Says and logs the scores; returns one that is the better the lower."""
    index, parts = self.part
    # As many rows at once as a step takes.
    rows = self.config.data.batch // self.config.train.accumulate
    size = rows // parts
    own = slice(index * size, (index + 1) * size)

    def run(batch: Batch) -> tuple[Any, Any, Any]:
      mine = self.put({k: v[own] for k, v in batch.items()})
      return jax.device_get(self.eval_step(state.params, mine))

    found = evaluation.evaluate(
      self.learner, self.material.evaluated, rows, run
    )
    step = int(jax.device_get(state.step))
    say(f"step {step:>5}  {evaluation.text(found)}")
    self.log.write(step, **found)
    return evaluation.rank(self.material.task, found)


def make_gradient(
  learner: Learner, placed: train_step.Placed, config: SharedTrainConfig
) -> train_step.Gradient:
  """The gradient of the mean loss of a batch, in parts if it is asked for."""
  differentiate = jax.value_and_grad(
    lambda w, batch, count, key: learner.loss(w, batch, key) / count
  )

  def gradient(weights: dict, batch: Any, step: jax.Array):
    key = None
    if learner.random:
      # Other numbers than those that weights are rounded with.
      key = jax.random.fold_in(jax.random.key(config.seed), DROPOUT)
      key = jax.random.fold_in(key, step)
    count = jnp.maximum(learner.count(batch), 1).astype(jnp.float32)
    tokens = learner.tokens(batch)
    if config.accumulate == 1:
      loss, grads = differentiate(weights, batch, count, key)
      return grads, loss, tokens

    def add(total: tuple, part: tuple):
      rows, number = part
      own = None if key is None else jax.random.fold_in(key, number)
      loss, grads = differentiate(weights, rows, count, own)
      return jax.tree.map(jnp.add, total, (grads, loss)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), weights)
    zeros = jax.lax.with_sharding_constraint(zeros, placed.weight_shardings)
    parts = {
      k: mesh_lib.microbatches(v, config.accumulate) for k, v in batch.items()
    }
    numbers = jnp.arange(config.accumulate)
    (grads, loss), _ = jax.lax.scan(
      add, (zeros, jnp.float32(0)), (parts, numbers)
    )
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, weights)
    return grads, loss, tokens

  return gradient


def complete(config: Config) -> schema.Config:
  """A pre-training config with the same shared fields, the rest at defaults.

  The optimizer, the training step and the log take one.
  """
  return schema.Config(
    config.preset,
    schema.ModelConfig(**vars(config.model)),
    schema.DataConfig(**vars(config.data)),
    schema.OptimizerConfig(**vars(config.optimizer)),
    schema.TrainConfig(**vars(config.train)),
    config.mesh,
    schema.RunConfig(**vars(config.run), watch="none"),
  )


def reparametrise(learner: Learner, config: Config) -> adapters.Adapters | None:
  """What is trained in place of all weights, if that is anything else.

  Raises:
    UserError: two ways to leave weights as they are were asked for.
  """
  found = adapters.make(complete(config).optimizer, learner.full)
  if not config.task.freeze:
    return found
  if found is not None or config.model.weights != "full":
    raise UserError(
      f"task.freeze={config.task.freeze} is for methods that train weights in"
      f" full precision; optimizer.name={config.optimizer.name} with"
      f" model.weights={config.model.weights} decides itself"
    )
  return freeze.make(config.task.freeze, nnx.to_pure_dict(learner.boxes))


def lay_out(
  learner: Learner, config: Config, mesh: jax.sharding.Mesh
) -> tuple[Any, train_step.Placed]:
  """The optimizer, and the state on a mesh before it takes any memory.

  Raises:
    UserError: the method cannot be made, or not for this model.
  """
  where = (
    None if mesh.size == 1 else mesh_lib.param_shardings(learner.boxes, mesh)
  )
  shared = complete(config)
  tx = optimizer.make_optimizer(shared.optimizer, config.train.steps, where)
  changed = reparametrise(learner, config)
  return tx, train_step.place_model(
    shared.model, learner.graphdef, learner.boxes, tx, mesh, changed
  )


def prepare(
  config: Config,
  out: pathlib.Path,
  learner: Learner,
  material: Material,
  mesh: jax.sharding.Mesh,
  tx: Any,
  placed: train_step.Placed,
) -> tuple[Job, train_step.TrainState]:
  """Makes or restores a run's state, opens its files."""
  pretraining = complete(config)
  restored = checkpoint.restore(out, placed)
  if restored is None:
    seed = config.train.seed
    state = train_step.init_state(
      pretraining.model, tx, placed, seed, learner.params
    )
    progress = checkpoint.Progress(0.0, None)
  else:
    state, progress = restored
    print(f"continuing from the checkpoint of step {int(state.step)}")
  done, part = int(state.step), mesh_lib.part_of_batch(mesh)
  begin = progress.data or {"batches": 0}
  shared: Any = {
    "config": config,
    "out": out,
    "corpus": None,
    # With run.watch=none it looks at nothing: a look knows the LLaMA only.
    "watcher": subspace_watch.Watcher(
      pretraining, placed, galore_optax.describe(tx, placed.weights)
    ),
  }
  job = Job(
    **shared,
    mesh=mesh,
    part=part,
    placed=placed,
    tx=tx,
    rates=job_lib.rates_of(pretraining),
    train_step=train_step.make_train_step(
      tx,
      placed,
      pretraining.train,
      gradient=make_gradient(learner, placed, config.train),
    ),
    eval_step=make_eval_step(learner, placed),
    feed=prefetch.Loader(
      cast(Any, material.feed.batches(begin, config.train.seed, *part)),
      begin,
      config.data.prefetch,
    ),
    checkpoints=checkpoint.Checkpoints(
      out, config.run.keep, config.run.keep_best
    ),
    log=job_lib.open_log(config, out, done)
    if multihost.is_first()
    else job_lib.Silent(),
    seconds=progress.seconds,
    learner=learner,
    material=material,
  )
  return job, state


def make_eval_step(learner: Learner, placed: train_step.Placed) -> Callable:
  """A function of parameters and a batch: outputs and loss, the same on all."""

  @functools.partial(
    jax.jit, out_shardings=mesh_lib.replicated(placed.shardings.step.mesh)
  )
  def eval_step(params: dict, batch: Any) -> tuple[Any, jax.Array, jax.Array]:
    weights = placed.read(params)
    loss = learner.loss(weights, batch, None)
    return learner.outputs(weights, batch), loss, learner.count(batch)

  return eval_step
