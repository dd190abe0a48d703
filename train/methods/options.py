"""The options of the optimizer, whichever method it is."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

from train.common.checks import check_above
from train.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class SharedOptimizerConfig:
  """The optimizer, its schedule and GaLore's options.

  The projected matrices are the kernels of the blocks (attention and
  feed-forward). Two factors multiply the learning rate for them alone:
  `matrix_lr` for every optimizer, and GaLore's own `scale` (the papers'
  alpha), which is nothing else. Both are kept because a comparison is fair
  only when the full-rank optimizers have the factor as well.
  """

  name: str = "galore"  # the method, which --optimizer also sets
  learning_rate: float = 8e-3  # peak learning rate
  # factor on the learning rate of the block matrices, for any method
  matrix_lr: float = 1.0
  warmup: float = 0.1  # fraction of the steps in which the learning rate rises
  # shape of the learning rate after the warm-up
  decay: Literal["cosine", "linear"] = "cosine"
  final: float = 0.1  # final learning rate as a fraction of the peak
  # clip the global norm of the gradient to this; 0: no clipping
  clip: float = 1.0
  b1: float = 0.9  # decay of the first moment
  b2: float = 0.999  # decay of the second moment
  eps: float = 1e-8  # term added to the root of the second moment
  # decoupled weight decay; norms and biases are not decayed
  weight_decay: float = 0.0
  rank: int = 64  # rank of GaLore's subspaces, or of LoRA's factors
  # steps between two refreshes of the basis of a matrix
  update_proj_gap: int = 50
  # GaLore's alpha: factor on the projected updates; also that of RACS, Alice
  # and FOAM on the updates of the block matrices
  scale: float = 0.25
  # which side is projected: the shorter (std, as in the papers), the longer
  # (reverse_std), both (full), or whichever leaves the smallest state (auto)
  proj_type: Literal["std", "reverse_std", "left", "right", "full", "auto"] = (
    "std"
  )
  # how a basis is found: by warm-started subspace iteration, or exactly
  projector: Literal["subspace", "svd"] = "subspace"
  # when bases are recomputed: some at each step, all at once, or adaptively, as
  # they change
  refresh: Literal["staggered", "synchronous", "adaptive"] = "staggered"
  # successive steps that a refresh takes, each of which makes one iteration; 0:
  # it takes place within one step
  burst: int = 0
  # what happens to the moments of a matrix when its basis is refreshed; ldadam
  # is for methods around AdamW
  moments: Literal["rotate", "keep", "reset", "ldadam"] = "rotate"
  # update from which bases are random; 0: never, or for golore from half of the
  # run on
  random_from: int = 0
  # what becomes of the part of a gradient that the bases do not span: dropped,
  # or added, divided by its own size by column (normalized), or by row and
  # column (factored)
  residual: Literal["none", "normalized", "factored"] = "none"
  residual_factor: float = 1.0  # factor on the residual, beside Adam's update
  residual_decay: float = 0.95  # decay of the mean square that it is divided by
  # largest ratio of its norm to that of the step before, as 1.01; 0: any
  residual_growth: float = 0.0
  # dtype of GaLore's bases; integers have a scale per block
  basis_dtype: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
  # dtype of GaLore's moments between steps; auto: that of the weights; empty:
  # float32, as runs that older versions began have it
  state_dtype: Literal["auto", "float32", "bfloat16", ""] = "auto"
  lora_alpha: float = 32.0  # LoRA's product is multiplied by this over the rank

  @property
  def moments_dtype(self) -> str | None:
    """The dtype of moments in the library's terms."""
    return {"auto": None, "": "float32"}.get(self.state_dtype, self.state_dtype)

  def __post_init__(self):
    positive = ("learning_rate", "matrix_lr", "eps", "scale")
    positive += ("rank", "update_proj_gap", "lora_alpha")
    check_above("optimizer", self, positive)
    fractions = ("warmup", "final", "b1", "b2", "residual_decay")
    _check_fractions(self, fractions)
    free = ("clip", "weight_decay", "random_from", "residual_factor", "burst")
    check_above("optimizer", self, free, low=-1e-30)
    _check_burst(self)
    if self.residual_growth and not self.residual_growth >= 1:
      raise UserError(
        f"optimizer.residual_growth is {self.residual_growth}; it must be 1 or"
        " more, or 0 for no limit"
      )
    for field in dataclasses.fields(self):
      if (
        self.residual == "none"
        and field.name.startswith("residual_")
        and getattr(self, field.name) != field.default
      ):
        raise UserError(
          f"optimizer.{field.name}={getattr(self, field.name)} has no meaning"
          " for optimizer.residual=none; choose normalized or factored"
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(SharedOptimizerConfig):
  """The optimizer, its schedule and GaLore's options."""

  # share of the matrices that follow their whole gradient under GUM
  sampled: float = 0.125
  # microbatches of a batch, whose gradients GaLore adds up at low rank
  accumulate: int = 1
  reset_every: int = 100  # updates between two restarts of ReLoRA's factors
  # updates after a restart in which the learning rate rises again
  restart_warmup: int = 10
  # share of the moments of ReLoRA's factors that a restart zeroes
  pruned: float = 0.9

  def __post_init__(self):
    super().__post_init__()
    check_above("optimizer", self, ("accumulate", "reset_every"))
    _check_fractions(self, ("pruned",))
    if not 0 < self.sampled < 1:
      raise UserError(
        f"optimizer.sampled must lie between 0 and 1, got {self.sampled}"
      )
    if not 0 <= self.restart_warmup < self.reset_every:
      raise UserError(
        f"optimizer.restart_warmup is {self.restart_warmup}; it must be 0 or"
        f" more, and less than optimizer.reset_every={self.reset_every}"
      )


def _check_burst(config: SharedOptimizerConfig) -> None:
  """Raises for options that a refresh of several steps excludes."""
  needed = {"projector": "subspace", "random_from": 0}
  if config.refresh == "adaptive":
    needed["refresh"] = "staggered"
  for name, value in needed.items():
    found = getattr(config, name)
    if config.burst and found != value:
      raise UserError(
        f"optimizer.burst={config.burst} makes a refresh of several steps,"
        f" which optimizer.{name}={found} excludes; set optimizer.burst=0, or"
        f" optimizer.{name}={value}"
      )


def _check_fractions(config: SharedOptimizerConfig, names: Iterable[str]):
  """Raises unless every named field lies between 0 and 1."""
  for name in names:
    value = getattr(config, name)
    if not 0 <= value <= 1:
      raise UserError(f"optimizer.{name} must lie in [0, 1], got {value}")
