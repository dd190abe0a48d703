"""A step at given bases: projects, updates at rank r, and lifts."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax.inner import storage
from galore_optax.quantization import bfloat16
from galore_optax.residual import methods as residual_lib
from galore_optax.subspace import projection
from galore_optax.transform import weights
from galore_optax.transform.call import Call
from galore_optax.transform.settings import Settings
from galore_optax.transform.state import GaLoreState
from galore_optax.tree import paths, sequential, slices, split
from galore_optax.tree import plan as plan_lib


def project(
  settings: Settings, call: Call, bases: Mapping[str, projection.Bases]
) -> optax.Updates:
  """The gradients for the inner optimizer, those of projected leaves R."""
  factors = call.context.weights or {}

  def of_leaf(path: str, basis: projection.Bases) -> jax.Array:
    is_low = path in call.low
    low = _by_matrix(
      call.sites[path],
      functools.partial(
        _without_noise if is_low else _project_matrices, settings
      ),
      call.low[path] if is_low else call.grads[path],
      basis,
    )
    return low * factors[path] if path in factors else low

  low = sequential.one_after_another(of_leaf, bases)
  return paths.map_with_path(
    lambda path, g: low[path] if path in low else _finite(settings.cast(g)),
    call.updates,
  )


def _project_matrices(
  settings: Settings, g: jax.Array, bases: projection.Bases
) -> jax.Array:
  """The projected gradient as the inner optimizer sees it."""
  low = projection.project(g, bases)
  return _without_noise(settings, low, bases, g.dtype)


def _without_noise(
  settings: Settings, low: jax.Array, bases: projection.Bases, dtype: Any = None
) -> jax.Array:
  """R without directions of noise; 0 where the gradient is not finite.

  Args:
    settings: The settings.
    low: Projected gradients R.
    bases: The bases they were made with.
    dtype: Dtype of the gradient; None for that of R.
  """
  tolerance: Any = settings.refresh.null_tolerance
  wide = low.astype(jnp.promote_types(low.dtype, jnp.float32))
  wide = projection.drop_null(wide, bases, tolerance)
  return _finite(wide.astype(settings.dtype(dtype or low.dtype)))


def step(
  settings: Settings,
  call: Call,
  bases: Mapping[str, projection.Bases],
  low: optax.Updates,
  state: GaLoreState,
) -> tuple[optax.Updates, GaLoreState]:
  """The inner optimizer's step on projected gradients, lifted."""
  inner_state = split.merge_state(settings.inner, state.inner_state)
  inner_state = storage.widen(settings.inner, inner_state, low)
  param_terms = weights.terms(
    settings, call.sites, inner_state, call.params, call.extra_args
  )
  inner_params = weights.as_seen(settings, call, bases)
  inner_updates, new_inner_state = settings.inner.update(
    low, inner_state, inner_params, **call.extra_args
  )
  new = paths.leaves_by_path(inner_updates)
  lifted, norms = _lift(
    settings, call, bases, low, new, inner_state, inner_params, state.recovery
  )
  new |= lifted
  new |= {path: new[path] + term for path, term in param_terms.items()}
  updates = paths.map_with_path(
    lambda path, g: new[path].astype(jnp.result_type(g)), call.updates
  )
  stored = storage.narrow(
    split.split_state(settings.inner, new_inner_state, call.sites),
    state.inner_state,
    paths.leaves_by_path(updates),
    bfloat16.step_key("moments", settings.seed, state.step),
    call.context.layer,
  )
  return updates, state._replace(
    step=optax.safe_increment(state.step),
    inner_state=stored,
    recovery=norms,
  )


def accumulate(
  settings: Settings,
  call: Call,
  bases: Mapping[str, projection.Bases],
  low: optax.Updates,
  state: GaLoreState,
) -> tuple[optax.Updates, GaLoreState]:
  """Adds projected gradients up; every k-th call steps with their mean.

  Projection is linear, so this is the projection of the mean gradient. All
  gradients of a step are projected on the same bases.
  """
  mean = jax.tree.map(
    lambda total, x: total + x / settings.accumulation_steps,
    split.merge(state.accumulator),
    low,
  )
  is_last = state.micro_step == settings.accumulation_steps - 1

  def finish(mean: Any) -> tuple[optax.Updates, GaLoreState]:
    new, after = step(settings, call, bases, mean, state)
    empty = jax.tree.map(jnp.zeros_like, state.accumulator)
    return new, after._replace(
      accumulator=empty, micro_step=jnp.zeros_like(state.micro_step)
    )

  def wait(mean: Any) -> tuple[optax.Updates, GaLoreState]:
    stored = storage.round_tree(
      split.split(mean, call.sites),
      state.accumulator,
      bfloat16.step_key("sums", settings.seed, state.step, state.micro_step),
      call.context.layer,
    )
    return _zero_updates(call), state._replace(
      accumulator=stored, micro_step=state.micro_step + 1
    )

  return jax.lax.cond(is_last, finish, wait, mean)


def _zero_updates(call: Call) -> optax.Updates:
  """Updates of zero, at full size."""
  return paths.map_with_path(
    lambda path, g: (
      jnp.zeros(call.sites[path].view.shape, jnp.result_type(g))
      if path in call.low
      else jnp.zeros_like(g)
    ),
    call.updates,
  )


def _lift(
  settings: Settings,
  call: Call,
  bases: Mapping[str, projection.Bases],
  low: optax.Updates,
  new: Mapping[str, jax.Array],
  inner_state: Any,
  inner_params: optax.Params | None,
  norms: Any,
) -> tuple[dict[str, jax.Array], Any]:
  """Projected leaves' updates at full size, and the norms of residuals."""
  if not settings.residual:
    return _lift_leaves(call, bases, new), norms
  gains = residual_lib.gains(
    settings.inner, low, inner_state, inner_params, call.sites, call.extra_args
  )
  return residual_lib.lift(
    settings.residual,
    gains,
    call.sites,
    bases,
    paths.leaves_by_path(call.updates),
    paths.leaves_by_path(low),
    new,
    norms,
  )


def _lift_leaves(
  call: Call,
  bases: Mapping[str, projection.Bases],
  new: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
  """Path of a projected leaf to its update at full size."""
  leaves = paths.leaves_by_path(call.updates)
  return sequential.one_after_another(
    lambda path, low: _lift_leaf(
      call.sites[path], low, bases[path], jnp.result_type(leaves[path])
    ),
    {path: new[path] for path in call.sites},
  )


def _lift_leaf(
  site: plan_lib.Site, low: jax.Array, bases: projection.Bases, dtype: Any
) -> jax.Array:
  """The full-size update of a leaf that will be cast to `dtype`."""
  low = site.scale * low
  if dtype == jnp.bfloat16:
    # The update is rounded to bfloat16 anyway. Products of bfloat16 numbers
    # take one pass of a matrix unit, and a mesh gathers half as many bytes.
    low, bases = jax.tree.map(lambda x: x.astype(dtype), (low, bases))
    # Computed before the product; else moments and scales of all matrices
    # would be kept for it, in float32.
    low, bases = jax.lax.optimization_barrier((low, bases))
  return site.view.from_stack(_by_matrix(site, projection.lift, low, bases))


def _by_matrix(site: plan_lib.Site, f: Callable, *stacks: Any) -> jax.Array:
  """A function of a leaf's matrices, called on all at once or one by one."""
  if not site.one_by_one:
    return f(*stacks)
  return slices.map_stack(f, len(site.view.stack), *stacks)


def _finite(x: jax.Array) -> jax.Array:
  """`x` with 0 for NaN and infinity, which would never leave a moment."""
  return jnp.where(jnp.isfinite(x), x, 0)
