"""The state before the first step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks
from galore_optax.inner import storage
from galore_optax.residual import methods as residual_lib
from galore_optax.subspace import adaptive, due, initial
from galore_optax.transform import axis_names, weights
from galore_optax.transform.settings import Settings, as_dtype
from galore_optax.transform.state import GaLoreState
from galore_optax.tree import boxes, paths, sharding, split
from galore_optax.tree import plan as plan_lib


def init(settings: Settings, params: optax.Params) -> GaLoreState:
  """Initial bases for the parameters, and the inner state at rank r."""
  if split.is_placeholder(params):
    return _skeleton(settings, params)
  leaves = paths.leaves_by_path(params)
  sites = settings.plan.sites(
    leaves, split.masked_paths(params), boxes.axis_names(params)
  )
  due.check_gaps(settings.refresh, sites)
  bases = {
    path: {
      side: _basis(settings, site, side, leaves[path]) for side in site.sides
    }
    for path, site in sites.items()
  }
  low, narrow = (
    _low_params(settings, params, sites, dtype)
    for dtype in (settings.dtype, settings.stored_dtype)
  )
  inner_state = storage.init(settings.inner, low, narrow)
  checks.check_not_nested(inner_state, GaLoreState)
  stored = split.split_state(settings.inner, inner_state, sites)
  inner_state = storage.widen(settings.inner, inner_state, low)
  weights.check_inner(settings, params, low, inner_state, sites)
  norms = None
  if settings.residual:
    norms = residual_lib.start(
      settings.residual, settings.inner, sites, leaves, low, inner_state
    )
  state = GaLoreState(
    step=jnp.zeros([], jnp.int32),
    projector=bases,
    inner_state=stored,
    schedule=_schedules(settings, sites),
    recovery=norms,
  )
  if settings.accumulation_steps > 1:
    empty = jax.tree.map(lambda x: _zeros_like(x), narrow)
    state = state._replace(
      accumulator=split.split(empty, sites),
      micro_step=jnp.zeros([], jnp.int32),
    )
  return axis_names.named(state, params, sites)


def _skeleton(settings: Settings, params: Any) -> GaLoreState:
  """The state for Optax's `tree.map_params`: no leaf is like a parameter."""
  accumulates = 0 if settings.accumulation_steps > 1 else None
  return GaLoreState(
    step=0,
    projector=0,
    inner_state=split.placeholder_state(settings.inner, params),
    schedule=0 if settings.refresh.policy == "adaptive" else None,
    accumulator=accumulates,
    micro_step=accumulates,
    recovery=0 if settings.residual else None,
  )


def _basis(
  settings: Settings, site: plan_lib.Site, side: str, like: Any
) -> Any:
  """The basis that a matrix has before its first refresh."""
  if settings.refresh.finder == "random":
    return initial.random_basis(site, side, like, settings.seed)
  return initial.basis(site, side, like, settings.seed, settings.basis_dtype)


def _schedules(
  settings: Settings, sites: Mapping[str, plan_lib.Site]
) -> dict[str, adaptive.State] | None:
  """Path to schedule before the first refresh; None unless it is adaptive."""
  rule: Any = settings.refresh.adaptive
  if settings.refresh.policy != "adaptive":
    return None
  return {p: adaptive.start(x.view.stack, rule) for p, x in sites.items()}


def _low_params(
  settings: Settings,
  params: optax.Params,
  sites: Mapping[str, plan_lib.Site],
  dtype: Callable[[Any], Any],
) -> Any:
  """What the inner optimizer is initialized with, in the dtypes of `dtype`.

  Args:
    settings: The settings.
    params: The parameters.
    sites: Path to site.
    dtype: From the dtype of a parameter.
  """
  return paths.map_with_path(
    lambda path, x: (
      _low_zeros(sites[path], x, dtype(jnp.result_type(x)))
      if path in sites
      else as_dtype(x, dtype(jnp.result_type(x)))
    ),
    params,
  )


def _low_zeros(site: plan_lib.Site, like: Any, dtype: Any) -> jax.Array:
  """Zeros in the shape of the projected gradient.

  The axis of the rank is divided over the mesh axes of the side it stands for,
  so that every device holds a part of the moments on either side.
  """
  zeros = jnp.zeros(site.low_shape, dtype)
  return sharding.shard_divisible_like(zeros, like, site.view.spec)


def _zeros_like(x: Any) -> jax.Array:
  zeros = jnp.zeros(jnp.shape(x), jnp.result_type(x))
  return sharding.shard_like(zeros, x, lambda spec: spec)
