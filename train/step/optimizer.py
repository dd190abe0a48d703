"""From the config to an Optax transformation, and the bytes of its state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from train.common.errors import UserError
from train.methods import registry
from train.methods.leaves import block_matrices
from train.methods.options import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """The learning rate of each update; ReLoRA's also rises after restarts."""
  schedule = _smooth_schedule(config, steps)
  if config.name != "relora":
    return schedule
  return galore_optax.baselines.jagged_schedule(
    schedule, config.reset_every, config.restart_warmup
  )


def _smooth_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """A linear warm-up to the peak, then a decay to `final` of it."""
  # The peak is a factor, because it may be an array, which Optax's schedules
  # do not take.
  shape = (_linear if config.decay == "linear" else _cosine)(config, steps)
  return lambda count: config.learning_rate * shape(count)


def _cosine(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """A linear rise to 1, and a fall along a cosine."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=1.0,
    warmup_steps=max(1, round(config.warmup * steps)) if config.warmup else 0,
    decay_steps=max(2, steps),
    end_value=config.final,
  )


def _linear(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """A linear rise to 1, if there is a warm-up, and a linear fall."""
  warmup = round(config.warmup * steps)
  down = optax.linear_schedule(1.0, config.final, max(1, steps - warmup))
  if not warmup:
    return down
  up = optax.linear_schedule(0.0, 1.0, warmup)
  return optax.join_schedules([up, down], [warmup])


def resolve(config: OptimizerConfig, steps: int) -> OptimizerConfig:
  """The config with the options that depend on the length of the run."""
  late = registry.get(config.name).random_late
  if not late or config.random_from:
    return config
  return dataclasses.replace(config, random_from=max(1, steps // 2))


def make_optimizer(
  config: OptimizerConfig, steps: int, param_shardings: Any = None
) -> optax.GradientTransformationExtraArgs:
  """Chains clipping, the method, and the factor on updates of matrices.

  The factor is applied to the finished updates, because it would cancel out
  before Adam. It scales decoupled decay too, as a learning rate does.

  Args:
    config: the method and its options.
    steps: updates of the run, for the schedule.
    param_shardings: shardings of the parameters, if they are on a mesh.

  Raises:
    UserError: options exclude one another.
  """
  method = registry.get(config.name)
  if config.accumulate > 1 and not method.accumulates:
    raise UserError(
      f"optimizer.accumulate is {config.accumulate}, which is for the GaLore"
      f" methods, not {config.name}; use train.accumulate"
    )
  config = resolve(config, steps)
  try:
    schedule = make_schedule(config, steps)
    parts = [method.make(config, schedule, param_shardings)]
  except (TypeError, ValueError) as error:
    raise UserError(f"optimizer.name={config.name}: {error}") from None
  if config.clip:
    parts.insert(0, optax.clip_by_global_norm(config.clip))
  # As an array it has no value yet, and is always applied.
  if isinstance(config.matrix_lr, jax.Array) or config.matrix_lr != 1:
    parts.append(optax.masked(optax.scale(config.matrix_lr), block_matrices))
  return optax.with_extra_args_support(optax.chain(*parts))


def accounting(
  config: OptimizerConfig, params: Any, own: int
) -> dict[str, int]:
  """Bytes of optimizer state by method, without allocating any.

  Args:
    config: the run's optimizer, whose rank all GaLore methods get.
    params: parameters or their ShapeDtypeStructs.
    own: bytes of the run's own optimizer state.

  Returns:
    `{"adamw": ..., "optax.contrib.galore": ..., "this run (NAME)": ...}`. All
    of them project the same block matrices. Optax keeps moments in the weights'
    dtype. If that is not float32, there are two more for a fair comparison:
    AdamW in float32, and GaLore in that dtype with contrib's side.
  """

  def state_bytes(like: Any, **fields: Any) -> int:
    changed = dataclasses.replace(config, **fields)
    tx = make_optimizer(changed, steps=100)
    return galore_optax.state_bytes(jax.eval_shape(tx.init, like))

  # Options that only GaLore has.
  peer: Any = {"accumulate": 1, "moments": "rotate"}
  found = {
    "adamw": state_bytes(params, name="adamw", **peer),
    "optax.contrib.galore": state_bytes(params, name="contrib_galore", **peer),
  }
  dtype = low_precision_dtype(params)
  if dtype and registry.get(config.name).projects:
    wide = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params
    )
    found["adamw, float32"] = state_bytes(wide, name="adamw", **peer)
    alike = {"state_dtype": dtype, "basis_dtype": dtype, "proj_type": "auto"}
    found[f"galore, auto, {dtype}"] = state_bytes(
      params, name="galore", **alike, **peer
    )
  found[f"this run ({config.name})"] = own
  return found


def low_precision_dtype(params: Any) -> str:
  """The dtype of most weights, or "" if it is float32."""
  sizes: dict[str, int] = {}
  for x in jax.tree.leaves(params):
    sizes[str(x.dtype)] = sizes.get(str(x.dtype), 0) + x.size
  dtype = max(sizes, key=lambda name: sizes[name])
  return "" if dtype == "float32" else dtype


def accounting_note(params: Any) -> str:
  """What one has to know to compare the rows of `accounting`."""
  note = (
    "All project the same matrices. optax.contrib.galore only takes 2-D leaves,"
    " so layers are separate leaves for it, and it projects the longer side, as"
    " optimizer.proj_type=auto does."
  )
  dtype = low_precision_dtype(params)
  if dtype:
    note += (
      f" The moments of adamw, optax.contrib.galore and GaLore are in {dtype},"
      " like the weights, or in 8 bits, unless optimizer.state_dtype says"
      " otherwise. GaLore's are rounded at random, because a b2 of 0.999 does"
      " not decay if they are rounded to the nearest."
    )
  return note
