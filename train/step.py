"""Loss, training step and evaluation step: pure functions, jitted once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import galore_optax
from train import llama
from train import mesh as meshes
from train.config import ModelConfig


class TrainState(NamedTuple):
  """Everything that training changes, and that a checkpoint holds.

  The same tuple holds the arrays' shapes or their shardings in their place.
  """

  step: Any  # (), int32: updates made so far
  params: Any
  opt_state: Any


class Placed(NamedTuple):
  """A model laid out on a mesh before it takes any memory."""

  graphdef: nnx.GraphDef
  state: TrainState  # of ShapeDtypeStructs
  shardings: TrainState  # of NamedShardings


def token_losses(
  graphdef: nnx.GraphDef, params: dict, rows: jax.Array
) -> jax.Array:
  """Cross-entropy in nats of each next token.

  Args:
    graphdef: the model's structure.
    params: its parameters.
    rows: (B, T + 1) int32 ids; each predicts its successor.

  Returns:
    (B, T) float32.
  """
  logits = llama.apply(graphdef, params, rows[:, :-1])
  return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])


def place(
  config: ModelConfig,
  tx: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> Placed:
  """Shapes and shardings of the whole training state."""
  graphdef, boxes = llama.abstract(config)
  params = nnx.to_pure_dict(boxes)
  shardings = meshes.param_shardings(boxes, mesh)
  state = TrainState(
    jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(tx.init, params)
  )
  # Without these, `jit` would put a copy of every moment on every device.
  opt_shardings = galore_optax.state_shardings(tx, params, shardings)
  return Placed(
    graphdef,
    state,
    TrainState(meshes.replicated(mesh), shardings, opt_shardings),
  )


def init_state(
  config: ModelConfig,
  tx: optax.GradientTransformation,
  placed: Placed,
  seed: int,
) -> TrainState:
  """A fresh state, built shard by shard where it will live."""

  def init() -> TrainState:
    params = llama.init(config, seed)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

  return jax.jit(init, out_shardings=placed.shardings)()


def make_train_step(
  tx: optax.GradientTransformation, placed: Placed
) -> Callable[[TrainState, jax.Array], tuple[TrainState, dict]]:
  """The training step, jitted; it consumes the state it is given.

  Returns:
    A function of a state and rows (B, T + 1) int32 that gives the next state
    and `{"loss": nats a token, "grad_norm": before clipping}`, both float32.
  """

  def train_step(
    state: TrainState, rows: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    def mean_loss(params: dict) -> jax.Array:
      return token_losses(placed.graphdef, params, rows).mean()

    loss, grads = jax.value_and_grad(mean_loss)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, opt_state), metrics

  return jax.jit(
    train_step,
    donate_argnums=0,
    out_shardings=(placed.shardings, meshes.replicated(_mesh(placed))),
  )


def make_eval_step(
  placed: Placed,
) -> Callable[[dict, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """The evaluation step, jitted.

  Returns:
    A function of parameters, rows (B, T + 1) and weights (B,) that gives the
    summed loss in nats and the number of tokens, of the rows of weight 1.
  """

  def eval_step(params: dict, rows: jax.Array, weights: jax.Array):
    losses = token_losses(placed.graphdef, params, rows)
    count = weights.sum() * losses.shape[1]
    return (losses * weights[:, None]).sum(), count

  return jax.jit(eval_step)


def _mesh(placed: Placed) -> jax.sharding.Mesh:
  return placed.shardings.step.mesh
