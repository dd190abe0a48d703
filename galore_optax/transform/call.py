"""One call of `update`: its arguments, checked, and what is static about it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import context as context_lib
from galore_optax.subspace import projection
from galore_optax.transform.settings import Settings
from galore_optax.transform.state import GaLoreState
from galore_optax.tree import paths
from galore_optax.tree import plan as plan_lib


@dataclasses.dataclass(frozen=True)
class Call:
  """The arguments of one call of `update`, and what is static about it."""

  sites: Mapping[str, plan_lib.Site]
  updates: optax.Updates
  grads: Mapping[str, jax.Array]  # of projected leaves, (..., m, n)
  low: Mapping[str, jax.Array]  # of leaves that come projected, (..., r, n)
  params: optax.Params | None
  context: context_lib.UpdateContext
  extra_args: Mapping[str, Any]


def make(
  settings: Settings,
  updates: optax.Updates,
  state: GaLoreState,
  params: optax.Params | None,
  extra_args: Mapping[str, Any],
) -> Call:
  """Checks the arguments of `update` and finds the projected leaves."""
  leaves = paths.leaves_by_path(updates)
  paths.check_arrays(leaves, plan_lib.AT_ARRAYS)
  context, others = context_lib.split_off(extra_args)
  active = True if state.micro_step is None else state.micro_step == 0
  shapes = projection.basis_shapes(state.projector)
  # Gradients may come projected: only the parameters have the full shape.
  full = leaves if params is None else paths.leaves_by_path(params)
  sites = settings.plan.sites_from_bases({**leaves, **full}, shapes)
  low = {p: leaves[p] for p in sites if _is_low(sites[p], leaves.get(p))}
  _check_like(leaves, params, low)
  if low:
    _check_projected(settings, next(iter(low)), context)
  return Call(
    sites=sites,
    updates=updates,
    grads={
      p: s.view.as_stack(leaves[p]) for p, s in sites.items() if p not in low
    },
    low=low,
    params=params,
    context=context._replace(step=state.step, active=active),
    extra_args=others,
  )


def needs_all(
  settings: Settings, context: context_lib.UpdateContext
) -> str | None:
  """What of the settings needs whole gradients; None if nothing does."""
  if settings.residual:
    return (
      f"residual={settings.residual.method!r} (instead of None) adds what the "
      "bases leave out"
    )
  if settings.refresh.finder != "subspace":
    return (
      f"bases are found by finder={settings.refresh.finder!r} (instead of "
      "'subspace')"
    )
  if settings.refresh.random_from is not None:
    return "bases are drawn at random (`random_from`)"
  if context.weights is not None or context.basis_grads is not None:
    return "the optimizer around GaLore (`gum` or `ldadam`) uses more of it"
  return None


def _check_projected(
  settings: Settings, path: str, context: context_lib.UpdateContext
) -> None:
  """Raises where a projected gradient is not enough."""
  reason = needs_all(settings, context)
  if reason is not None:
    raise ValueError(
      f"The gradient of the leaf {path!r} is projected, but {reason}, which "
      "needs the whole gradient. Take it with jax.value_and_grad, or give "
      "`galore` another setting there."
    )


def _is_low(site: plan_lib.Site, leaf: Any) -> bool:
  """Whether the gradient of a leaf is projected: its shape tells."""
  if leaf is None:
    return False
  return jnp.shape(leaf) == site.low_shape != site.view.shape


def _check_like(
  leaves: Mapping[str, Any],
  params: optax.Params | None,
  low: Mapping[str, Any],
) -> None:
  """Raises where gradients and parameters differ in structure or shape.

  Args:
    leaves: Path to gradient.
    params: The parameters.
    low: Path to gradient, for those that are projected.
  """
  if params is None:
    return
  paths.check_arrays(paths.leaves_by_path(params), plan_lib.AT_ARRAYS)
  shapes = {p: jnp.shape(x) for p, x in paths.leaves_by_path(params).items()}
  given = {path: jnp.shape(x) for path, x in leaves.items()}
  for path in {**shapes, **given}:
    if path not in low and given.get(path) != shapes.get(path):
      say = lambda shape: "is missing" if shape is None else f"is {shape}"
      raise ValueError(
        f"The leaf {path!r} {say(shapes.get(path))} in `params` but "
        f"{say(given.get(path))} in the gradients (`updates`). Both must have "
        "the same leaves and shapes."
      )
