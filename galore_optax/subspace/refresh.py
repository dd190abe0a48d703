"""Recomputes the bases that are due and carries moments into them.

The only loops over matrices of a stack are in this module.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.context import UpdateContext
from galore_optax.subspace import adaptive as adaptive_lib
from galore_optax.subspace import due, refresh_groups
from galore_optax.subspace import moments as moments_lib
from galore_optax.subspace.refresh_matrix import Pass, Slots, refresh_matrix
from galore_optax.subspace.refresh_settings import Refresh
from galore_optax.tree import in_place, plan, sharding, slices, split


def refresh(
  settings: Refresh,
  seed: Any,
  sites: Mapping[str, plan.Site],
  context: UpdateContext,
  grads: Mapping[str, jax.Array],
  bases: Mapping[str, Mapping[str, Any]],
  schedules: Mapping[str, adaptive_lib.State],
  inner_state: Any,
  ratios: Mapping[str, Any] | None = None,
) -> tuple[dict, dict, Any]:
  """Recomputes the bases that are due, and carries their moments over.

  Args:
    settings: When and how bases are recomputed; no field that `galore` has a
      default for is None.
    seed: Seed of random bases.
    sites: Path to site.
    context: The step, whether bases may be refreshed, and which layer this is.
    grads: Path to gradients (..., m, n), or to their bases if they are known,
      :class:`galore_optax.subspace.refresh_matrix.Found`. The bases of a leaf
      that is missing stay as they are.
    bases: Path to side to basis, in the state's format.
    schedules: Path to schedule; empty unless the policy is `adaptive`.
    inner_state: The inner optimizer's state as GaLore's state stores it.
    ratios: Path of a second moment in the inner state to its bias ratio, see
      :func:`galore_optax.subspace.moments.bias_ratios`, if moments are carried
      over as LDAdam does.

  Returns:
    The new bases, schedules and inner state.
  """
  if settings.finder == "random":
    return _redraw(sites, context, bases), dict(schedules), inner_state
  found = {
    name: moment
    for name, moment in moments_lib.find_moments(inner_state).items()
    if settings.moments != "keep" or moments_lib.is_pending_sum(name)
  }
  ratios = ratios or {}
  run = Pass(
    settings,
    seed,
    context,
    due.total(sites, context),
    {name: (degree, ratios.get(name)) for name, (degree, _) in found.items()},
  )
  slots = {
    path: (bases[path], _moments_of(site, found), schedules.get(path))
    for path, site in sites.items()
  }
  new: Slots = {}
  for group in refresh_groups.group(
    sites,
    slots,
    grads,
    share=settings.share,
    by_gradient=settings.finder == "svd",
  ):
    new |= _refresh_group(run, group, grads, slots)
  moments = {
    name: {p: slot[1][name] for p, slot in new.items() if name in slot[1]}
    for name in found
  }
  return (
    {path: dict(new.get(path, slots[path])[0]) for path in bases},
    {path: new.get(path, slots[path])[2] for path in schedules},
    moments_lib.replace_moments(inner_state, moments),
  )


def _redraw(
  sites: Mapping[str, plan.Site],
  context: UpdateContext,
  bases: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
  """Random projections, new ones at the steps T, 2T, ...

  Drawing a seed takes no time, so that refreshes need not be staggered. Moments
  stay as they are, because two random projections have little in common.
  """

  def is_due(gap: Any) -> jax.Array:
    gap = jnp.maximum(jnp.asarray(gap).astype(jnp.int32), 1)
    return (context.step > 0) & (context.step % gap == 0) & context.active

  return {
    path: {
      side: basis.renewed(is_due(sites[path].gap))
      for side, basis in by_side.items()
    }
    for path, by_side in bases.items()
  }


def _moments_of(
  site: plan.Site, found: Mapping[str, tuple[int, split.Split]]
) -> dict[str, Any]:
  """The moments of a leaf that have its projected gradient's shape."""
  return {
    name: tree.low[site.path]
    for name, (_, tree) in found.items()
    if site.path in tree.low and tree.low[site.path].shape == site.low_shape
  }


def _refresh_group(
  run: Pass,
  group: refresh_groups.Group,
  grads: Mapping[str, jax.Array],
  slots: Mapping[str, refresh_groups.Slot],
) -> Slots:
  """Refreshes the matrices of a group that are due.

  One after another, however many there are: batched factorizations hang on
  CPU, and whole stacks pass through the loop so that they are updated in place.
  """
  names = [site.path for site in group.members]
  # A basis is a constant of differentiation, as it is between refreshes.
  flat_grads = {
    site.path: _flat(site, jax.lax.stop_gradient(grads[site.path]))
    for site in group.members
  }
  flat_grads, of_group = sharding.vary_together(
    (flat_grads, {p: slots[p] for p in names})
  )

  schedules = {path: slots[path][2] for path in names}
  schedules = {path: x for path, x in schedules.items() if x is not None}
  is_due = due.of_group(run.settings, run.context, run.total, group, schedules)

  def refresh_one(unit: jax.Array, slots: Slots) -> Slots:
    # Stacks are flattened here: a carry that changed its shape outside of the
    # loop would be copied.
    flat = {
      site.path: _flat_slot(site, slots[site.path]) for site in group.members
    }
    flat = refresh_matrix(run, group, unit, flat_grads, flat)
    return jax.tree.map(lambda x, like: x.reshape(like.shape), flat, slots)

  return in_place.update_each(
    is_due & run.context.active, refresh_one, of_group
  )


def _flat_slot(
  site: plan.Site, slot: refresh_groups.Slot
) -> refresh_groups.Slot:
  bases, moments, schedule = slot
  bases, moments = _flat(site, (bases, moments))
  return bases, moments, None if schedule is None else schedule.flat()


def _flat(site: plan.Site, tree: Any) -> Any:
  """A leaf's stacks with one axis that counts matrices or tensors."""
  ndim = len(site.view.stack)
  return jax.tree.map(lambda x: slices.flat(x, ndim), tree)
