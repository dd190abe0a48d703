"""The parts of a fine-tuning run, built once before its training loop."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.common.errors import UserError
from train.config import schema
from train.data import prefetch
from train.estimate import jaxpr_cost
from train.finetuning import evaluation, freeze
from train.finetuning.batches import Batch, TrainBatches
from train.finetuning.config import Config
from train.finetuning.task_model import TaskModel
from train.finetuning.tasks import Task
from train.parallel import mesh as mesh_lib
from train.run import checkpoint, metrics
from train.run import job as job_lib
from train.step import adapters, optimizer, train_step
from train.step import losses as losses_lib
from train.step import state as state_lib

DROPOUT = 2**31 - 1  # folded into the run's key for the keys of dropout


@dataclasses.dataclass(frozen=True)
class TaskData:
  """The examples of a run, tokenized by its model."""

  task: Task
  train: Any  # a tokenized split
  evaluated: list[Any]  # tokenized splits
  batches: TrainBatches


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
  """Scores the model on the evaluated splits of a task.

  Attributes:
    model: the model.
    data: its examples.
    rows: number of rows in a batch to evaluate.
    part: which part of each batch this process evaluates, of how many.
    eval_step: evaluates a batch with given parameters.
    put: moves this process's rows to its devices.
    log: records the scores.
  """

  model: TaskModel
  data: TaskData
  rows: int
  part: tuple[int, int]
  eval_step: Callable
  put: Callable[[Batch], Any]
  log: metrics.Log

  def __call__(self, state: state_lib.TrainState, say: job_lib.Say) -> float:
    """Reports and logs the scores; returns one of which lower is better."""
    index, parts = self.part
    size = self.rows // parts
    own = slice(index * size, (index + 1) * size)

    def run(batch: Batch) -> tuple[Any, Any, Any]:
      own_rows = self.put({k: v[own] for k, v in batch.items()})
      return jax.device_get(self.eval_step(state.params, own_rows))

    scores = evaluation.evaluate(
      self.model, self.data.evaluated, self.rows, run
    )
    step = int(jax.device_get(state.step))
    say(f"step {step:>5}  {evaluation.describe(scores)}")
    self.log.write(step, **scores)
    return evaluation.objective(self.data.task, scores)


def forward_flops(model: TaskModel, data: TaskData, weights: Any) -> float:
  """FLOPs a token of the forward pass, for the longest training row."""
  longest = [int(np.argmax(data.train.lengths))]
  batch = model.collate(data.train, longest, 1)
  shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
  forward = lambda w, b: model.loss(w, b, None)
  traced = jax.make_jaxpr(forward)(weights, shapes)
  tokens = int(data.train.lengths[longest[0]])
  return jaxpr_cost.count_flops(traced.jaxpr) / tokens


def lean_loss(
  model: TaskModel, config: schema.SharedTrainConfig
) -> losses_lib.Loss:
  """The mean loss of a batch, of which gradients at rank r are taken."""

  def share(
    weights: dict, batch: Any, items: jax.Array, step: Any, index: Any
  ) -> tuple[jax.Array, jax.Array]:
    key = _dropout_key(model, config, step)
    if key is not None and config.accumulate > 1:
      key = jax.random.fold_in(key, index)
    loss = model.loss(weights, batch, key) / items
    return loss, loss

  def count(batch: Any) -> tuple[jax.Array, jax.Array]:
    return model.count_items(batch), model.count_tokens(batch)

  def divide(batch: Any, parts: int) -> Any:
    return {k: mesh_lib.microbatches(v, parts) for k, v in batch.items()}

  return losses_lib.Loss(share, count, divide)


def _dropout_key(
  model: TaskModel, config: schema.SharedTrainConfig, step: Any
) -> jax.Array | None:
  """The random key of a step's dropout; None if the model has none."""
  if not model.has_dropout:
    return None
  # Not the key with which weights are rounded.
  key = jax.random.fold_in(jax.random.key(config.seed), DROPOUT)
  return jax.random.fold_in(key, step)


def make_gradient(
  model: TaskModel,
  abstract: state_lib.AbstractState,
  config: schema.SharedTrainConfig,
) -> losses_lib.Gradient:
  """The gradient of the mean loss of a batch, over `accumulate` parts of it."""
  differentiate = jax.value_and_grad(
    lambda w, batch, count, key: model.loss(w, batch, key) / count
  )

  def gradient(weights: dict, batch: Any, step: jax.Array):
    key = _dropout_key(model, config, step)
    count = jnp.maximum(model.count_items(batch), 1).astype(jnp.float32)
    tokens = model.count_tokens(batch)
    if config.accumulate == 1:
      loss, grads = differentiate(weights, batch, count, key)
      return grads, loss, tokens

    def add(total: tuple, part: tuple):
      rows, index = part
      part_key = None if key is None else jax.random.fold_in(key, index)
      loss, grads = differentiate(weights, rows, count, part_key)
      return jax.tree.map(jnp.add, total, (grads, loss)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), weights)
    zeros = jax.lax.with_sharding_constraint(zeros, abstract.weight_shardings)
    parts = {
      k: mesh_lib.microbatches(v, config.accumulate) for k, v in batch.items()
    }
    indices = jnp.arange(config.accumulate)
    (grads, loss), _ = jax.lax.scan(
      add, (zeros, jnp.float32(0)), (parts, indices)
    )
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, weights)
    return grads, loss, tokens

  return gradient


def as_pretraining(config: Config) -> schema.Config:
  """A pre-training config with the same shared fields, the rest at defaults.

  The functions that make the optimizer and the training step take its parts.
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


def make_adapters(model: TaskModel, config: Config) -> adapters.Adapters | None:
  """What is trained instead of all weights; None: all weights are trained.

  Raises:
    UserError: both the method and `task.freeze` freeze weights.
  """
  if config.task.freeze and config.train.lean:
    raise UserError(
      f"task.freeze={config.task.freeze} trains some of the weights, and"
      " train.lean takes gradients of all; leave one of them out"
    )
  found = adapters.make(as_pretraining(config).optimizer, model.trained_in_full)
  if not config.task.freeze:
    return found
  if found is not None or config.model.weights != "full":
    raise UserError(
      f"task.freeze={config.task.freeze} is for methods that train weights in"
      f" full precision, not for optimizer.name={config.optimizer.name} with"
      f" model.weights={config.model.weights}"
    )
  return freeze.make(config.task.freeze, nnx.to_pure_dict(model.boxes))


def setup(
  model: TaskModel, config: Config, mesh: jax.sharding.Mesh
) -> tuple[Any, state_lib.AbstractState]:
  """The optimizer, and the shapes and shardings of the training state.

  Nothing is allocated yet.

  Raises:
    UserError: the method's options are wrong, or do not suit this model.
  """
  shardings = (
    None if mesh.size == 1 else mesh_lib.param_shardings(model.boxes, mesh)
  )
  shared = as_pretraining(config)
  tx = optimizer.make_optimizer(shared.optimizer, config.train.steps, shardings)
  return tx, state_lib.abstract_state(
    shared.model,
    model.graphdef,
    model.boxes,
    tx,
    mesh,
    make_adapters(model, config),
  )


def prepare(
  config: Config,
  out: pathlib.Path,
  model: TaskModel,
  data: TaskData,
  mesh: jax.sharding.Mesh,
  tx: Any,
  abstract: state_lib.AbstractState,
) -> tuple[job_lib.Job, state_lib.TrainState]:
  """Builds a fine-tuning job, with a new or a restored training state."""
  shared, train = as_pretraining(config), config.train
  state, progress = job_lib.restore_or_init(
    out, tx, abstract, train.seed, lambda: model.params
  )
  part, sharding = mesh_lib.batch_part(mesh), mesh_lib.batch_sharding(mesh)
  put = lambda batch: {
    k: mesh_lib.put_batch(v, sharding) for k, v in batch.items()
  }
  log = job_lib.open_log(config, out, int(state.step))
  eval_step = make_eval_step(model, abstract)
  # As many rows at a time as in a part of a training step.
  rows = config.data.batch // train.accumulate
  position = prefetch.check_position(progress.data or {"batches": 0})
  job = job_lib.Job(
    out=out,
    train=train,
    run=config.run,
    rates=job_lib.learning_rates(shared.optimizer, train.steps),
    train_step=train_step.make_train_step(
      tx,
      abstract,
      shared.train,
      gradient=make_gradient(model, abstract, train),
      loss=lean_loss(model, train),
    ),
    eval_step=eval_step,
    put=put,
    evaluate=Evaluator(model, data, rows, part, eval_step, put, log),
    batch_shape=None,  # batches are as long as their longest row
    forward_flops=forward_flops(model, data, abstract.weights),
    feed=prefetch.Loader(
      cast(Any, data.batches.iterate(position, train.seed, *part)),
      position,
      config.data.prefetch,
    ),
    checkpoints=checkpoint.Checkpoints(
      out, config.run.keep, config.run.keep_best
    ),
    log=log,
    watcher=None,
    seconds=progress.seconds,
  )
  return job, state


def make_eval_step(
  model: TaskModel, abstract: state_lib.AbstractState
) -> Callable:
  """The evaluation step, jitted.

  Returns:
    A function of parameters and a batch that gives the outputs, the summed
    loss and the number of items, replicated on all devices.
  """

  @functools.partial(jax.jit, out_shardings=mesh_lib.replicated(abstract.mesh))
  def eval_step(params: dict, batch: Any) -> tuple[Any, jax.Array, jax.Array]:
    weights = abstract.read(params)
    loss = model.loss(weights, batch, None)
    return model.outputs(weights, batch), loss, model.count_items(batch)

  return eval_step
