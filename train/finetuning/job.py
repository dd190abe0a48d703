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
from train.run import checkpoint, metrics
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
class Evaluator:
  """Scores the model on the splits of a task.

  Attributes:
    learner: the model.
    material: its examples.
    rows: of a batch that is evaluated.
    part: which part of each batch this process evaluates, of how many.
    eval_step: outputs, loss and count of parameters and a batch.
    put: moves this process's rows to its devices.
    log: gets the scores.
  """

  learner: Learner
  material: Material
  rows: int
  part: tuple[int, int]
  eval_step: Callable
  put: Callable[[Batch], Any]
  log: metrics.Log

  def __call__(self, state: train_step.TrainState, say: job_lib.Say) -> float:
    """Reports and logs the scores; returns one of which lower is better."""
    index, parts = self.part
    size = self.rows // parts
    own = slice(index * size, (index + 1) * size)

    def run(batch: Batch) -> tuple[Any, Any, Any]:
      mine = self.put({k: v[own] for k, v in batch.items()})
      return jax.device_get(self.eval_step(state.params, mine))

    scores = evaluation.evaluate(
      self.learner, self.material.evaluated, self.rows, run
    )
    step = int(jax.device_get(state.step))
    say(f"step {step:>5}  {evaluation.text(scores)}")
    self.log.write(step, **scores)
    return evaluation.rank(self.material.task, scores)


def forward_flops(learner: Learner, material: Material, weights: Any) -> float:
  """FLOPs a token of the forward pass, at the length of the longest row."""
  longest = [int(np.argmax(material.train.lengths))]
  batch = learner.collate(material.train, longest, 1)
  shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
  traced = jax.make_jaxpr(lambda w, b: learner.loss(w, b, None))(
    weights, shapes
  )
  tokens = int(material.train.lengths[longest[0]])
  return jaxpr_cost.count_flops(traced.jaxpr) / tokens


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
  return tx, train_step.abstract_state(
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
) -> tuple[job_lib.Job, train_step.TrainState]:
  """Builds a fine-tuning job, with a new or a restored training state."""
  pretraining = complete(config)
  state, progress = job_lib.restore_or_init(
    out,
    tx,
    placed,
    config.train.seed,
    lambda: learner.params,
  )
  part, sharding = mesh_lib.batch_part(mesh), mesh_lib.batch_sharding(mesh)
  put = lambda batch: {
    k: mesh_lib.put_batch(v, sharding) for k, v in batch.items()
  }
  log = job_lib.open_log(config, out, int(state.step))
  eval_step = make_eval_step(learner, placed)
  # As many rows at once as a step takes.
  rows = config.data.batch // config.train.accumulate
  position = progress.data or {"batches": 0}
  job = job_lib.Job(
    out=out,
    train=config.train,
    run=config.run,
    rates=job_lib.learning_rates(pretraining.optimizer, config.train.steps),
    train_step=train_step.make_train_step(
      tx,
      placed,
      pretraining.train,
      gradient=make_gradient(learner, placed, config.train),
    ),
    eval_step=eval_step,
    put=put,
    evaluate=Evaluator(learner, material, rows, part, eval_step, put, log),
    batch_shape=None,  # batches are as long as their longest row
    forward_flops=forward_flops(learner, material, placed.weights),
    feed=prefetch.Loader(
      cast(Any, material.feed.batches(position, config.train.seed, *part)),
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
