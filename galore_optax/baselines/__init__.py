"""Methods that GaLore is compared with: LoRA and its relatives, and RACS.

LoRA and its relatives train factors of low rank in place of the weights.
:func:`lora`, :func:`qlora` and :func:`relora` add the factors to frozen
weights; :func:`low_rank` replaces the weights by them. Each returns a
:class:`LowRank`, which divides parameters into a frozen and a trained part.
:func:`scale_by_racs` is a gradient transformation without moments.
"""

from galore_optax.baselines.adapters import Adapter, LowRank
from galore_optax.baselines.racs import ScaleByRacsState, scale_by_racs
from galore_optax.baselines.recipes import lora, low_rank, qlora, relora
from galore_optax.baselines.restart import jagged_schedule

__all__ = [
  "Adapter",
  "LowRank",
  "ScaleByRacsState",
  "jagged_schedule",
  "lora",
  "low_rank",
  "qlora",
  "relora",
  "scale_by_racs",
]
