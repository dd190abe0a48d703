"""The update: refreshes the bases that are due, then makes a step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax

from galore_optax.projected import probe as probe_lib
from galore_optax.subspace import due, moments, projection
from galore_optax.subspace import refresh as refresh_lib
from galore_optax.subspace.refresh_matrix import Found
from galore_optax.transform import axis_names, step
from galore_optax.transform import call as call_lib
from galore_optax.transform.call import Call
from galore_optax.transform.settings import Settings
from galore_optax.transform.state import GaLoreState
from galore_optax.tree import split


def update(
  settings: Settings,
  /,
  updates: optax.Updates,
  state: GaLoreState,
  params: optax.Params | None = None,
  **extra_args: Any,
) -> tuple[optax.Updates, GaLoreState]:
  """Refreshes the bases that are due, projects, updates and lifts."""
  call = call_lib.make(settings, updates, state, params, extra_args)
  state = _refresh(settings, call, state, call.grads)
  bases = {path: projection.read(state.projector[path]) for path in call.sites}
  low = step.project(settings, call, bases)
  if settings.accumulation_steps == 1:
    return step.step(settings, call, bases, low, state)
  return step.accumulate(settings, call, bases, low, state)


def describe(
  settings: Settings,
  updates: optax.Updates,
  state: GaLoreState,
  params: optax.Params | None,
  extra_args: Mapping[str, Any],
) -> probe_lib.Described:
  """What a backward pass needs for projecting gradients, at this step."""
  plain = axis_names.without_names(state)
  call = call_lib.make(settings, updates, plain, params, extra_args)
  if call.context.probe.active is not None:
    active = call.context.active & call.context.probe.active
    context = call.context._replace(active=active)
    call = dataclasses.replace(call, context=context)
  reason = call_lib.needs_all(settings, call.context)
  if reason is not None:
    raise ValueError(
      f"Gradients of rank r are not enough here: {reason}, which needs the "
      "whole gradient. Take it with jax.value_and_grad, or give `galore` "
      "another setting there."
    )

  def refreshed(found: Mapping[str, Any], is_taken: Any) -> GaLoreState:
    bases = {path: Found(x.bases, x.valid) for path, x in found.items()}
    active = call.context.active & is_taken
    context = call.context._replace(active=active)
    here = dataclasses.replace(call, context=context)
    return axis_names.with_names_of(
      state, _refresh(settings, here, plain, bases)
    )

  return probe_lib.Described(
    state.step,
    call.sites,
    plain.projector,
    due.by_leaf(
      settings.refresh, call.sites, call.context, plain.schedule or {}
    ),
    settings.refresh.iterations,
    refreshed,
  )


def _refresh(
  settings: Settings, call: Call, state: GaLoreState, grads: Mapping[str, Any]
) -> GaLoreState:
  """The state with the bases that are due found, and moments carried over.

  Args:
    settings: The settings.
    call: The call.
    state: The state.
    grads: As for :func:`galore_optax.subspace.refresh.refresh`.
  """
  bases, schedules, inner_state = refresh_lib.refresh(
    settings.refresh,
    settings.seed,
    call.sites,
    call.context,
    {**grads, **(call.context.basis_grads or {})},
    state.projector,
    state.schedule or {},
    state.inner_state,
    _bias_ratios(settings, call, state),
  )
  return state._replace(
    projector=bases,
    inner_state=inner_state,
    schedule=state.schedule and schedules,
  )


def _bias_ratios(
  settings: Settings, call: Call, state: GaLoreState
) -> dict[str, jax.Array]:
  """The bias corrections that LDAdam's rotation of second moments needs."""
  if settings.refresh.moments != "ldadam":
    return {}
  inner_state = split.merge_state(settings.inner, state.inner_state)
  return moments.bias_ratios(
    settings.inner, inner_state, call.updates, call.params, call.extra_args
  )
