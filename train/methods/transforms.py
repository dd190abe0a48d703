"""From the options to the Optax transformation of each method.

Clipping, schedule, decay mask and the factor on the matrices are shared, so
two runs that differ in `optimizer.name` differ in the method only. With
weights in bfloat16 they also differ in the dtype of moments: Optax's own
optimizers keep moments in the weights' dtype, GaLore in
`optimizer.state_dtype`.

Every function takes the options, the learning-rate schedule and the
shardings of the parameters (None if they are not on a mesh).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from train.methods.leaves import (
  block_matrices,
  decayed,
  is_block_matrix,
  path_of,
)
from train.methods.options import OptimizerConfig

SUMO_DECAY = 0.95  # of the momentum of SUMO and GUM


def adamw(c: OptimizerConfig, lr: optax.Schedule, shardings: Any = None):
  """AdamW; LoRA and its variants train their factors with it."""
  del shardings
  return optax.adamw(
    lr, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=decayed
  )


def adafactor(
  c: OptimizerConfig,
  lr: optax.Schedule,
  shardings: Any = None,
  min_dim_size_to_factor: int = 128,
):
  """Adafactor as the papers run it.

  That is without the parameter scale, and with a first moment: without one
  there is hardly any state to save.
  """
  del shardings
  return optax.chain(
    optax.adafactor(
      None,
      min_dim_size_to_factor=min_dim_size_to_factor,
      multiply_by_parameter_scale=False,
      momentum=c.b1,
      weight_decay_rate=c.weight_decay or None,
      weight_decay_mask=decayed,
    ),
    # The rate comes last, so that the decay is in proportion to it, as in the
    # other methods.
    optax.scale_by_learning_rate(lr, flip_sign=False),
  )


def lion(c: OptimizerConfig, lr: optax.Schedule, shardings: Any = None):
  """Lion."""
  del shardings
  # Lion's second decay belongs to its momentum: it is 0.99, not Adam's 0.999.
  return optax.lion(lr, c.b1, 0.99, weight_decay=c.weight_decay, mask=decayed)


def sgd(c: OptimizerConfig, lr: optax.Schedule, shardings: Any = None):
  """SGD with momentum; the decay is decoupled, so it follows the momentum."""
  del shardings
  return optax.chain(
    optax.trace(c.b1),
    optax.add_decayed_weights(c.weight_decay, decayed),
    optax.scale_by_learning_rate(lr),
  )


def muon(c: OptimizerConfig, lr: optax.Schedule, shardings: Any = None):
  """Muon for the block matrices, AdamW for the rest."""
  del shardings

  def dimensions(params: Any) -> Any:
    axes = optax.contrib.MuonDimensionNumbers(-2, -1)
    return jax.tree.map(
      lambda is_matrix: axes if is_matrix else None, block_matrices(params)
    )

  return optax.contrib.muon(
    lr,
    weight_decay=c.weight_decay,
    adam_b1=c.b1,
    adam_b2=c.b2,
    adam_weight_decay=c.weight_decay,
    weight_decay_mask=decayed,
    muon_weight_dimension_numbers=dimensions,
  )


def contrib_galore(
  c: OptimizerConfig, lr: optax.Schedule, shardings: Any = None
):
  """`optax.contrib.galore` on the block matrices, each layer by itself."""
  projected = optax.contrib.galore(
    lr,
    rank=c.rank,
    update_proj_gap=c.update_proj_gap,
    scale=c.scale,
    base_optimizer=optax.scale_by_adam(c.b1, c.b2, c.eps),
    weight_decay=c.weight_decay,
  )

  def labels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda path, _: "galore" if "/kernel/" in path_of(path) else "adamw",
      params,
    )

  # For leaves that it does not project it keeps arrays of size zero, which
  # Orbax does not save. So it only gets the leaves that it projects.
  return unstacked(
    optax.partition(
      {"galore": projected, "adamw": adamw(c, lr, shardings)}, labels
    )
  )


def unstacked(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Runs `tx` on the layers as separate leaves, for methods that need 2-D.

  A stacked kernel (L, m, n) becomes a list of L matrices on the way in and
  one array again on the way out; the state belongs to the matrices.
  """

  def unstack(tree: Any) -> Any:
    split = lambda x: list(x.reshape(-1, *x.shape[-2:]))  # also by expert
    return jax.tree_util.tree_map_with_path(
      lambda path, x: split(x) if is_block_matrix(path, x) else x, tree
    )

  def init(params: Any) -> Any:
    return tx.init(unstack(params))

  def update(updates: Any, state: Any, params: Any = None):
    matrices = None if params is None else unstack(params)
    new, state = tx.update(unstack(updates), state, matrices)
    stacked = jax.tree.map(
      lambda x, u: jnp.stack(u).reshape(x.shape) if isinstance(u, list) else u,
      updates,
      new,
    )
    return stacked, state

  return optax.GradientTransformation(init, update)


def refresh_of(c: OptimizerConfig) -> galore_optax.Refresh:
  """When and how bases are recomputed, as the options say."""
  return galore_optax.Refresh(
    policy=c.refresh,
    finder=c.projector,
    moments=c.moments,
    random_from=c.random_from or None,
    burst=c.burst or None,
  )


def galore_options(c: OptimizerConfig, shardings: Any) -> dict[str, Any]:
  """The keyword arguments of `galore_optax.galore`."""
  residual = {}
  if c.residual != "none":
    names = ("residual", "residual_factor", "residual_decay")
    residual = {name: getattr(c, name) for name in names}
    residual["residual_growth"] = c.residual_growth or math.inf
  return residual | {
    "rank": c.rank,
    # Leaves outside of the blocks stay at full rank, an encoder's pooler too,
    # and so do routers: they are small, and a column of one is an expert's own.
    "rules": ((r"^(?!layers/)|/router$", None),),
    "update_proj_gap": c.update_proj_gap,
    "scale": c.scale,
    "proj_type": c.proj_type,
    "refresh": refresh_of(c),
    "basis_dtype": c.basis_dtype,
    "state_dtype": c.moments_dtype,
    "accumulation_steps": c.accumulate,
    # If it knew the shardings, `auto` would choose sides whose bases every
    # device keeps whole; here it is to choose the smallest state.
    "param_shardings": None if c.proj_type == "auto" else shardings,
  }


def _adam(c: OptimizerConfig, lr: optax.Schedule) -> dict[str, Any]:
  """The arguments of AdamW, which many recipes take."""
  return {
    "learning_rate": lr,
    "b1": c.b1,
    "b2": c.b2,
    "eps": c.eps,
    "weight_decay": c.weight_decay,
    "mask": decayed,
  }


def galore(
  c: OptimizerConfig, lr: optax.Schedule, shardings: Any, **options: Any
):
  """GaLore around AdamW."""
  known = galore_options(c, shardings)
  return galore_optax.galore_adamw(**_adam(c, lr), **known | options)


def galore_faithful(c: OptimizerConfig, lr: optax.Schedule, shardings: Any):
  """GaLore exactly as in the paper."""
  return galore(c, lr, shardings, faithful=True)


def golore(c: OptimizerConfig, lr: optax.Schedule, shardings: Any):
  """GaLore whose bases are random from `random_from` on."""
  return galore(c, lr, shardings)


def galore_adafactor(c: OptimizerConfig, lr: optax.Schedule, shardings: Any):
  """GaLore around Adafactor."""
  # Projected gradients are factored like full ones, however low the rank. The
  # limit stays above the number of layers, which are stacked in another axis.
  least = min(128, c.rank) if c.rank >= 32 else 128
  # Not the recipe: there the rate comes before the decay, and the state of
  # checkpoints has it after.
  inner = adafactor(c, lr, min_dim_size_to_factor=least)
  return galore_optax.galore(inner, **galore_options(c, shardings))


def galore_lion(c: OptimizerConfig, lr: optax.Schedule, shardings: Any):
  """GaLore around Lion."""
  return galore_optax.galore_lion(
    lr,
    c.b1,
    0.99,
    weight_decay=c.weight_decay,
    mask=decayed,
    **galore_options(c, shardings),
  )


def galore_sgd(c: OptimizerConfig, lr: optax.Schedule, shardings: Any):
  """GaLore around SGD with momentum."""
  # Not the recipe, which has no weight decay.
  return galore_optax.galore(sgd(c, lr), **galore_options(c, shardings))


def adamw_8bit(c: OptimizerConfig, lr: optax.Schedule, shardings: Any = None):
  """AdamW with moments in eight bits."""
  del shardings
  return galore_optax.adamw_8bit(**_adam(c, lr))


def galore_8bit(c: OptimizerConfig, lr: optax.Schedule, shardings: Any):
  """GaLore around AdamW with moments in eight bits."""
  known = galore_options(c, shardings)
  return galore_optax.galore_adamw_8bit(**_adam(c, lr), **known)


def q_galore(c: OptimizerConfig, lr: optax.Schedule, shardings: Any):
  """Q-GaLore: 8-bit GaLore with bases in four bits and adaptive refreshes."""
  adaptive = dataclasses.replace(refresh_of(c), policy="adaptive")
  options: dict[str, Any] = {"basis_dtype": "int4", "refresh": adaptive}
  known = galore_options(c, shardings)
  return galore_optax.q_galore_adamw_8bit(**_adam(c, lr), **known | options)


def fira(c: OptimizerConfig, lr: optax.Schedule, shardings: Any):
  """Fira: GaLore plus a scaled residual."""
  return galore(c, lr, shardings, residual="fira")


def _random_options(c: OptimizerConfig, shardings: Any) -> dict[str, Any]:
  """GaLore's options for random projections.

  A random projection is kept as a seed. Options on how bases are found,
  refreshed and stored, and on moments in a new basis, do not apply to it.
  """
  refresh = galore_optax.Refresh(
    policy="synchronous", finder="random", moments="keep"
  )
  options: dict[str, Any] = {"refresh": refresh, "basis_dtype": "float32"}
  return galore_options(c, shardings) | options


def apollo(c: OptimizerConfig, lr: optax.Schedule, shardings: Any):
  """APOLLO: full gradients, scaled by channel."""
  options = _random_options(c, shardings)
  return galore_optax.apollo_adamw(**_adam(c, lr), **options)


def apollo_mini(c: OptimizerConfig, lr: optax.Schedule, shardings: Any):
  """APOLLO-Mini: full gradients, scaled by matrix, at rank 1."""
  options = _random_options(c, shardings) | {"rank": 1}
  return galore_optax.apollo_mini_adamw(**_adam(c, lr), **options)


def q_apollo_mini(c: OptimizerConfig, lr: optax.Schedule, shardings: Any):
  """Q-APOLLO-Mini: APOLLO-Mini with other moments in eight bits.

  The matrices' moments are of rank 1 and stay in full precision; the eight
  bits are for those of the embedding and the head.
  """
  options = _random_options(c, shardings)
  return galore_optax.galore(
    adamw_8bit(c, lr), **options | {"rank": 1, "residual": "apollo_mini"}
  )


def sumo(c: OptimizerConfig, lr: optax.Schedule, shardings: Any):
  """SUMO: orthogonal momentum for the block matrices, AdamW for the rest."""
  known = galore_options(c, shardings)
  return galore_optax.sumo(decay=SUMO_DECAY, **_adam(c, lr), **known)


def gum(c: OptimizerConfig, lr: optax.Schedule, shardings: Any):
  """GUM: SUMO in which some matrices follow their whole gradient."""
  return galore_optax.gum(
    decay=SUMO_DECAY,
    sampled=c.sampled,
    **_adam(c, lr),
    **_shared_options(c, shardings),
  )


def ldadam(c: OptimizerConfig, lr: optax.Schedule, shardings: Any):
  """LDAdam: a new basis each step, with error feedback.

  The error has the moments' dtype.
  """
  return galore_optax.ldadam(
    error_dtype=c.moments_dtype,
    **_adam(c, lr),
    **_shared_options(c, shardings),
  )


def _shared_options(c: OptimizerConfig, shardings: Any) -> dict[str, Any]:
  """GaLore's options for methods that carry moments over in their own way."""
  refresh = galore_optax.Refresh(policy=c.refresh, finder=c.projector)
  return galore_options(c, shardings) | {"refresh": refresh}
