"""The settings of one transformation, and the dtypes that follow from them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax.residual import methods as residual_lib
from galore_optax.subspace.refresh_settings import Refresh
from galore_optax.tree import plan as plan_lib


@dataclasses.dataclass(frozen=True)
class Settings:
  """The arguments of :func:`galore_optax.galore`, checked and completed."""

  inner: optax.GradientTransformationExtraArgs
  plan: plan_lib.Plan
  refresh: Refresh
  params_mode: str
  basis_dtype: Any
  state_dtype: Any
  seed: Any
  accumulation_steps: int
  residual: residual_lib.Settings | None

  def dtype(self, dtype: Any) -> Any:
    """The dtype in which the inner optimizer sees a leaf."""
    if self.state_dtype is None or self.state_dtype == jnp.bfloat16:
      return jnp.promote_types(dtype, jnp.float32)
    if jnp.issubdtype(dtype, jnp.complexfloating):
      return jnp.promote_types(dtype, self.state_dtype)
    return jnp.dtype(self.state_dtype)

  def stored_dtype(self, dtype: Any) -> Any:
    """The dtype in which the moments of a leaf are stored."""
    asked = dtype if self.state_dtype is None else self.state_dtype
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    if asked == jnp.bfloat16 and not is_complex:
      return jnp.dtype(jnp.bfloat16)
    return self.dtype(dtype)

  def cast(self, x: Any) -> Any:
    """A leaf in the dtype in which the inner optimizer sees it."""
    return as_dtype(x, self.dtype(jnp.result_type(x)))


def as_dtype(x: Any, dtype: Any) -> Any:
  """An array, or the description of one, in a dtype."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
  return jnp.asarray(x, dtype)
