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

  name: str = "galore"  # what --optimizer sets
  learning_rate: float = 8e-3  # at its peak
  matrix_lr: float = 1.0  # factor for the block matrices, any optimizer
  warmup: float = 0.1  # fraction of the steps
  decay: Literal["cosine", "linear"] = "cosine"  # after the warm-up
  final: float = 0.1  # learning rate at the end, fraction of the peak
  clip: float = 1.0  # global norm of the gradient; 0: no clipping
  b1: float = 0.9  # decay of the first moment
  b2: float = 0.999  # decay of the second moment
  eps: float = 1e-8  # added to the root of the second moment
  weight_decay: float = 0.0  # decoupled; not on norms
  rank: int = 64  # of GaLore's subspaces, or of LoRA's factors
  update_proj_gap: int = 50  # steps between two bases of a matrix
  scale: float = 0.25  # GaLore's alpha: factor on what comes back from them
  # The projected side: std the shorter, as the papers do; reverse_std the
  # longer; full both; auto whichever leaves the smallest state.
  proj_type: Literal["std", "reverse_std", "left", "right", "full", "auto"] = (
    "std"
  )
  # How a basis is found: warm-started subspace iteration, or exactly.
  projector: Literal["subspace", "svd"] = "subspace"
  # When bases are renewed: a few at each step, or all at once.
  refresh: Literal["staggered", "synchronous", "adaptive"] = "staggered"
  # What happens to a matrix's moments when its basis is renewed.
  # ldadam is for the methods around AdamW.
  moments: Literal["rotate", "keep", "reset", "ldadam"] = "rotate"
  # Update from which bases are random ones; 0: never, but with golore from
  # half of the run on.
  random_from: int = 0
  # What GaLore's bases are stored in; the integers with a scale a block.
  basis_dtype: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
  state_dtype: Literal["", "float32", "bfloat16"] = (
    ""  # of GaLore's moments; empty: the weights', but float32 at least
  )
  lora_alpha: float = 32.0  # LoRA's product is multiplied by this over rank

  def __post_init__(self):
    positive = ("learning_rate", "matrix_lr", "eps", "scale")
    positive += ("rank", "update_proj_gap", "lora_alpha")
    check_above("optimizer", self, positive)
    _check_fractions(self, ("warmup", "final", "b1", "b2"))
    free = ("clip", "weight_decay", "random_from")
    check_above("optimizer", self, free, low=-1e-30)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(SharedOptimizerConfig):
  """The optimizer, its schedule and GaLore's options."""

  sampled: float = 0.125  # share of the matrices that GUM has at full rank
  accumulate: int = 1  # parts of a batch whose gradients GaLore adds at rank r
  reset_every: int = 100  # updates between two restarts of ReLoRA's factors
  restart_warmup: int = 10  # updates in which its learning rate comes back
  pruned: float = 0.9  # share of the factors' moments that a restart zeroes

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


def _check_fractions(config: SharedOptimizerConfig, names: Iterable[str]):
  """Raises unless every named field lies between 0 and 1."""
  for name in names:
    value = getattr(config, name)
    if not 0 <= value <= 1:
      raise UserError(f"optimizer.{name} must lie in [0, 1], got {value}")
