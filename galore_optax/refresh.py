"""When a basis is found anew: the only loops and branches over slices."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_optax import layout, plan, projector, qarray, schedule

POLICIES = ("staggered", "synchronous", "adaptive")
MOMENTS = ("rotate", "keep", "reset")


@dataclasses.dataclass(frozen=True)
class Refresh:
  """What is done at a refresh, and when.

  Attributes:
    policy: `synchronous` refreshes all matrices at the steps 0, T, 2T, ...;
      `staggered` does so at step 0 only, and from then on takes one matrix
      after the other, spread evenly over the gap; `adaptive` starts like
      that and doubles the gap of matrices whose subspace stays.
    method: How a basis is found, see :func:`galore_optax.projector.find_basis`.
    moments: What becomes of the moments, see :func:`galore_optax.galore`.
    iterations: Iterations of a refresh, possibly traced.
  """

  policy: str
  method: str
  moments: str
  iterations: Any
  adaptive: schedule.Adaptive


@dataclasses.dataclass(frozen=True)
class Moment:
  """Where in the life of a state an update takes place.

  Attributes:
    step: Updates so far, int32 scalar.
    layer: Number of the layer of which a single one is updated, 0 otherwise.
    layers: Number of all layers then, 1 otherwise.
    active: Whether bases may be refreshed at all; a traced bool or True.
  """

  step: Any
  layer: Any = 0
  layers: Any = 1
  active: Any = True

  @property
  def single(self) -> bool:
    """Whether a single layer is updated."""
    return not isinstance(self.layers, int)

  def number(self, group: "_Group") -> Any:
    """Number of a group's first matrix, as if all layers were one stack."""
    return group.first * self.layers + self.layer * sum(group.counts)


@dataclasses.dataclass(frozen=True)
class _Group:
  """Leaves whose refresh is one and the same computation.

  One compiled body serves a group, which keeps compile time flat in the number
  of layers. Only leaves of one name, but for the numbers in it, share a body:
  they can be expected to be sharded alike.
  """

  members: tuple[plan.Site, ...]
  first: int  # number of the first matrix

  @property
  def counts(self) -> list[int]:
    """Number of matrices of each member."""
    return [site.view.count for site in self.members]

  @property
  def places(self) -> tuple[np.ndarray, np.ndarray]:
    """Of each matrix in the group, its member and its number there."""
    members = np.repeat(np.arange(len(self.counts)), self.counts)
    numbers = np.concatenate([np.arange(count) for count in self.counts])
    return members.astype(np.int32), numbers.astype(np.int32)


# What a refresh changes of a leaf: its bases by side, its moments by place,
# and its schedule where that adapts.
_Slot = tuple[Mapping[str, Any], Mapping[str, Any], schedule.State | None]


def refresh(
  how: Refresh,
  sites: Mapping[str, plan.Site],
  now: Moment,
  grads: Mapping[str, jax.Array],
  bases: Mapping[str, Mapping[str, Any]],
  schedules: Mapping[str, schedule.State],
  inner_state: Any,
) -> tuple[dict, dict, Any]:
  """Finds the bases that are due anew, and carries their moments over.

  Args:
    how: What to do, and when.
    sites: Path to site.
    now: The step, and which layer this is.
    grads: Path to gradients (..., m, n).
    bases: Path to side to basis as it is kept.
    schedules: Path to schedule, empty unless the policy is `adaptive`.
    inner_state: The inner optimizer's state as it is kept.

  Returns:
    The new bases, schedules and inner state.
  """
  if how.method == "random":
    return _redraw(sites, now, bases), dict(schedules), inner_state
  found = {} if how.moments == "keep" else layout.moments(inner_state)
  orders = {place: order for place, (order, _) in found.items()}
  slots = {
    path: (bases[path], _moments_of(site, found), schedules.get(path))
    for path, site in sites.items()
  }
  new: dict[str, _Slot] = {}
  units = sum(site.view.count for site in sites.values()) * now.layers
  for group in _groups(sites, slots, grads, apart=now.single):
    names = [site.path for site in group.members]
    changed = _refresh_group(
      how,
      now,
      units,
      group,
      orders,
      [grads[path] for path in names],
      [slots[path] for path in names],
    )
    new |= dict(zip(names, changed, strict=True))
  moments = {
    place: {p: slot[1][place] for p, slot in new.items() if place in slot[1]}
    for place in found
  }
  return (
    {path: dict(new[path][0]) for path in bases},
    {path: new[path][2] for path in schedules},
    layout.update_low(inner_state, moments),
  )


def _redraw(
  sites: Mapping[str, plan.Site],
  now: Moment,
  bases: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
  """Random projections, new ones at the steps T, 2T, ...

  That takes no time, so that there is no need to take turns; and moments are
  left as they are, for two projections have next to nothing in common.
  """

  def due(gap: Any) -> jax.Array:
    gap = jnp.maximum(jnp.asarray(gap).astype(jnp.int32), 1)
    return (now.step > 0) & (now.step % gap == 0) & now.active

  return {
    path: {
      side: basis.renewed(due(sites[path].gap)) for side, basis in kept.items()
    }
    for path, kept in bases.items()
  }


def _moments_of(
  site: plan.Site, found: Mapping[str, tuple[int, layout.Split]]
) -> dict[str, Any]:
  """The moments of a leaf that have its projected gradient's shape."""
  return {
    place: tree.low[site.path]
    for place, (_, tree) in found.items()
    if site.path in tree.low and tree.low[site.path].shape == site.low_shape
  }


def _groups(
  sites: Mapping[str, plan.Site],
  slots: Mapping[str, _Slot],
  grads: Mapping[str, jax.Array],
  apart: bool,
) -> list[_Group]:
  """The sites in groups, in the order in which their matrices are numbered.

  Apart, every leaf is a group of its own in that order: of a single layer, a
  leaf's matrices have successive numbers, but those of two leaves do not.
  """
  members: dict[Any, list[plan.Site]] = {}
  for path, site in sites.items():
    gap = site.gap if isinstance(site.gap, int | float) else id(site.gap)
    dtypes = [x.dtype.name for x in jax.tree.leaves(slots[path])]
    key = (
      re.sub(r"\d+", "#", path),
      (site.view.m, site.view.n, site.rank, site.sides, gap),
      (grads[path].dtype.name, *slots[path][1], *dtypes),
    )
    members.setdefault(key, []).append(site)
  groups, first = [], 0
  found = list(members.values())
  for group in [[site] for x in found for site in x] if apart else found:
    groups.append(_Group(tuple(group), first))
    first += sum(groups[-1].counts)
  return groups


def due(
  policy: str, step: jax.Array, gap: Any, first: int, count: int, units: int
) -> tuple[jax.Array, jax.Array]:
  r"""The matrices of a group that are due at a step.

  Matrices are numbered through all groups. At step 0 all are due. After that,
  staggered, matrix i of N is due at :math:`t \equiv \lfloor i T / N \rfloor
  \pmod T`: at most :math:`\lceil N / T \rceil` matrices at any step.

  Args:
    policy: `staggered` or `synchronous`.
    step: Steps so far, int32 scalar.
    gap: Steps between two refreshes T.
    first: Number of the group's first matrix.
    count: Number of the group's matrices.
    units: Number of all matrices N.

  Returns:
    First matrix due, and the one after the last, counted within the group;
    int32 scalars.

  Example:
    Two groups of three matrices, T = 6: at step 3 it is the fourth's turn, the
    second group's first.

    >>> low, high = due("staggered", jnp.int32(3), 6, first=3, count=3, units=6)
    >>> int(low), int(high)
    (0, 1)
  """
  gap = jnp.maximum(jnp.asarray(gap).astype(jnp.int32), 1)
  phase = step % gap
  if policy == "synchronous":
    low, high = 0, jnp.where(phase == 0, units, 0)
  else:
    low = jnp.where(step == 0, 0, _ceil_div(phase * units, gap))
    high = jnp.where(step == 0, units, _ceil_div((phase + 1) * units, gap))
  low, high = (jnp.clip(unit - first, 0, count) for unit in (low, high))
  return low, high


def _ceil_div(a: Any, b: Any) -> Any:
  return -(-a // b)


def _refresh_group(
  how: Refresh,
  now: Moment,
  units: Any,
  group: _Group,
  orders: Mapping[str, int],
  grads: list[jax.Array],
  slots: list[_Slot],
) -> list[_Slot]:
  """Refreshes the matrices of a group that are due.

  Matrices are walked by a loop, whatever their number: batched factorisations
  hang on CPU, and whole stacks go through the branches to be updated in place.
  """
  # A basis is a constant of differentiation, as it is between refreshes.
  grads = [_flat(jax.lax.stop_gradient(g)) for g in grads]
  flat = [_flat_slot(slot) for slot in slots]
  low, high, order = _due(how, now, units, group, flat)

  def one(k: jax.Array, flat: list[_Slot]) -> list[_Slot]:
    unit = k if order is None else _take(order, k)
    member, i = (_take(jnp.asarray(x), unit) for x in group.places)
    g, slot = _read(grads, flat, member, i)
    gap = group.members[0].gap
    number = schedule.Number(now.number(group) + unit, units)
    new = _refresh_one(how, now.step, number, gap, g, slot, orders)
    return _write(flat, member, i, new)

  flat = jax.lax.cond(
    low < high,
    lambda flat: jax.lax.fori_loop(low, high, one, flat),
    lambda flat: flat,
    flat,
  )
  return jax.tree.map(lambda x, like: x.reshape(like.shape), flat, slots)


def _due(
  how: Refresh, now: Moment, units: Any, group: _Group, slots: list[_Slot]
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Which matrices of a group are due: from, to, and in which order."""
  count = sum(group.counts)
  if how.policy != "adaptive":
    gap, first = group.members[0].gap, now.number(group)
    low, high = due(how.policy, now.step, gap, first, count, units)
    return low, jnp.where(now.active, high, low), None
  schedules = [when for _, _, when in slots if when is not None]
  hit = jnp.concatenate([when.due(now.step) for when in schedules])
  order = jnp.argsort(~hit, stable=True).astype(jnp.int32)
  return jnp.int32(0), jnp.where(now.active, hit.sum(dtype=jnp.int32), 0), order


def _refresh_one(
  how: Refresh,
  step: jax.Array,
  number: schedule.Number,
  gap: Any,
  g: jax.Array,
  slot: _Slot,
  orders: Mapping[str, int],
) -> _Slot:
  """The slot of one matrix, refreshed."""
  kept, moments, when = slot
  iterations = jnp.asarray(how.iterations).astype(jnp.int32)
  old = jax.lax.stop_gradient(projector.read(kept))
  new = {
    side: _FIND[how.method, side](g, basis, iterations)
    for side, basis in old.items()
  }
  written = projector.write(new, kept)
  turn = projector.overlap(projector.read(written), old)
  turned = {
    place: _carry_over(how, moment, turn, orders[place])
    for place, moment in moments.items()
  }
  if when is not None:
    similarity = schedule.similarity(how.adaptive.measure, new, old, turn)
    largest = jnp.max(jnp.abs(g))
    told = jnp.isfinite(largest) & (largest > 0)
    when = when.refreshed(how.adaptive, step, number, gap, similarity, told)
  return written, turned, when


def _read(
  grads: list[jax.Array], slots: list[_Slot], member: jax.Array, i: jax.Array
) -> tuple[jax.Array, _Slot]:
  """Matrix i of a member: its gradient and slot."""
  take = lambda k: jax.tree.map(
    lambda stack: _take(stack, i), (grads[k], slots[k])
  )
  if len(grads) == 1:
    return take(0)
  return jax.lax.switch(
    member, [functools.partial(take, k) for k in range(len(grads))]
  )


def _write(
  slots: list[_Slot], member: jax.Array, i: jax.Array, new: _Slot
) -> list[_Slot]:
  """The slots with matrix i of a member replaced."""
  put = lambda slot: jax.tree.map(lambda x, y: _put(x, y, i), slot, new)
  if len(slots) == 1:
    return [put(slots[0])]
  return [
    jax.lax.cond(member == k, put, lambda slot: slot, slot)
    for k, slot in enumerate(slots)
  ]


def _take(stack: jax.Array, i: jax.Array) -> jax.Array:
  """Matrix i of a stack."""
  if len(stack) == 1:
    return stack[0]
  return jax.lax.dynamic_index_in_dim(
    stack, i, keepdims=False, allow_negative_indices=False
  )


def _put(stack: jax.Array, x: jax.Array, i: jax.Array) -> jax.Array:
  """A stack with matrix i replaced."""
  if len(stack) == 1:
    return x[None]
  return jax.lax.dynamic_update_index_in_dim(
    stack, x, i, 0, allow_negative_indices=False
  )


def _carry_over(
  how: Refresh, moment: Any, turn: projector.Bases, order: int
) -> Any:
  if how.moments == "reset":
    return jax.tree.map(jnp.zeros_like, moment)
  if not qarray.is_quantized(moment):
    return projector.rotate(moment, turn, order)
  turned = projector.rotate(qarray.dequantize(moment), turn, order)
  return qarray.requantize(moment, turned)


def _flat(stack: jax.Array) -> jax.Array:
  """A stack of matrices with one stack axis."""
  return stack.reshape(-1, *stack.shape[-2:])


def _flat_slot(slot: _Slot) -> _Slot:
  bases, moments, when = slot
  bases, moments = jax.tree.map(_flat, (bases, moments))
  return bases, moments, None if when is None else when.flat()


def _finder(method: str, side: str) -> Any:
  """`find_basis` that never becomes a batched factorisation under `vmap`."""

  @jax.custom_batching.sequential_vmap
  def find(grad, old, iterations):
    return projector.find_basis(grad, old, side, method, iterations)

  return find


_FIND = {
  (method, side): _finder(method, side)
  for method in projector.METHODS
  for side in ("left", "right")
}
