"""RACS: SGD whose rows and columns are scaled."""

from typing import Any

import optax

from galore_optax import baselines
from train.methods import transforms
from train.methods.options import OptimizerConfig
from train.methods.rivals import parts


def racs(c: OptimizerConfig, lr: optax.Schedule, shardings: Any = None):
  """RACS for the block matrices, AdamW for the rest.

  `optimizer.scale` is its factor α.
  """
  scaled = baselines.scale_by_racs(), optax.scale(c.scale)
  matrices = parts.finished(c, lr, *scaled)
  return parts.for_matrices(matrices, transforms.adamw(c, lr, shardings))
