"""From the config to an Optax transformation, and the bytes of its state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from train.common.errors import UserError
from train.methods import table as methods
from train.methods.leaves import block_matrices
from train.methods.options import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """The learning rate of each update; ReLoRA's warms up after restarts, too."""
  schedule = _smooth_schedule(config, steps)
  if config.name != "relora":
    return schedule
  return galore_optax.baselines.jagged_schedule(
    schedule, config.reset_every, config.restart_warmup
  )


def _smooth_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Linear warm-up to the peak, then `decay` to `final` of it."""
  if config.decay == "linear":
    return _linear_schedule(config, steps)
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=max(1, round(config.warmup * steps)) if config.warmup else 0,
    decay_steps=max(2, steps),
    end_value=config.final * config.learning_rate,
  )


def _linear_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """A line up to the peak and one down; without a warm-up only the second."""
  peak, warmup = config.learning_rate, round(config.warmup * steps)
  down = optax.linear_schedule(
    peak, config.final * peak, max(1, steps - warmup)
  )
  if not warmup:
    return down
  up = optax.linear_schedule(0.0, peak, warmup)
  return optax.join_schedules([up, down], [warmup])


def make_optimizer(
  config: OptimizerConfig, steps: int, param_shardings: Any = None
) -> optax.GradientTransformationExtraArgs:
  """Clipping, the method, and the factor on the matrices' updates.

  The factor comes last, where every method has made its update: before Adam
  it would cancel out. It scales decoupled decay too, as a learning rate does.

  Args:
    config: the method and its options.
    steps: updates of the run, for the schedule.
    param_shardings: where the parameters are, on a mesh.

  Raises:
    UserError: the options exclude one another.
  """
  method = methods.get(config.name)
  if config.accumulate > 1 and not method.accumulates:
    raise UserError(
      f"optimizer.accumulate is {config.accumulate}, which is for the GaLore"
      f" methods, not {config.name}; use train.accumulate"
    )
  if method.random_late and not config.random_from:
    config = dataclasses.replace(config, random_from=max(1, steps // 2))
  try:
    schedule = make_schedule(config, steps)
    parts = [method.make(config, schedule, param_shardings)]
  except (TypeError, ValueError) as error:
    raise UserError(f"optimizer.name={config.name}: {error}") from None
  if config.clip:
    parts.insert(0, optax.clip_by_global_norm(config.clip))
  if config.matrix_lr != 1:
    parts.append(optax.masked(optax.scale(config.matrix_lr), block_matrices))
  return optax.with_extra_args_support(optax.chain(*parts))


def accounting(
  config: OptimizerConfig, params: Any, own: int
) -> dict[str, int]:
  """Bytes of optimizer state, by method, without allocating any.

  Args:
    config: the run's optimizer, whose rank the GaLore methods share.
    params: parameters or their ShapeDtypeStructs.
    own: bytes of the run's own state.

  Returns:
    `{"adamw": ..., "optax.contrib.galore": ..., "this run (NAME)": ...}`; the
    projected leaves are the same block matrices in all of them. Optax keeps
    moments in the weights' dtype. Where that is not float32, there is also
    AdamW in float32, and GaLore in that dtype and on contrib's side.
  """

  def state_bytes(like: Any, **fields: Any) -> int:
    changed = dataclasses.replace(config, **fields)
    tx = make_optimizer(changed, steps=100)
    return galore_optax.state_bytes(jax.eval_shape(tx.init, like))

  # What is GaLore's alone.
  peer: Any = {"accumulate": 1, "moments": "rotate"}
  found = {
    "adamw": state_bytes(params, name="adamw", **peer),
    "optax.contrib.galore": state_bytes(params, name="contrib_galore", **peer),
  }
  dtype = coarse_dtype(params)
  if dtype and methods.get(config.name).projects:
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


def coarse_dtype(params: Any) -> str:
  """The dtype of most weights if it is not float32, else nothing."""
  sizes: dict[str, int] = {}
  for x in jax.tree.leaves(params):
    sizes[str(x.dtype)] = sizes.get(str(x.dtype), 0) + x.size
  dtype = max(sizes, key=lambda name: sizes[name])
  return "" if dtype == "float32" else dtype


def accounting_note(params: Any) -> str:
  """What to know of the rows of `accounting` before they are compared."""
  note = (
    "All project the same matrices. optax.contrib.galore takes 2-D leaves only"
    " (counted, and run, with the layers apart) and the longer side, as"
    " optimizer.proj_type=auto does."
  )
  dtype = coarse_dtype(params)
  if dtype:
    note += (
      f" adamw and optax.contrib.galore have the weights' {dtype} for their"
      " moments, in which a b2 of 0.999 does not decay; GaLore has float32 or"
      " 8 bits unless optimizer.state_dtype and basis_dtype say otherwise."
    )
  return note
