"""A run's model, optimizer and plan, made once and handed down."""

from typing import NamedTuple

import jax
import optax
from flax import nnx

import galore_optax
from train.config.schema import Config
from train.models import llama
from train.parallel import mesh as mesh_lib
from train.step import adapters, optimizer, per_layer
from train.step import state as state_lib


class Setup(NamedTuple):
  """What trains a model, before it takes any memory.

  Attributes:
    mesh: the devices, which may be abstract.
    tx: the optimizer.
    updater: what updates the weights: `tx`, or its layer-by-layer form.
    abstract: shapes and shardings of the training state.
    plan: how `tx` treats each leaf of the weights.
  """

  mesh: jax.sharding.Mesh
  tx: optax.GradientTransformationExtraArgs
  updater: state_lib.Updater
  abstract: state_lib.AbstractState
  plan: galore_optax.diagnostics.Description


def make(config: Config, mesh: jax.sharding.Mesh) -> Setup:
  """Sets up the pre-training of a LLaMA.

  Args:
    config: the run.
    mesh: its devices, which may be abstract.

  Raises:
    UserError: options of the optimizer exclude one another.
  """
  model, train = config.model, config.train
  graphdef, boxes = llama.abstract(model)
  shardings = None
  if mesh.size > 1 and not train.layerwise:
    shardings = mesh_lib.param_shardings(boxes, mesh)
  tx = optimizer.make_optimizer(config.optimizer, train.steps, shardings)
  updater = tx
  if train.layerwise:
    updater = per_layer.fuse(tx, model, train, nnx.to_pure_dict(boxes))
  changed = adapters.make(config.optimizer)
  abstract = state_lib.abstract_state(
    model, graphdef, boxes, updater, mesh, changed
  )
  if config.mesh.offload == "optimizer":
    abstract = state_lib.offload(abstract)
  of_weights = tx if changed is None else changed.over_weights(tx)
  plan = galore_optax.describe(of_weights, abstract.weights)
  return Setup(mesh, tx, updater, abstract, plan)
