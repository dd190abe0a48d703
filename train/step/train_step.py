"""Loss, training step and evaluation step: pure functions, jitted once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import galore_optax
from train.config.schema import ModelConfig, TrainConfig
from train.models import llama
from train.parallel import mesh as mesh_lib
from train.step import per_layer
from train.step.adapters import Adapters

PADDING = -1  # id of the positions that fill up a row


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


def token_losses(
  graphdef: nnx.GraphDef, params: dict, rows: jax.Array
) -> jax.Array:
  """Cross-entropy in nats of each next token.

  Args:
    graphdef: the model's structure.
    params: its parameters.
    rows: (B, T + 1) int32 ids; each predicts its successor. Padding is
      `PADDING`, at the end of a row; it is never predicted.

  Returns:
    (B, T) float32, 0 where the successor is padding.
  """
  return _losses(graphdef, params, rows)[0]


def _losses(
  graphdef: nnx.GraphDef, params: dict, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy and log-normalizer of each token, 0 at padding."""
  targets, valid = rows[:, 1:], is_predicted(rows)
  logits = llama.apply(graphdef, params, jnp.maximum(rows[:, :-1], 0))
  log_z = jax.nn.logsumexp(logits, axis=-1)
  index = jnp.maximum(targets, 0)[..., None]
  chosen = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
  return jnp.where(valid, log_z - chosen, 0.0), jnp.where(valid, log_z, 0.0)


def is_predicted(rows: jax.Array) -> jax.Array:
  """(B, T) bool: the positions of rows (B, T + 1) whose successor counts."""
  return rows[:, 1:] != PADDING


# What updates the weights: an Optax transformation, or GaLore's layer-by-layer
# step. Both have an `init`.
Updater = optax.GradientTransformation | galore_optax.Layerwise
# From weights, a batch and the step's number to gradient, loss, token count.
Gradient = Callable[[Any, Any, jax.Array], tuple[Any, jax.Array, jax.Array]]


class Loss(NamedTuple):
  """A batch's mean loss, as a sum over parts of the batch.

  Attributes:
    share: from weights, a part, the number of items in the batch, the step's
      number and the part's to the part's share of the loss, with penalties and
      without.
    count: from a batch to the numbers of items in it and of tokens.
    divide: from a batch to its parts, stacked.
  """

  share: Callable[..., tuple[jax.Array, jax.Array]]
  count: Callable[[Any], tuple[jax.Array, jax.Array]]
  divide: Callable[[Any, int], Any] = mesh_lib.microbatches

  def of(self, batch: Any, step: Any) -> tuple:
    """The arguments of `share` after the weights, for a whole batch."""
    items = jnp.maximum(self.count(batch)[0], 1).astype(jnp.float32)
    return batch, items, step, 0


class Backward(NamedTuple):
  """What the backward pass of a step finds."""

  grads: Any  # of what is trained; those of projected weights may have rank r
  loss: jax.Array  # (), float32
  tokens: jax.Array  # (), int32
  opt_state: Callable[[], Any]  # the state with bases that fit the gradients


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


def make_train_step(
  tx: Updater,
  abstract: AbstractState,
  config: TrainConfig,
  low_rank_parts: int = 1,
  gradient: Gradient | None = None,
  loss: Loss | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict]]:
  """The jitted training step; it consumes the state that it is given.

  A step whose loss or gradient is not finite changes neither parameters nor
  optimizer state. It is counted as skipped, and training goes on with the next
  batch.

  Args:
    tx: what updates the weights.
    abstract: the model, and where the state lives.
    config: microbatches, z-loss, rounding and seed.
    low_rank_parts: microbatches whose gradients `tx` adds up at low rank.
    gradient: function of the weights, a batch and the number of the step that
      returns gradient, loss and token count; None for the next-token loss.
    loss: the loss of which gradients at rank r are taken if `config.lean`; None
      for the next-token loss.

  Returns:
    A function of a state and rows (B, T + 1) int32 that returns the next state
    and a dict of scalars: `loss` in nats a token, `grad_norm` before
    clipping, the number of predicted `tokens`, and the state's `skipped` and
    `skips_in_row`.
  """
  if isinstance(tx, galore_optax.Layerwise):
    step = _in_parts(_without_z_loss(tx), low_rank_parts)
  elif low_rank_parts > 1:
    step = _in_parts(_part_of_step(tx, abstract, config), low_rank_parts)
  else:
    step = whole_step(tx, abstract, config, gradient, loss)
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(abstract.shardings, mesh_lib.replicated(_mesh(abstract))),
  )


def _without_z_loss(tx: galore_optax.Layerwise) -> Callable:
  """The layer-by-layer step; it reports the loss without the z-loss."""

  def run(params: dict, opt_state: Any, rows: jax.Array) -> tuple:
    params, opt_state, found = tx.step(params, opt_state, rows)
    return params, opt_state, found | {"loss": found["aux"]}

  return run


def _in_parts(run: Callable, count: int) -> Callable:
  """A step in microbatches whose gradients the optimizer itself adds up.

  All microbatches but the last one only add to low-rank accumulators. `run`
  has to leave out gradients that are not finite, because an accumulator
  cannot be restored afterwards.

  Args:
    run: function of parameters, optimizer state and rows that returns the new
      ones and a dict with `loss` and `grad_norm`.
    count: number of microbatches.
  """

  def train_step(
    state: TrainState, rows: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    def part(carry: tuple, rows: jax.Array) -> tuple:
      params, opt_state, metrics = run(*carry, rows)
      return (params, opt_state), metrics

    carry = (state.params, state.opt_state)
    if count == 1:
      (params, opt_state), found = part(carry, rows)
    else:
      parts = mesh_lib.microbatches(rows, count)
      (params, opt_state), found = jax.lax.scan(part, carry, parts)
    loss, norm = found["loss"].mean(), found["grad_norm"].mean()
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    tokens = is_predicted(rows).sum()
    return finish(state, finite, params, opt_state, loss, norm, tokens)

  return train_step


def _part_of_step(
  tx: optax.GradientTransformation, abstract: AbstractState, config: TrainConfig
) -> Callable:
  """A microbatch through the model and an optimizer that accumulates."""
  backward = _backward(tx, abstract, config, None, None)

  def run(params: dict, opt_state: Any, rows: jax.Array) -> tuple:
    count = _count_of(opt_state)
    found = backward(params, opt_state, rows, count)
    weights = abstract.read(params)
    # GaLore replaces gradients that are not finite by zero.
    updates, opt_state = tx.update(found.grads, found.opt_state(), weights)
    key = _rounding_key(config, _count_of(opt_state))
    params = galore_optax.apply_updates(params, updates, key)
    norm = optax.tree.norm(found.grads)
    return params, opt_state, {"loss": found.loss, "grad_norm": norm}

  return run


def _backward(
  tx: optax.GradientTransformation,
  abstract: AbstractState,
  config: TrainConfig,
  gradient: Gradient | None,
  loss: Loss | None,
) -> Callable[[dict, Any, Any, jax.Array], Backward]:
  """A function of parameters, optimizer state, batch and step's number."""
  if config.lean:
    return _lean(
      tx, abstract, config, loss or next_token_loss(abstract, config)
    )
  if gradient is None:
    of_tokens = make_gradient(abstract, config)
    gradient = lambda weights, rows, step: of_tokens(weights, rows)

  def usual(params: dict, opt_state: Any, batch: Any, step: jax.Array):
    weights, _, back = abstract.differentiable(params)
    grads, loss, tokens = gradient(weights, batch, step)
    return Backward(back(grads), loss, tokens, lambda: opt_state)

  return usual


def _lean(
  tx: optax.GradientTransformation,
  abstract: AbstractState,
  config: TrainConfig,
  loss: Loss,
) -> Callable[[dict, Any, Any, jax.Array], Backward]:
  """The same with gradients at rank r.

  Of a batch in parts, the first part's gradient refreshes the bases. The parts'
  projected gradients are added up in float32.
  """
  differentiate = galore_optax.deferred_value_and_grad(
    loss.share, tx, has_aux=True, dtype=abstract.config.dtype
  )

  def whole(params: dict, opt_state: Any, batch: Any, step: jax.Array):
    value, grads, refreshed = differentiate(
      params, opt_state, None, *loss.of(batch, step)
    )
    return Backward(grads, value[1], loss.count(batch)[1], refreshed)

  def in_parts(params: dict, opt_state: Any, batch: Any, step: jax.Array):
    _, items, _, _ = loss.of(batch, step)

    def one(opt_state: Any, part: Any, index: jax.Array) -> tuple:
      (_, alone), grads, refreshed = differentiate(
        params, opt_state, index == 0, part, items, step, index
      )
      return refreshed(), (grads, alone)

    def add(carry: tuple, part: tuple) -> tuple[tuple, None]:
      opt_state, found = one(carry[0], *part)
      total = jax.tree.map(lambda a, b: a + b, carry[1], found)
      return (opt_state, total), None

    parts = (
      loss.divide(batch, config.accumulate),
      jnp.arange(config.accumulate),
    )
    first = jax.tree.map(lambda x: x[0], parts)
    _, like = jax.eval_shape(one, opt_state, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
    (new, (grads, alone)), _ = jax.lax.scan(add, (opt_state, zeros), parts)
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, like[0])
    return Backward(grads, alone, loss.count(batch)[1], lambda: new)

  return whole if config.accumulate == 1 else in_parts


def next_token_loss(abstract: AbstractState, config: TrainConfig) -> Loss:
  """The mean loss of the predicted tokens of a batch."""
  share = _share_of_loss(abstract, config)

  def count(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    tokens = is_predicted(rows).sum()
    return tokens, tokens

  return Loss(lambda w, rows, items, *_: share(w, rows, items), count)


def _count_of(opt_state: Any) -> jax.Array:
  """Number of steps that GaLore has counted."""
  states = optax.tree.get_all_with_path(opt_state, "step")
  return states[0][1]


def _rounding_key(config: TrainConfig, count: jax.Array) -> jax.Array | None:
  """The random key for rounding quantized weights; None to round to nearest."""
  if config.rounding == "nearest":
    return None
  return jax.random.fold_in(jax.random.key(config.seed), count)


def finish(
  state: TrainState,
  finite: jax.Array,
  params: dict,
  opt_state: Any,
  loss: jax.Array,
  norm: jax.Array,
  tokens: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """The state after a step, and the step's metrics."""
  skipped = state.skipped + ~finite
  in_row = jnp.where(finite, 0, state.skips_in_row + 1)
  metrics = {"loss": loss, "grad_norm": norm, "tokens": tokens}
  metrics |= {"skipped": skipped, "skips_in_row": in_row}
  new = TrainState(state.step + 1, skipped, in_row, params, opt_state)
  return new, metrics


def whole_step(
  tx: optax.GradientTransformation,
  abstract: AbstractState,
  config: TrainConfig,
  gradient: Gradient | None = None,
  loss: Loss | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict]]:
  """The step that computes the whole gradient before it updates weights.

  It is not jitted; see `make_train_step`.
  """
  backward = _backward(tx, abstract, config, gradient, loss)

  def train_step(
    state: TrainState, rows: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    found = backward(state.params, state.opt_state, rows, state.step)
    _, trained, _ = abstract.differentiable(state.params)
    norm = optax.tree.norm(found.grads)
    finite = jnp.isfinite(found.loss) & jnp.isfinite(norm)
    key = _rounding_key(config, state.step)

    def update() -> tuple[Any, Any]:
      updates, opt_state = tx.update(found.grads, found.opt_state(), trained)
      params = abstract.add(state.params, updates, key)
      if abstract.adapters is None:
        return params, opt_state
      count = state.step - state.skipped + 1
      return abstract.adapters.restart_if_due(
        params, opt_state, count, config.seed
      )

    params, opt_state = jax.lax.cond(
      finite, update, lambda: (state.params, state.opt_state)
    )
    return finish(
      state, finite, params, opt_state, found.loss, norm, found.tokens
    )

  return train_step


def _share_of_loss(
  abstract: AbstractState, config: TrainConfig
) -> Callable[[dict, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """A microbatch's share of the loss, with penalties and without.

  It is a function of parameters, rows and the number of predicted tokens of the
  whole batch.
  """

  def share(
    params: dict, rows: jax.Array, tokens: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    losses, log_z = _losses(abstract.graphdef, params, rows)
    loss = losses.sum() / tokens
    penalty = config.z_loss * jnp.square(log_z).sum() / tokens
    return (loss + penalty if config.z_loss else loss), loss

  return share


def make_gradient(
  abstract: AbstractState, config: TrainConfig
) -> Callable[[dict, jax.Array], tuple[dict, jax.Array, jax.Array]]:
  """A function from parameters and rows to gradient, loss and token count.

  The loss is the mean over all predicted tokens of the batch. The share of a
  microbatch is its summed loss, divided by the token count of the whole batch.
  """
  differentiate = jax.value_and_grad(
    _share_of_loss(abstract, config), has_aux=True
  )

  def gradient(params: dict, rows: jax.Array):
    count = is_predicted(rows).sum()
    tokens = jnp.maximum(count, 1).astype(jnp.float32)
    if config.accumulate == 1:
      (_, loss), grads = differentiate(params, rows, tokens)
      return grads, loss, count

    def add(total: tuple[dict, jax.Array], part: jax.Array):
      (_, loss), grads = differentiate(params, part, tokens)
      return jax.tree.map(jnp.add, total, (grads, loss)), None

    # In float32 for weights of any dtype, because many small terms are added.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    zeros = jax.lax.with_sharding_constraint(zeros, abstract.weight_shardings)
    parts = mesh_lib.microbatches(rows, config.accumulate)
    (grads, loss), _ = jax.lax.scan(add, (zeros, jnp.float32(0)), parts)
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, params)
    return grads, loss, count

  return gradient


def make_eval_step(
  abstract: AbstractState, parts: int = 1
) -> Callable[[dict, jax.Array], tuple[jax.Array, jax.Array]]:
  """The jitted evaluation step.

  Args:
    abstract: the model, and where the state lives.
    parts: microbatches that are evaluated one after the other, so that an
      evaluation takes no more memory than a training step.

  Returns:
    A function of parameters and rows (B, T + 1) that returns the summed loss
    in nats and the number of predicted tokens.
  """

  def eval_step(params: dict, rows: jax.Array):
    if parts == 1:
      return evaluate(abstract, params, rows)
    if abstract.adapters is not None:
      params = abstract.read(params)
    cut = mesh_lib.microbatches(rows, parts)
    sums = lambda part: _loss_sums(abstract, params, part)
    total, count = jax.lax.map(sums, cut)
    return total.sum(), count.sum()

  return jax.jit(eval_step, out_shardings=mesh_lib.replicated(_mesh(abstract)))


def evaluate(
  abstract: AbstractState, params: dict, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Summed loss in nats and number of predicted tokens of rows (B, T + 1)."""
  if abstract.adapters is not None:
    params = abstract.read(params)
  return _loss_sums(abstract, params, rows)


def _loss_sums(
  abstract: AbstractState, params: dict, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The same of the weights that the model computes with."""
  if abstract.config.weights != "full":
    # Dequantizes the weights of one layer at a time.
    return per_layer.summed_loss(abstract.config, params, rows)
  losses = token_losses(abstract.graphdef, params, rows)
  return losses.sum(), is_predicted(rows).sum()


def all_finite(params: dict) -> bool:
  """Whether all weights are finite."""
  return bool(jax.device_get(_all_finite(params)))


@jax.jit
def _all_finite(params: dict) -> jax.Array:
  floats = [
    x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def _mesh(abstract: AbstractState) -> jax.sharding.Mesh:
  return abstract.shardings.step.mesh


def count_programs(f: Callable) -> int:
  """Number of programs a jitted function has compiled; 0 for a compiled one."""
  size = getattr(f, "_cache_size", None)
  return size() if size else 0
