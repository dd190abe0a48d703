"""GaLore for JAX as a composable Optax gradient transformation."""

from typing import Any

from galore_optax import baselines
from galore_optax._chain import chain
from galore_optax._galore import galore
from galore_optax._value_and_grad import (
  deferred_value_and_grad,
  projected_value_and_grad,
)
from galore_optax.diagnostics import (
  basis_overlap,
  captured_energy,
  describe,
  find_bases,
  refresh_counts,
  stable_rank,
  state_bytes,
)
from galore_optax.linalg import polar_factor
from galore_optax.optimizers._gum import gum
from galore_optax.optimizers._ldadam import LDAdamState, ldadam
from galore_optax.optimizers._sumo import scale_by_orthogonal_momentum, sumo
from galore_optax.optimizers.adam8bit import (
  ScaleByAdam8bitState,
  adamw_8bit,
  scale_by_adam_8bit,
)
from galore_optax.optimizers.gum_sampling import GumState
from galore_optax.optimizers.recipes import (
  apollo_adamw,
  apollo_mini_adamw,
  galore_adafactor,
  galore_adamw,
  galore_adamw_8bit,
  galore_lion,
  galore_sgd,
  q_galore_adamw_8bit,
)
from galore_optax.per_layer.host import host_shardings
from galore_optax.per_layer.model import Layered, stack, unstack
from galore_optax.per_layer.step import (
  EndState,
  Layerwise,
  LayerwiseState,
  layerwise,
)
from galore_optax.quantization.qarray import QArray, dequantize, quantize
from galore_optax.quantized_params import (
  apply_updates,
  dequantize_params,
  quantize_params,
)
from galore_optax.subspace.adaptive import Adaptive
from galore_optax.subspace.refresh_settings import Refresh
from galore_optax.transform.state import GaLoreState
from galore_optax.tree.rules import Projection
from galore_optax.tree.sharding import quantized_shardings, state_shardings

__version__ = "0.1.0"

__all__ = [
  "Adaptive",
  "EndState",
  "GaLoreState",
  "GumState",
  "LDAdamState",
  "Layered",
  "Layerwise",
  "LayerwiseState",
  "Projection",
  "QArray",
  "Refresh",
  "ScaleByAdam8bitState",
  "adamw_8bit",
  "apollo_adamw",
  "apollo_mini_adamw",
  "apply_updates",
  "baselines",
  "basis_overlap",
  "captured_energy",
  "chain",
  "deferred_value_and_grad",
  "dequantize",
  "dequantize_params",
  "describe",
  "find_bases",
  "galore",
  "galore_adafactor",
  "galore_adamw",
  "galore_adamw_8bit",
  "galore_lion",
  "galore_sgd",
  "gum",
  "host_shardings",
  "layerwise",
  "ldadam",
  "polar_factor",
  "projected_value_and_grad",
  "q_galore_adamw_8bit",
  "quantize",
  "quantize_params",
  "quantized_shardings",
  "refresh_counts",
  "scale_by_adam_8bit",
  "scale_by_orthogonal_momentum",
  "stable_rank",
  "stack",
  "state_bytes",
  "state_shardings",
  "sumo",
  "unstack",
]


def __getattr__(name: str) -> Any:
  """Raises with the new name of what was found here in version 0.1."""
  if name in baselines.__all__:
    raise AttributeError(
      f"galore_optax.{name} has moved: use galore_optax.baselines.{name}."
    )
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
