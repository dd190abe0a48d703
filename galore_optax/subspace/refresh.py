"""When a basis is found anew: the only loops and branches over slices."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.quantization import qarray
from galore_optax.subspace import adaptive as adaptive_lib
from galore_optax.subspace import find as find_lib
from galore_optax.subspace import moments as moments_lib
from galore_optax.subspace import projection, refresh_groups
from galore_optax.tree import plan, slices, split

POLICIES = ("staggered", "synchronous", "adaptive")
MOMENTS = ("rotate", "keep", "reset", "ldadam")

# What a refresh changes, by the path of the leaf.
_Slots = dict[str, refresh_groups.Slot]

_LATE = 0x676F6C6F  # keeps late bases apart from the seed's other uses


@dataclasses.dataclass(frozen=True)
class Refresh:
  """What is done at a refresh, and when.

  Attributes:
    policy: `synchronous` refreshes all matrices at the steps 0, T, 2T, ...;
      `staggered` does so at step 0 only, and from then on takes one matrix
      after the other, spread evenly over the gap; `adaptive` starts like
      that and doubles the gap of matrices whose subspace stays.
    method: How a basis is found, see
      :func:`galore_optax.subspace.find.find_basis`.
    moments: What becomes of the moments, see :func:`galore_optax.galore`.
    iterations: Iterations of a refresh, possibly traced.
    share: Whether leaves share a compiled refresh, see
      :class:`galore_optax.subspace.refresh_groups.Group`.
    random_from: Step from which on bases are drawn at random, possibly traced;
      None for never. Second moments then stay as they are.
    seed: Seed of these.
  """

  policy: str
  method: str
  moments: str
  iterations: Any
  adaptive: adaptive_lib.Adaptive
  share: bool = True
  random_from: Any = None
  seed: Any = 0


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


def check_gaps(how: Refresh, sites: Mapping[str, plan.Site]) -> None:
  """Raises where the turns of matrices cannot be counted in int32.

  Args:
    how: What to do, and when.
    sites: Path to site.
  """
  units = sum(site.view.count for site in sites.values())
  for path, site in sites.items():
    if how.policy != "staggered" or isinstance(site.gap, jax.core.Tracer):
      continue
    if float(site.gap) * units >= 2**31:
      raise ValueError(
        f"At the leaf {path!r}: with {units} matrices that take turns "
        f"`update_proj_gap` can be at most {(2**31 - 1) // units}, got "
        f'{site.gap}. With refresh="synchronous" there is no limit.'
      )


def refresh(
  how: Refresh,
  sites: Mapping[str, plan.Site],
  now: Moment,
  grads: Mapping[str, jax.Array],
  bases: Mapping[str, Mapping[str, Any]],
  schedules: Mapping[str, adaptive_lib.State],
  inner_state: Any,
  ratios: Mapping[str, Any] | None = None,
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
    ratios: Place of a second moment to what
      :mod:`galore_optax.subspace.moments` has for it, where moments
      are carried over in LDAdam's way.

  Returns:
    The new bases, schedules and inner state.
  """
  if how.method == "random":
    return _redraw(sites, now, bases), dict(schedules), inner_state
  found = {
    place: moment
    for place, moment in moments_lib.find_moments(inner_state).items()
    if how.moments != "keep" or moments_lib.is_pending_sum(place)
  }
  ratios = ratios or {}
  orders = {p: (order, ratios.get(p)) for p, (order, _) in found.items()}
  slots = {
    path: (bases[path], _moments_of(site, found), schedules.get(path))
    for path, site in sites.items()
  }
  new: _Slots = {}
  units = sum(site.view.count for site in sites.values()) * now.layers
  for group in refresh_groups.group(
    sites, slots, grads, share=how.share, by_gradient=how.method == "svd"
  ):
    new |= _refresh_group(how, now, units, group, orders, grads, slots)
  moments = {
    place: {p: slot[1][place] for p, slot in new.items() if place in slot[1]}
    for place in found
  }
  return (
    {path: dict(new[path][0]) for path in bases},
    {path: new[path][2] for path in schedules},
    moments_lib.replace_moments(inner_state, moments),
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
  site: plan.Site, found: Mapping[str, tuple[int, split.Split]]
) -> dict[str, Any]:
  """The moments of a leaf that have its projected gradient's shape."""
  return {
    place: tree.low[site.path]
    for place, (_, tree) in found.items()
    if site.path in tree.low and tree.low[site.path].shape == site.low_shape
  }


def due(
  policy: str, step: jax.Array, gap: Any, units: Any
) -> tuple[jax.Array, jax.Array]:
  r"""The matrices that are due at a step.

  At step 0 all are due. After that, staggered, matrix i of N is due at
  :math:`t \equiv \lfloor i T / N \rfloor \pmod T`: at most
  :math:`\lceil N / T \rceil` matrices at any step.

  Args:
    policy: `staggered` or `synchronous`.
    step: Steps so far, int32 scalar.
    gap: Steps between two refreshes T.
    units: Number of all matrices N.

  Returns:
    Number of the first matrix due, and of the one after the last; int32
    scalars.

  Example:
    Of six matrices, T = 6, it is the fourth's turn at step 3.

    >>> low, high = due("staggered", jnp.int32(3), 6, units=6)
    >>> int(low), int(high)
    (3, 4)
  """
  gap = jnp.maximum(jnp.asarray(gap).astype(jnp.int32), 1)
  phase = jax.lax.rem(step, gap)
  units = jnp.asarray(units, jnp.int32)
  if policy == "synchronous":
    return jnp.int32(0), jnp.where(phase == 0, units, 0)
  ceil_div = lambda a: jax.lax.div(a + gap - 1, gap)
  low = jnp.where(step == 0, 0, ceil_div(phase * units))
  high = jnp.where(step == 0, units, ceil_div((phase + 1) * units))
  return low, high


def _refresh_group(
  how: Refresh,
  now: Moment,
  units: Any,
  group: refresh_groups.Group,
  orders: Mapping[str, tuple[int, Any]],
  grads: Mapping[str, jax.Array],
  slots: Mapping[str, refresh_groups.Slot],
) -> _Slots:
  """Refreshes the matrices of a group that are due.

  Matrices are walked by a loop, whatever their number: batched factorisations
  hang on CPU, and whole stacks go through the branches to be updated in place.
  """
  names = [site.path for site in group.members]
  # A basis is a constant of differentiation, as it is between refreshes.
  flat_grads = {p: slices.flat(jax.lax.stop_gradient(grads[p])) for p in names}

  def one(unit: jax.Array, flat: _Slots) -> _Slots:
    number = adaptive_lib.Number(
      slices.take(group.numbers(now.layer, now.layers), unit), units
    )
    place = group.place(unit)
    return _refresh_one(
      how, now, number, group, place, flat_grads, flat, orders
    )

  return _walk(how, now, units, group, one, {p: slots[p] for p in names})


def _walk(
  how: Refresh,
  now: Moment,
  units: Any,
  group: refresh_groups.Group,
  one: Callable,
  slots: _Slots,
) -> _Slots:
  """Calls `one` on the matrices of a group that are due, one after another.

  Stacks are flattened inside of the branch that is taken: what comes out of a
  branch in another shape than its users', those do not write in place.
  """

  def loop(low: Any, high: Any, body: Callable, slots: _Slots) -> _Slots:
    flat = {path: _flat_slot(slot) for path, slot in slots.items()}
    flat = jax.lax.fori_loop(low, high, body, flat)
    return jax.tree.map(lambda x, like: x.reshape(like.shape), flat, slots)

  low, high = due(how.policy, now.step, group.members[0].gap, units)
  numbers = group.numbers(now.layer, now.layers)
  if how.policy != "adaptive" and not now.single:
    # In the order of their numbers, those that are due follow each other.
    low, high = (jnp.sum(numbers < x, dtype=jnp.int32) for x in (low, high))
    return jax.lax.cond(
      (low < high) & now.active,
      functools.partial(loop, low, high, one),
      lambda slots: slots,
      slots,
    )
  if how.policy == "adaptive":
    times = [when.flat() for _, _, when in slots.values() if when is not None]
    hit = jnp.concatenate([when.due(now.step) for when in times])[group.order]
  else:
    hit = (low <= numbers) & (numbers < high)

  def perhaps(unit: jax.Array, flat: _Slots) -> _Slots:
    return jax.lax.cond(
      slices.take(hit, unit),
      lambda flat: one(unit, flat),
      lambda flat: flat,
      flat,
    )

  return jax.lax.cond(
    jnp.any(hit) & now.active,
    functools.partial(loop, 0, group.count, perhaps),
    lambda slots: slots,
    slots,
  )


def _refresh_one(
  how: Refresh,
  now: Moment,
  number: adaptive_lib.Number,
  group: refresh_groups.Group,
  place: refresh_groups.Place,
  grads: Mapping[str, jax.Array],
  flat: _Slots,
  orders: Mapping[str, tuple[int, Any]],
) -> _Slots:
  """The slots of a group with one matrix refreshed."""
  # What the sides are called in all leaves of the group: as in the first.
  sides = group.members[0].sides
  kept, when = slices.take_from(
    [
      (dict(zip(sides, bases.values(), strict=True)), when)
      for bases, _, when in (flat[site.path] for site in group.members)
    ],
    [site.sharded for site in group.members],
    place.member,
    place.index,
  )
  old = jax.lax.stop_gradient(projection.read(kept))
  late = None if how.random_from is None else now.step >= how.random_from
  found = {}
  for k, side in enumerate(sides):
    find = functools.partial(_find, how, k, group, place, grads)
    if late is not None:
      key = _key_of(how.seed, now.step, number.index, k)
      find = functools.partial(_draw_or_find, late, key, find)
    found[side] = find(old[side])
  new = {side: basis for side, (basis, _) in found.items()}
  written = projection.write(new, kept)
  turn = projection.overlap(projection.read(written), old)
  if when is not None:
    similarity = adaptive_lib.similarity(how.adaptive.measure, new, old, turn)
    told = functools.reduce(jnp.logical_and, (x for _, x in found.values()))
    gap = group.members[0].gap
    when = when.refreshed(how.adaptive, now.step, number, gap, similarity, told)
  for k, kind in enumerate(group.kinds):
    as_kind = dict(zip(sides, kind[0].sides, strict=True))
    bases = {as_kind[side]: x for side, x in written.items()}
    turned = {as_kind[side]: x for side, x in turn.items()}
    carry = functools.partial(
      _update_kind, how, kind, place, orders, bases, turned, when, late
    )
    before = [flat[site.path] for site in kind]
    after = (
      carry(before)
      if len(group.kinds) == 1
      else jax.lax.cond(place.kind == k, carry, lambda slots: slots, before)
    )
    flat = flat | {s.path: x for s, x in zip(kind, after, strict=True)}
  return flat


def _key_of(seed: Any, *numbers: Any) -> jax.Array:
  """A random key for each list of numbers, unlike those of start bases."""
  key = jax.random.fold_in(jax.random.key(seed), _LATE)
  for number in numbers:
    key = jax.random.fold_in(key, number)
  return key


def _draw_or_find(
  late: jax.Array, key: jax.Array, find: Callable, old: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """A basis that is drawn where it is late, and found from gradients before."""

  def draw(old: jax.Array) -> tuple[jax.Array, jax.Array]:
    drawn = find_lib.random_basis(key, *old.shape)
    return drawn.astype(old.dtype), jnp.bool_(True)

  return jax.lax.cond(late, draw, find, old)


def _find(
  how: Refresh,
  k: int,
  group: refresh_groups.Group,
  place: refresh_groups.Place,
  grads: Mapping[str, jax.Array],
  old: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The new basis of a matrix on its k-th side, and whether there was one."""

  def with_gradient(f: Callable, basis: jax.Array) -> Any:
    def of_kind(kind: tuple[plan.Site, ...], basis: jax.Array) -> Any:
      g = slices.take_from(
        [grads[site.path] for site in kind],
        [site.sharded for site in kind],
        place.within,
        place.index,
      )
      return f(g, basis, kind[0].sides[k])

    branches = [functools.partial(of_kind, kind) for kind in group.kinds]
    return jax.lax.switch(place.kind, branches, basis)

  if how.method == "svd":
    return with_gradient(find_lib.svd_basis, old)
  iterations = jnp.asarray(how.iterations).astype(jnp.int32)
  return find_lib.iterate(
    lambda basis: with_gradient(find_lib.gram, basis), old, iterations
  )


def _update_kind(
  how: Refresh,
  kind: Sequence[plan.Site],
  place: refresh_groups.Place,
  orders: Mapping[str, tuple[int, Any]],
  bases: Mapping[str, Any],
  turn: projection.Bases,
  when: adaptive_lib.State | None,
  late: jax.Array | None,
  slots: list[refresh_groups.Slot],
) -> list[refresh_groups.Slot]:
  """The slots of a kind with a matrix's basis replaced, its moments turned."""
  spread = [site.sharded for site in kind]
  at = (spread, place.within, place.index)
  old = slices.take_from([moments for _, moments, _ in slots], *at)
  moments = {}
  for where, moment in old.items():
    order, ratio = orders[where]
    if ratio is None:
      reset = how.moments == "reset" and not moments_lib.is_pending_sum(where)
      moments[where] = _carry_over(reset, moment, turn, order, late)
    else:
      mean = old[where.removesuffix("nu") + "mu"]
      moments[where] = moments_lib.rotate_variance(moment, mean, turn, ratio)
  return slices.put_into(slots, *at, (bases, moments, when))


def _carry_over(
  reset: bool,
  moment: Any,
  turn: projection.Bases,
  order: int,
  late: jax.Array | None,
) -> Any:
  if reset:
    return jax.tree.map(jnp.zeros_like, moment)
  coded = qarray.is_quantized(moment)
  old = qarray.dequantize(moment) if coded else moment
  turned = moments_lib.rotate(old, turn, order)
  if late is not None and order == 2:
    turned = jnp.where(late, old, turned)
  return qarray.requantize(moment, turned) if coded else turned


def _flat_slot(slot: refresh_groups.Slot) -> refresh_groups.Slot:
  bases, moments, when = slot
  bases, moments = jax.tree.map(slices.flat, (bases, moments))
  return bases, moments, None if when is None else when.flat()
