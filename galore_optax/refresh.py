"""When a basis is found anew: the only loops and branches over slices."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_optax import layout, plan, projector, qarray, schedule, sharding

POLICIES = ("staggered", "synchronous", "adaptive")
MOMENTS = ("rotate", "keep", "reset", "ldadam")

_LATE = 0x676F6C6F  # keeps late bases apart from the seed's other uses


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
    share: Whether leaves share a compiled refresh, see :class:`_Group`.
    random_from: Step from which on bases are drawn at random, possibly traced;
      None for never. Second moments then stay as they are.
    seed: Seed of these.
  """

  policy: str
  method: str
  moments: str
  iterations: Any
  adaptive: schedule.Adaptive
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


# What a refresh changes of a leaf: its bases by side, its moments by place,
# and its schedule where that adapts.
_Slot = tuple[Mapping[str, Any], Mapping[str, Any], schedule.State | None]


@dataclasses.dataclass(frozen=True)
class _Group:
  """Leaves whose bases are found by one and the same computation.

  Factorisations compile slowly, and are compiled once for all leaves whose
  bases have one form, be they left or right. Products with the gradients and
  the moments are compiled for each kind, the leaves that are alike in these,
  too. On a mesh, leaves of a group have one name, but for the numbers in it:
  they can be expected to be sharded alike.

  Attributes:
    kinds: The leaves by kind.
    first: Number of each leaf's first matrix among all; they are numbered in
      the order of the leaves, whatever the groups.
  """

  kinds: tuple[tuple[plan.Site, ...], ...]
  first: tuple[int, ...]

  @property
  def members(self) -> list[plan.Site]:
    """All leaves."""
    return [site for kind in self.kinds for site in kind]

  @property
  def counts(self) -> list[int]:
    """Number of matrices of each leaf."""
    return [site.view.count for site in self.members]

  @property
  def count(self) -> int:
    """Number of matrices."""
    return sum(self.counts)

  @property
  def order(self) -> np.ndarray:
    """Which of the members' matrices comes first, second, ... by number."""
    starts = np.cumsum([0, *self.counts])
    ranges = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    by_number = sorted(zip(self.first, ranges, strict=True), key=lambda x: x[0])
    return np.concatenate([x for _, x in by_number]).astype(np.int32)

  def numbers(self, now: Moment) -> jax.Array:
    """The matrices' numbers in order, as if a leaf's layers were one stack."""
    return jnp.concatenate(
      [
        first * now.layers + now.layer * count + jnp.arange(count)
        for first, count in sorted(zip(self.first, self.counts, strict=True))
      ]
    ).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where a matrix of a group is.

  Attributes:
    member: Number of its leaf.
    kind: Number of the leaf's kind.
    within: Number of the leaf in its kind.
    index: Number of the matrix in its leaf.
  """

  member: jax.Array
  kind: jax.Array
  within: jax.Array
  index: jax.Array


def refresh(
  how: Refresh,
  sites: Mapping[str, plan.Site],
  now: Moment,
  grads: Mapping[str, jax.Array],
  bases: Mapping[str, Mapping[str, Any]],
  schedules: Mapping[str, schedule.State],
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
    ratios: Place of a second moment to what :mod:`galore_optax.reproject` has
      for it, where moments are carried over in LDAdam's way.

  Returns:
    The new bases, schedules and inner state.
  """
  if how.method == "random":
    return _redraw(sites, now, bases), dict(schedules), inner_state
  found = {} if how.moments == "keep" else layout.moments(inner_state)
  ratios = ratios or {}
  orders = {p: (order, ratios.get(p)) for p, (order, _) in found.items()}
  slots = {
    path: (bases[path], _moments_of(site, found), schedules.get(path))
    for path, site in sites.items()
  }
  new: dict[str, _Slot] = {}
  units = sum(site.view.count for site in sites.values()) * now.layers
  for group in _groups(how, sites, slots, grads):
    new |= _refresh_group(how, now, units, group, orders, grads, slots)
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
  how: Refresh,
  sites: Mapping[str, plan.Site],
  slots: Mapping[str, _Slot],
  grads: Mapping[str, jax.Array],
) -> list[_Group]:
  """The sites in groups."""
  found: dict[Any, dict[Any, list[tuple[plan.Site, int]]]] = {}
  first = 0
  for path, site in sites.items():
    bases, moments, _ = slots[path]
    gap = site.gap if isinstance(site.gap, int | float) else id(site.gap)
    name = re.sub(r"\d+", "#", path) if sharding.on_mesh(grads[path]) else None
    kind = (
      site.sides,
      site.spread,
      _form(site, (grads[path], moments)),
      *moments,
    )
    # An exact decomposition is made of the gradient itself.
    alike = kind if how.method == "svd" else len(site.sides)
    alone = None if how.share else path
    key = (name, gap, alike, alone, _form(site, list(bases.values())))
    found.setdefault(key, {}).setdefault(kind, []).append((site, first))
    first += site.view.count
  return [
    _Group(
      tuple(tuple(site for site, _ in kind) for kind in kinds.values()),
      tuple(first for kind in kinds.values() for _, first in kind),
    )
    for kinds in found.values()
  ]


def _form(site: plan.Site, tree: Any) -> tuple:
  """What the arrays of one matrix look like."""
  stack = len(site.view.stack)
  return tuple((x.dtype.name, x.shape[stack:]) for x in jax.tree.leaves(tree))


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
  group: _Group,
  orders: Mapping[str, tuple[int, Any]],
  grads: Mapping[str, jax.Array],
  slots: Mapping[str, _Slot],
) -> dict[str, _Slot]:
  """Refreshes the matrices of a group that are due.

  Matrices are walked by a loop, whatever their number: batched factorisations
  hang on CPU, and whole stacks go through the branches to be updated in place.
  """
  names = [site.path for site in group.members]
  # A basis is a constant of differentiation, as it is between refreshes.
  flat_grads = {p: _flat(jax.lax.stop_gradient(grads[p])) for p in names}
  flat = {path: _flat_slot(slots[path]) for path in names}

  def one(unit: jax.Array, flat: dict[str, _Slot]) -> dict[str, _Slot]:
    number = schedule.Number(_take(group.numbers(now), unit), units)
    place = _place(group, unit)
    return _refresh_one(
      how, now, number, group, place, flat_grads, flat, orders
    )

  flat = _walk(how, now, units, group, one, flat)
  return {
    path: jax.tree.map(lambda x, like: x.reshape(like.shape), x, slots[path])
    for path, x in flat.items()
  }


def _walk(
  how: Refresh,
  now: Moment,
  units: Any,
  group: _Group,
  one: Callable,
  flat: dict[str, _Slot],
) -> dict[str, _Slot]:
  """Calls `one` on the matrices of a group that are due, one after another."""
  low, high = due(how.policy, now.step, group.members[0].gap, units)
  numbers = group.numbers(now)
  if how.policy != "adaptive" and not now.single:
    # In the order of their numbers, those that are due follow each other.
    low, high = (jnp.sum(numbers < x, dtype=jnp.int32) for x in (low, high))
    return jax.lax.cond(
      (low < high) & now.active,
      lambda flat: jax.lax.fori_loop(low, high, one, flat),
      lambda flat: flat,
      flat,
    )
  if how.policy == "adaptive":
    times = [when for _, _, when in flat.values() if when is not None]
    hit = jnp.concatenate([when.due(now.step) for when in times])[group.order]
  else:
    hit = (low <= numbers) & (numbers < high)

  def perhaps(unit: jax.Array, flat: dict[str, _Slot]) -> dict[str, _Slot]:
    return jax.lax.cond(
      _take(hit, unit), lambda flat: one(unit, flat), lambda flat: flat, flat
    )

  return jax.lax.cond(
    jnp.any(hit) & now.active,
    lambda flat: jax.lax.fori_loop(0, group.count, perhaps, flat),
    lambda flat: flat,
    flat,
  )


def _place(group: _Group, unit: jax.Array) -> _Place:
  """Where a matrix is, of which it is told the how many-th it is by number."""

  def look_up(of_matrix: Any) -> jax.Array:
    told = np.asarray(of_matrix)[group.order].astype(np.int32)
    return jnp.int32(0) if not told.any() else _take(jnp.asarray(told), unit)

  of_leaf = lambda x: look_up(np.repeat(x, group.counts))
  sizes = [len(kind) for kind in group.kinds]
  return _Place(
    member=of_leaf(np.arange(len(group.members))),
    kind=of_leaf(np.repeat(np.arange(len(sizes)), sizes)),
    within=of_leaf(np.concatenate([np.arange(size) for size in sizes])),
    index=look_up(np.concatenate([np.arange(n) for n in group.counts])),
  )


def _refresh_one(
  how: Refresh,
  now: Moment,
  number: schedule.Number,
  group: _Group,
  place: _Place,
  grads: Mapping[str, jax.Array],
  flat: dict[str, _Slot],
  orders: Mapping[str, tuple[int, Any]],
) -> dict[str, _Slot]:
  """The slots of a group with one matrix refreshed."""
  # What the sides are called in all leaves of the group: as in the first.
  sides = group.members[0].sides
  kept, when = _read(
    [
      (dict(zip(sides, bases.values(), strict=True)), when)
      for bases, _, when in (flat[site.path] for site in group.members)
    ],
    group.members,
    place.member,
    place.index,
  )
  old = jax.lax.stop_gradient(projector.read(kept))
  late = None if how.random_from is None else now.step >= how.random_from
  found = {}
  for k, side in enumerate(sides):
    find = functools.partial(_find, how, k, group, place, grads)
    if late is not None:
      key = _key_of(how.seed, now.step, number.index, k)
      find = functools.partial(_draw_or_find, late, key, find)
    found[side] = find(old[side])
  new = {side: basis for side, (basis, _) in found.items()}
  written = projector.write(new, kept)
  turn = projector.overlap(projector.read(written), old)
  if when is not None:
    similarity = schedule.similarity(how.adaptive.measure, new, old, turn)
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
    drawn = projector.random_basis(key, *old.shape)
    return drawn.astype(old.dtype), jnp.bool_(True)

  return jax.lax.cond(late, draw, find, old)


def _find(
  how: Refresh,
  k: int,
  group: _Group,
  place: _Place,
  grads: Mapping[str, jax.Array],
  old: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The new basis of a matrix on its k-th side, and whether there was one."""

  def with_gradient(f: Callable, basis: jax.Array) -> Any:
    def of_kind(kind: tuple[plan.Site, ...], basis: jax.Array) -> Any:
      stacks = [grads[site.path] for site in kind]
      g = _read(stacks, kind, place.within, place.index)
      return f(g, basis, kind[0].sides[k])

    branches = [functools.partial(of_kind, kind) for kind in group.kinds]
    return jax.lax.switch(place.kind, branches, basis)

  if how.method == "svd":
    return with_gradient(projector.svd_basis, old)
  iterations = jnp.asarray(how.iterations).astype(jnp.int32)
  return projector.iterate(
    lambda basis: with_gradient(projector.gram, basis), old, iterations
  )


def _update_kind(
  how: Refresh,
  kind: Sequence[plan.Site],
  place: _Place,
  orders: Mapping[str, tuple[int, Any]],
  bases: Mapping[str, Any],
  turn: projector.Bases,
  when: schedule.State | None,
  late: jax.Array | None,
  slots: list[_Slot],
) -> list[_Slot]:
  """The slots of a kind with a matrix's basis replaced, its moments turned."""
  stacks = [moments for _, moments, _ in slots]
  old = _read(stacks, kind, place.within, place.index)
  moments = {}
  for where, moment in old.items():
    order, ratio = orders[where]
    if ratio is None:
      moments[where] = _carry_over(how, moment, turn, order, late)
    else:
      mean = old[where.removesuffix("nu") + "mu"]
      moments[where] = projector.rotate_variance(moment, mean, turn, ratio)
  new = (bases, moments, when)
  return _write(slots, kind, place.within, place.index, new)


def _read(
  stacks: list[Any],
  sites: Sequence[plan.Site],
  member: jax.Array,
  i: jax.Array,
) -> Any:
  """Matrix i of a member's stack."""

  def take(stack: Any, spread: bool) -> Any:
    return jax.tree.map(lambda x: (_gather if spread else _take)(x, i), stack)

  return jax.lax.switch(
    member,
    [
      functools.partial(take, stack, site.spread)
      for stack, site in zip(stacks, sites, strict=True)
    ],
  )


def _write(
  slots: list[_Slot],
  sites: Sequence[plan.Site],
  member: jax.Array,
  i: jax.Array,
  new: _Slot,
) -> list[_Slot]:
  """The slots with matrix i of a member replaced."""

  def put(slot: _Slot, spread: bool) -> _Slot:
    place = _scatter if spread else _put
    return jax.tree.map(lambda x, y: place(x, y, i), slot, new)

  if len(slots) == 1:
    return [put(slots[0], sites[0].spread)]
  # One branch for each, which updates in place; and counting down instead of
  # comparing with a number makes their kernels equal, so that one is compiled.
  done = []
  for slot, site in zip(slots, sites, strict=True):
    change = functools.partial(put, spread=site.spread)
    member, slot = jax.lax.cond(
      member == 0,
      lambda left, slot, change=change: (left - 1, change(slot)),
      lambda left, slot: (left - 1, slot),
      member,
      slot,
    )
    done.append(slot)
  return done


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


def _gather(stack: jax.Array, i: jax.Array) -> jax.Array:
  """Matrix i of a stack that is divided among devices.

  An index would make the compiler gather the stack; a sum in which all other
  matrices count as zero is reduced where they are.
  """
  wide = jnp.promote_types(stack.dtype, jnp.int32)
  kept = jnp.where(_is(i, stack), stack, jnp.zeros_like(stack))
  return jnp.sum(kept.astype(wide), axis=0, dtype=wide).astype(stack.dtype)


def _scatter(stack: jax.Array, x: jax.Array, i: jax.Array) -> jax.Array:
  """A stack that is divided among devices, with matrix i replaced."""
  return jnp.where(_is(i, stack), x[None], stack)


def _is(i: jax.Array, stack: jax.Array) -> jax.Array:
  """Which matrix of a stack is number i, to broadcast against the stack."""
  number = jax.lax.broadcasted_iota(
    jnp.int32, (len(stack), *(1,) * (stack.ndim - 1)), 0
  )
  return number == i


def _carry_over(
  how: Refresh,
  moment: Any,
  turn: projector.Bases,
  order: int,
  late: jax.Array | None,
) -> Any:
  if how.moments == "reset":
    return jax.tree.map(jnp.zeros_like, moment)
  coded = qarray.is_quantized(moment)
  old = qarray.dequantize(moment) if coded else moment
  turned = projector.rotate(old, turn, order)
  if late is not None and order == 2:
    turned = jnp.where(late, old, turned)
  return qarray.requantize(moment, turned) if coded else turned


def _flat(stack: jax.Array) -> jax.Array:
  """A stack of matrices with one stack axis."""
  return stack.reshape(-1, *stack.shape[-2:])


def _flat_slot(slot: _Slot) -> _Slot:
  bases, moments, when = slot
  bases, moments = jax.tree.map(_flat, (bases, moments))
  return bases, moments, None if when is None else when.flat()
