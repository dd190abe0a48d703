"""GaLore for JAX as a composable Optax gradient transformation."""

from galore_optax.alias import (
  galore_adafactor,
  galore_adamw,
  galore_lion,
  galore_sgd,
)
from galore_optax.chaining import chain
from galore_optax.diagnostics import (
  basis_overlap,
  captured_energy,
  describe,
  stable_rank,
  state_bytes,
)
from galore_optax.galore import GaLoreState, galore
from galore_optax.plan import Projection
from galore_optax.sharding import state_shardings

__version__ = "0.1.0"

__all__ = [
  "GaLoreState",
  "Projection",
  "basis_overlap",
  "captured_energy",
  "chain",
  "describe",
  "galore",
  "galore_adafactor",
  "galore_adamw",
  "galore_lion",
  "galore_sgd",
  "stable_rank",
  "state_bytes",
  "state_shardings",
]
