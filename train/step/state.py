"""The state of training: what it consists of, and where it lives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import galore_optax
from train.config.schema import ModelConfig
from train.models import llama
from train.parallel import mesh as mesh_lib
from train.step.adapters import Adapters


class TrainState(NamedTuple):
  """Everything that training changes on the devices.

  The same tuple is used for the shapes and the shardings of these arrays.
  """

  step: Any  # (), int32: batches read so far, including skipped steps
  skipped: Any  # (), int32: steps skipped because of no finite gradient
  skips_in_row: Any  # (), int32: steps skipped since the last update
  params: Any
  opt_state: Any


class AbstractState(NamedTuple):
  """A model and its training state on a mesh, before they take any memory."""

  config: ModelConfig
  graphdef: nnx.GraphDef
  state: TrainState  # of ShapeDtypeStructs
  shardings: TrainState  # of NamedShardings
  weights: dict  # of ShapeDtypeStructs: parameters as the model reads them
  weight_shardings: dict  # of NamedShardings
  adapters: Adapters | None = None  # of LoRA and its variants

  @property
  def mesh(self) -> jax.sharding.Mesh:
    """The devices."""
    return self.shardings.step.mesh

  def read(self, params: dict) -> dict:
    """The weights that the model computes with, dequantized."""
    if self.adapters is not None:
      return self.adapters.read(params)
    return galore_optax.dequantize_params(params, self.config.dtype)

  def differentiable(self, params: dict) -> tuple[dict, dict, Callable]:
    """The weights, the trained parameters, and a function between gradients.

    The trained parameters are the weights themselves or the adapters. The
    function maps a gradient of the weights to one of the trained parameters.
    """
    if self.adapters is None:
      weights = self.read(params)
      return weights, weights, lambda grads: grads
    weights, back = self.adapters.differentiable(params)
    return weights, params["adapters"], back

  def add(self, params: dict, updates: Any, key: jax.Array | None) -> dict:
    """The parameters after an update of the trained ones."""
    if self.adapters is None:
      return galore_optax.apply_updates(params, updates, key)
    adapters = optax.apply_updates(params["adapters"], updates)
    return params | {"adapters": adapters}


# The matrices that `model.weights` quantizes: those that GaLore projects.
BLOCK_MATRICES = ("layers/.*kernel$",)


def store(config: ModelConfig, params: dict) -> dict:
  """Parameters as training stores them, which may be quantized."""
  if config.weights == "full":
    return params
  return galore_optax.quantize_params(params, BLOCK_MATRICES, config.weights)


# What updates the weights: an Optax transformation, or GaLore's layer-by-layer
# step. Both have an `init`.
Updater = optax.GradientTransformation | galore_optax.Layerwise


def abstract_state(
  config: ModelConfig,
  graphdef: nnx.GraphDef,
  boxes: nnx.State,
  tx: Updater,
  mesh: jax.sharding.Mesh,
  adapters: Adapters | None = None,
) -> AbstractState:
  """Shapes and shardings of a model and its training state.

  Args:
    config: how the model's weights are stored and read.
    graphdef: its structure.
    boxes: its parameters' shapes, and the logical names of their axes.
    tx: what updates the weights, or the adapters where there are any.
    mesh: where the state shall live.
    adapters: what is trained in place of the weights.
  """
  weights = nnx.to_pure_dict(boxes)
  shardings = mesh_lib.param_shardings(boxes, mesh)
  count = jax.ShapeDtypeStruct((), jnp.int32)
  params, stored = _abstract_params(config, adapters, weights, shardings)
  trained, where = weights, shardings
  if adapters is not None:
    trained, where = params["adapters"], stored["adapters"]
  opt_state = jax.eval_shape(tx.init, trained)
  # Without these, `jit` would put a copy of every moment on every device.
  opt_shardings = galore_optax.state_shardings(tx, trained, where)
  whole = mesh_lib.replicated(mesh)
  return AbstractState(
    config,
    graphdef,
    TrainState(count, count, count, params, opt_state),
    TrainState(whole, whole, whole, stored, opt_shardings),
    weights,
    shardings,
    adapters,
  )


def offload(abstract: AbstractState) -> AbstractState:
  """The same, with the state of a layer-by-layer optimizer in host memory."""
  where = galore_optax.host_shardings(
    abstract.state.opt_state, abstract.shardings.opt_state
  )
  shardings = abstract.shardings._replace(opt_state=where)
  return abstract._replace(shardings=shardings)


def _abstract_params(
  config: ModelConfig, adapters: Adapters | None, weights: dict, shardings: dict
) -> tuple[dict, dict]:
  """Shapes and shardings of the parameters as training stores them."""
  if adapters is None:
    params = jax.eval_shape(lambda x: store(config, x), weights)
    return params, galore_optax.quantized_shardings(params, shardings)
  stored = galore_optax.state_shardings(adapters, weights, shardings)
  return jax.eval_shape(adapters.init, weights), stored


def init_state(
  tx: Updater,
  abstract: AbstractState,
  seed: int,
  params: dict | None = None,
) -> TrainState:
  """A new training state, built on the devices shard by shard.

  Args:
    tx: what updates the weights.
    abstract: the model, and where the state lives.
    seed: of fresh parameters.
    params: those to start from instead, arrays on the host.
  """
  init = lambda params: new_state(tx, abstract, seed, params)
  if params is not None:
    params = jax.tree.map(
      lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__),
      params,
      abstract.weight_shardings,
    )
  # Given parameters are donated, so that the model is never in memory twice.
  run = jax.jit(init, out_shardings=abstract.shardings, donate_argnums=0)
  return run(params)


def new_state(
  tx: Updater,
  abstract: AbstractState,
  seed: int | jax.Array,
  params: dict | None = None,
) -> TrainState:
  """A new training state, as a pure function; see `init_state`."""
  config = abstract.config
  params = llama.init(config, seed) if params is None else params
  zeros = (jnp.zeros((), jnp.int32),) * 3
  if abstract.adapters is not None:
    params = abstract.adapters.init(params, seed)
    return TrainState(*zeros, params, tx.init(params["adapters"]))
  opt_state = tx.init(params)
  return TrainState(*zeros, store(config, params), opt_state)


def all_finite(params: dict) -> bool:
  """Whether all weights are finite."""
  return bool(jax.device_get(_all_finite(params)))


@jax.jit
def _all_finite(params: dict) -> jax.Array:
  floats = [
    x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()
