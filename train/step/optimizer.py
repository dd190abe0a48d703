"""From the config to an Optax transformation, for GaLore and its peers.

All share clipping, schedule, decay mask and the factor on the matrices, so
two runs that differ in `optimizer.name` differ in the method only. With weights
in bfloat16 also in the dtype of moments: Optax's own optimizers keep them in
the weights', GaLore in `optimizer.state_dtype`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from train.common.errors import UserError
from train.config.schema import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Told(OptimizerConfig):
  """An optimizer's config, and where the parameters are, if that is known."""

  param_shardings: Any = None


SUMO_DECAY = 0.95  # of its momentum, and of GUM's
# Of the paths of kernels, and of the factors that are trained for them.
KERNEL_ENDS = ("/kernel", "/kernel/a", "/kernel/b")


def path_of(path: tuple) -> str:
  """A key path as `layers/attn/q/kernel`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def is_matrix(path: tuple, leaf: Any) -> bool:
  """Whether a leaf is a kernel of the blocks, or a factor of one."""
  del leaf
  name = path_of(path)
  return name.startswith("layers/") and name.endswith(KERNEL_ENDS)


def matrices(params: Any) -> Any:
  """True for the block matrices: the leaves that GaLore projects."""
  return jax.tree_util.tree_map_with_path(is_matrix, params)


def decayed(params: Any) -> Any:
  """True for every leaf but the norms: by path, as stacked norms are 2-D."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "norm" not in path_of(path), params
  )


def is_galore(name: str) -> bool:
  """Whether a method is one of this library's projections."""
  return name == "golore" or ("galore" in name and name != "contrib_galore")


def projects(name: str) -> bool:
  """Whether a method projects the block matrices, by this library or not."""
  others = ("golore", "fira", "sumo", "gum", "ldadam")
  return "galore" in name or "apollo" in name or name in others


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
  if config.accumulate > 1 and not is_galore(config.name):
    raise UserError(
      f"optimizer.accumulate is {config.accumulate}, which is for the GaLore"
      f" methods, not {config.name}; use train.accumulate"
    )
  try:
    late = config.random_from or max(1, steps // 2)
    if config.name == "golore":
      config = dataclasses.replace(config, random_from=late)
    told = Told(**vars(config), param_shardings=param_shardings)
    parts = [METHODS[config.name](told, make_schedule(config, steps))]
  except (TypeError, ValueError) as error:
    raise UserError(f"optimizer.name={config.name}: {error}") from None
  if config.clip:
    parts.insert(0, optax.clip_by_global_norm(config.clip))
  if config.matrix_lr != 1:
    parts.append(optax.masked(optax.scale(config.matrix_lr), matrices))
  return optax.with_extra_args_support(optax.chain(*parts))


def unstacked(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Runs `tx` on the layers as separate leaves, for methods that need 2-D.

  A stacked kernel (L, m, n) becomes a list of L matrices on the way in and
  one array again on the way out; the state belongs to the matrices.
  """

  def cut(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda path, x: list(x) if is_matrix(path, x) else x, tree
    )

  def init(params: Any) -> Any:
    return tx.init(cut(params))

  def update(updates: Any, state: Any, params: Any = None):
    small = None if params is None else cut(params)
    new, state = tx.update(cut(updates), state, small)
    stacked = jax.tree.map(
      lambda _, u: jnp.stack(u) if isinstance(u, list) else u, updates, new
    )
    return stacked, state

  return optax.GradientTransformation(init, update)


def _adamw(c: OptimizerConfig, lr: optax.Schedule):
  return optax.adamw(
    lr, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=decayed
  )


def _adafactor(c: OptimizerConfig, lr: optax.Schedule, least: int = 128):
  # As the papers run it: no parameter scale, and a first moment, without
  # which there is hardly any state to save. The rate comes last, so that the
  # decay is in proportion to it as everybody's. `least` is the shorter side
  # from which on a second moment is factored.
  return optax.chain(
    optax.adafactor(
      None,
      min_dim_size_to_factor=least,
      multiply_by_parameter_scale=False,
      momentum=c.b1,
      weight_decay_rate=c.weight_decay or None,
      weight_decay_mask=decayed,
    ),
    optax.scale_by_learning_rate(lr, flip_sign=False),
  )


def _lion(c: OptimizerConfig, lr: optax.Schedule):
  # Lion's second decay is its momentum's, 0.99; Adam's 0.999 is another thing.
  return optax.lion(lr, c.b1, 0.99, weight_decay=c.weight_decay, mask=decayed)


def _sgd(c: OptimizerConfig, lr: optax.Schedule):
  # Like the others' the decay comes after the momentum: it is decoupled.
  return optax.chain(
    optax.trace(c.b1),
    optax.add_decayed_weights(c.weight_decay, decayed),
    optax.scale_by_learning_rate(lr),
  )


def _muon(c: OptimizerConfig, lr: optax.Schedule):
  def dimensions(params: Any) -> Any:
    axes = optax.contrib.MuonDimensionNumbers(-2, -1)
    return jax.tree.map(lambda hit: axes if hit else None, matrices(params))

  return optax.contrib.muon(
    lr,
    weight_decay=c.weight_decay,
    adam_b1=c.b1,
    adam_b2=c.b2,
    adam_weight_decay=c.weight_decay,
    weight_decay_mask=decayed,
    muon_weight_dimension_numbers=dimensions,
  )


def _contrib_galore(c: OptimizerConfig, lr: optax.Schedule):
  """`optax.contrib.galore` on the block matrices, each layer by itself."""
  projected = optax.contrib.galore(
    lr,
    rank=c.rank,
    update_proj_gap=c.update_proj_gap,
    scale=c.scale,
    base_optimizer=optax.scale_by_adam(c.b1, c.b2, c.eps),
    weight_decay=c.weight_decay,
  )

  def methods(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda path, _: "galore" if "/kernel/" in path_of(path) else "adamw",
      params,
    )

  # Told to leave a leaf alone it would keep arrays of size zero for it, which
  # Orbax does not save: so it is given its own leaves only.
  return unstacked(
    optax.partition({"galore": projected, "adamw": _adamw(c, lr)}, methods)
  )


def _options(c: Told) -> dict[str, Any]:
  """The keyword arguments of `galore_optax.galore`."""
  return {
    "rank": c.rank,
    # What is not of the blocks is at full rank: an encoder's pooler too.
    "rules": ((r"^(?!layers/)", None),),
    "update_proj_gap": c.update_proj_gap,
    "scale": c.scale,
    "proj_type": c.proj_type,
    "projector": c.projector,
    "refresh": c.refresh,
    "moments": c.moments,
    "random_from": c.random_from or None,
    "basis_dtype": c.basis_dtype,
    "state_dtype": c.state_dtype or None,
    "accumulation_steps": c.accumulate,
    # Told, `auto` would keep bases of undivided sides whole on every device;
    # here it is to be the smallest state.
    "param_shardings": None if c.proj_type == "auto" else c.param_shardings,
  }


def _galore(c: Told, lr: optax.Schedule, **options: Any):
  return galore_optax.galore(_adamw(c, lr), **_options(c) | options)


def _galore_faithful(c: Told, lr: optax.Schedule):
  return _galore(c, lr, faithful=True)


def _galore_adafactor(c: Told, lr: optax.Schedule):
  # What is projected is as factored as what is not, however low the rank: but
  # no lower than layers may be many, which are stacked in an axis beside it.
  inner = _adafactor(c, lr, least=min(128, c.rank) if c.rank >= 32 else 128)
  return galore_optax.galore(inner, **_options(c))


def _galore_lion(c: Told, lr: optax.Schedule):
  return galore_optax.galore(_lion(c, lr), **_options(c))


def _galore_sgd(c: Told, lr: optax.Schedule):
  return galore_optax.galore(_sgd(c, lr), **_options(c))


def _adamw_8bit(c: Told, lr: optax.Schedule):
  return galore_optax.adamw_8bit(
    lr, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=decayed
  )


def _galore_8bit(c: Told, lr: optax.Schedule, **options: Any):
  return galore_optax.galore(_adamw_8bit(c, lr), **_options(c) | options)


def _q_galore(c: Told, lr: optax.Schedule):
  return _galore_8bit(c, lr, basis_dtype="int4", refresh="adaptive")


def _fira(c: Told, lr: optax.Schedule):
  return _galore(c, lr, recovery="fira")


# What random projections keep is a seed: how bases are found, refreshed and
# stored, and moments carried over, has no meaning for them.
_RANDOM = {
  "projector": "random",
  "refresh": "synchronous",
  "moments": "keep",
  "random_from": None,
  "basis_dtype": "float32",
}


def _apollo(c: Told, lr: optax.Schedule):
  return _galore(c, lr, recovery="apollo", **_RANDOM)


def _apollo_mini(c: Told, lr: optax.Schedule):
  return _galore(c, lr, recovery="apollo_mini", rank=1, **_RANDOM)


def _q_apollo_mini(c: Told, lr: optax.Schedule):
  # Its moments of the matrices are of rank 1: the eight bits are for those of
  # the embedding and the head.
  return _galore_8bit(c, lr, recovery="apollo_mini", rank=1, **_RANDOM)


def _sumo(c: Told, lr: optax.Schedule):
  """Orthogonalised momentum for the block matrices, AdamW for the rest."""
  kinds: dict[Any, Any] = {
    "matrix": galore_optax.scale_by_orthogonal_momentum(SUMO_DECAY),
    "other": optax.scale_by_adam(c.b1, c.b2, c.eps),
  }

  def label(params: Any) -> Any:
    name = lambda hit: "matrix" if hit else "other"
    return jax.tree.map(name, matrices(params))

  inner = optax.chain(
    optax.partition(kinds, label),
    optax.add_decayed_weights(c.weight_decay, decayed),
    optax.scale_by_learning_rate(lr),
  )
  return galore_optax.galore(inner, **_options(c))


def _gum(c: Told, lr: optax.Schedule):
  """As SUMO, and some matrices follow what their subspaces leave out."""
  _refuse(c, "moments", ("rotate",), "whose momentum begins with each draw")
  _refuse(c, "random_from", (0,), "whose draws are of matrices")
  return galore_optax.gum(
    lr,
    SUMO_DECAY,
    c.b1,
    c.b2,
    c.eps,
    c.weight_decay,
    decayed,
    sampled=c.sampled,
    **_own_options(c),
  )


def _ldadam(c: Told, lr: optax.Schedule):
  """With error feedback; the error has the moments' dtype."""
  _refuse(c, "moments", ("rotate", "ldadam"), "which says what becomes of them")
  _refuse(c, "random_from", (0,), "whose bases follow the momentum")
  return galore_optax.ldadam(
    lr,
    c.b1,
    c.b2,
    c.eps,
    c.weight_decay,
    decayed,
    error_dtype=c.state_dtype or None,
    **_own_options(c),
  )


def _own_options(c: Told) -> dict[str, Any]:
  """Those of `_options` that methods take which decide the others."""
  theirs = ("moments", "random_from", "accumulation_steps")
  return {k: v for k, v in _options(c).items() if k not in theirs}


def _refuse(c: Told, name: str, known: tuple, why: str) -> None:
  """Raises for a setting that a method would not follow."""
  if getattr(c, name) not in known:
    raise UserError(
      f"optimizer.{name}={getattr(c, name)} has no meaning for"
      f" optimizer.name={c.name}, {why}; leave it at {known[0]}"
    )


METHODS = {
  "adamw": _adamw,
  "adafactor": _adafactor,
  "lion": _lion,
  "sgd": _sgd,
  "muon": _muon,
  "contrib_galore": _contrib_galore,
  "galore": _galore,
  "galore_faithful": _galore_faithful,
  "galore_adafactor": _galore_adafactor,
  "galore_lion": _galore_lion,
  "galore_sgd": _galore_sgd,
  "golore": _galore,
  "adamw_8bit": _adamw_8bit,
  "galore_8bit": _galore_8bit,
  "q_galore": _q_galore,
  "fira": _fira,
  "apollo": _apollo,
  "apollo_mini": _apollo_mini,
  "q_apollo_mini": _q_apollo_mini,
  "sumo": _sumo,
  "gum": _gum,
  "ldadam": _ldadam,
  # What these train instead of the matrices is said in train/step/adapters.py.
  "lora": _adamw,
  "qlora": _adamw,
  "relora": _adamw,
  "low_rank": _adamw,
}


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
  if dtype and projects(config.name):
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
