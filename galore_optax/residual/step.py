"""The settings of a residual, and the arrays of one leaf."""

import dataclasses
import math
from typing import Any

import jax

from galore_optax.subspace import projection
from galore_optax.tree import plan


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the arguments of :func:`galore_optax.galore` say of the residual.

  Attributes:
    method: Name of the method.
    factor: Factor on a normalized residual, possibly traced; None for 1.
    decay: Decay of its mean square, possibly traced; None for 0.95.
    growth: Largest ratio of its norms at two successive steps, possibly traced;
      None or infinity for no limit.
    orthonormal: Whether bases are stored in float32, so that they are
      orthonormal.
  """

  method: str
  factor: Any = None
  decay: Any = None
  growth: Any = None
  orthonormal: bool = True

  @property
  def is_limited(self) -> bool:
    """Whether the norm may not grow at will, as far as one can see."""
    is_infinite = isinstance(self.growth, float) and math.isinf(self.growth)
    return self.growth is not None and not is_infinite


@dataclasses.dataclass(frozen=True)
class Step:
  """The arrays that one leaf's update is computed from.

  Attributes:
    site: The leaf's plan.
    grad: Gradients (..., m, n).
    low: Projected gradients R, as the inner optimizer saw them.
    new: The inner optimizer's updates of them.
    gain: The last factor of `new`, see :mod:`galore_optax.inner.gain`; None
      for 1.
    bases: The leaf's bases.
  """

  site: plan.Site
  grad: jax.Array
  low: jax.Array
  new: jax.Array
  gain: Any
  bases: projection.Bases
