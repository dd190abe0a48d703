"""Recomputes the bases that are due and carries moments into them.

The only loops and branches over matrices of a stack are in this module.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_optax.context import UpdateContext
from galore_optax.quantization import bfloat16, qarray
from galore_optax.subspace import adaptive as adaptive_lib
from galore_optax.subspace import find as find_lib
from galore_optax.subspace import moments as moments_lib
from galore_optax.subspace import projection, refresh_groups
from galore_optax.subspace.refresh_settings import Refresh
from galore_optax.tree import plan, sharding, slices, split

# What a refresh changes, by the path of the leaf.
_Slots = dict[str, refresh_groups.Slot]


class Found(NamedTuple):
  """Bases of one leaf that are known already.

  Attributes:
    bases: Side to basis (..., m, r) or (..., n, r).
    valid: 1 where the gradient was finite and not zero, else 0; (..., 1, 1),
      float32.
  """

  bases: Any
  valid: Any


# Makes the keys of random bases differ from other uses of the seed.
_RANDOM_BASES = 0x676F6C6F


@dataclasses.dataclass(frozen=True)
class _Pass:
  """What all matrices have in common in one pass over them.

  Attributes:
    settings: When and how bases are recomputed; complete.
    seed: Seed of random bases.
    context: The step, and whether one layer or all are updated.
    total: Number of all matrices, those of all layers included.
    degrees: Path of a moment in the inner state to its degree, and to its bias
      ratio where it is carried over as LDAdam does, else None.
  """

  settings: Refresh
  seed: Any
  context: UpdateContext
  total: Any
  degrees: Mapping[str, tuple[int, Any]]

  @property
  def is_random(self) -> jax.Array | None:
    """Whether bases are drawn at random at this step; None if never."""
    if self.settings.random_from is None:
      return None
    return self.context.step >= self.settings.random_from


def check_gaps(settings: Refresh, sites: Mapping[str, plan.Site]) -> None:
  """Raises where staggered refresh steps cannot be computed in int32.

  Args:
    settings: When bases are recomputed.
    sites: Path to site.
  """
  total = sum(site.view.count for site in sites.values())
  for path, site in sites.items():
    if settings.policy != "staggered" or isinstance(site.gap, jax.core.Tracer):
      continue
    if float(site.gap) * total >= 2**31:
      raise ValueError(
        f"At the leaf {path!r}: to stagger the refreshes of {total} matrices, "
        f"`update_proj_gap` can be at most {(2**31 - 1) // total}, got "
        f'{site.gap}. With refresh="synchronous" there is no limit.'
      )


def due_by_leaf(
  settings: Refresh,
  sites: Mapping[str, plan.Site],
  context: UpdateContext,
  schedules: Mapping[str, adaptive_lib.State],
) -> dict[str, jax.Array]:
  """Which matrices a refresh recomputes.

  Args:
    settings: As for :func:`refresh`.
    sites: As for :func:`refresh`.
    context: As for :func:`refresh`.
    schedules: As for :func:`refresh`.

  Returns:
    Path to whether each matrix of the leaf is due, bool in the shape of its
    stack.
  """
  run = _Pass(settings, None, context, _total(sites, context), {})
  found, first = {}, 0
  for path, site in sites.items():
    if settings.policy == "adaptive":
      is_due = schedules[path].flat().due(context.step)
    else:
      alone = refresh_groups.Group(((site,),), (first,))
      is_due = _is_due(run, _numbers(run, alone), site.gap)
    found[path] = (is_due & context.active).reshape(site.view.stack)
    first += site.view.count
  return found


def _total(sites: Mapping[str, plan.Site], context: UpdateContext) -> Any:
  """Number of all matrices, those of all layers included."""
  matrices = sum(site.view.count for site in sites.values())
  return matrices * (context.layers if context.is_one_layer else 1)


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
    grads: Path to gradients (..., m, n), or to the :class:`Found` bases of the
      gradient. The bases of a leaf that is missing stay as they are.
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
  run = _Pass(
    settings,
    seed,
    context,
    _total(sites, context),
    {name: (degree, ratios.get(name)) for name, (degree, _) in found.items()},
  )
  slots = {
    path: (bases[path], _moments_of(site, found), schedules.get(path))
    for path, site in sites.items()
  }
  new: _Slots = {}
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


def due(
  policy: str | None, step: jax.Array, gap: Any, total: Any
) -> tuple[jax.Array, jax.Array]:
  r"""The range of matrices that are due at a step.

  At step 0 all are due. After that, staggered, matrix i of N is due at
  :math:`t \equiv \lfloor i T / N \rfloor \pmod T`: at most
  :math:`\lceil N / T \rceil` matrices at any step.

  Args:
    policy: `staggered` or `synchronous`.
    step: Steps so far, int32 scalar.
    gap: Steps between two refreshes T.
    total: Number of all matrices N.

  Returns:
    Number of the first matrix due, and of the one after the last; int32
    scalars.

  Example:
    Of six matrices with T = 6, the fourth is due at step 3.

    >>> low, high = due("staggered", jnp.int32(3), 6, total=6)
    >>> int(low), int(high)
    (3, 4)
  """
  gap = jnp.maximum(jnp.asarray(gap).astype(jnp.int32), 1)
  phase = jax.lax.rem(step, gap)
  total = jnp.asarray(total, jnp.int32)
  if policy == "synchronous":
    return jnp.int32(0), jnp.where(phase == 0, total, 0)
  ceil_div = lambda a: jax.lax.div(a + gap - 1, gap)
  low = jnp.where(step == 0, 0, ceil_div(phase * total))
  high = jnp.where(step == 0, total, ceil_div((phase + 1) * total))
  return low, high


def _is_due(run: _Pass, numbers: jax.Array, gap: Any) -> jax.Array:
  r"""Whether each of some matrices is due, bool (count,).

  In a burst, matrix i of N is due at the first steps of all and where
  :math:`(t - \lfloor i T / N \rfloor) \bmod T` is less than the burst's length.
  """
  step, settings = run.context.step, run.settings
  if settings.burst is None:
    low, high = due(settings.policy, step, gap, run.total)
    return (low <= numbers) & (numbers < high)
  gap = jnp.maximum(jnp.asarray(gap).astype(jnp.int32), 1)
  burst: Any = jnp.asarray(settings.burst).astype(jnp.int32)
  phases = jnp.zeros_like(numbers)
  if settings.policy != "synchronous":
    phases = jax.lax.div(numbers * gap, jnp.asarray(run.total, jnp.int32))
  since = jnp.mod(step - phases, gap)
  return (step < burst) | (since < burst)


def _refresh_group(
  run: _Pass,
  group: refresh_groups.Group,
  grads: Mapping[str, jax.Array],
  slots: Mapping[str, refresh_groups.Slot],
) -> _Slots:
  """Refreshes the matrices of a group that are due.

  A loop goes through the matrices, however many there are: batched
  factorizations hang on CPU, and whole stacks pass through the branches so that
  they are updated in place.
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

  def refresh_matrix(unit: jax.Array, flat: _Slots) -> _Slots:
    return _refresh_matrix(run, group, unit, flat_grads, flat)

  return _loop_over_due(run, group, refresh_matrix, of_group)


def _loop_over_due(
  run: _Pass,
  group: refresh_groups.Group,
  refresh_matrix: Callable,
  slots: _Slots,
) -> _Slots:
  """Calls `refresh_matrix` on the matrices of a group that are due, in a loop.

  Stacks are flattened inside of the branch that is taken: an output of a branch
  that changes shape outside of it would not be written in place. The number of
  rounds is fixed, because reverse-mode differentiation needs it to be.
  """
  context = run.context
  if run.settings.policy == "adaptive":
    schedules = [x.flat() for _, _, x in slots.values() if x is not None]
    is_due = jnp.concatenate([x.due(context.step) for x in schedules])
    is_due = is_due[group.permutation]
  else:
    is_due = _is_due(run, _numbers(run, group), group.members[0].gap)

  def refresh_if_due(unit: jax.Array, flat: _Slots) -> _Slots:
    return jax.lax.cond(
      slices.take(is_due, unit),
      lambda flat: refresh_matrix(unit, flat),
      lambda flat: flat,
      flat,
    )

  def loop(slots: _Slots) -> _Slots:
    flat = {
      site.path: _flat_slot(site, slots[site.path]) for site in group.members
    }
    if group.count == 1:
      flat = refresh_matrix(jnp.int32(0), flat)
    else:
      flat = jax.lax.fori_loop(0, group.count, refresh_if_due, flat)
    return jax.tree.map(lambda x, like: x.reshape(like.shape), flat, slots)

  return jax.lax.cond(
    jnp.any(is_due) & context.active, loop, lambda slots: slots, slots
  )


def _numbers(run: _Pass, group: refresh_groups.Group) -> jax.Array:
  """Numbers of a group's matrices among all, ascending."""
  if run.context.is_one_layer:
    return group.numbers(run.context.layer, run.context.layers)
  return group.numbers(0, 1)


def _refresh_matrix(
  run: _Pass,
  group: refresh_groups.Group,
  unit: jax.Array,
  grads: Mapping[str, jax.Array],
  flat: _Slots,
) -> _Slots:
  """The slots of a group with the matrix at position `unit` refreshed."""
  number = adaptive_lib.Number(
    slices.take(_numbers(run, group), unit), run.total
  )
  location = group.location(unit)
  # Sides have the same names in all leaves of the group: those of the first.
  sides = group.members[0].sides
  stored, schedule = slices.take_from(
    [
      (dict(zip(sides, bases.values(), strict=True)), schedule)
      for bases, _, schedule in (flat[site.path] for site in group.members)
    ],
    [site.sharded for site in group.members],
    location.member,
    location.index,
  )
  old = jax.lax.stop_gradient(projection.read(stored))
  found = {}
  for k, side in enumerate(sides):
    find = functools.partial(_find, run.settings, k, group, location, grads)
    if run.is_random is not None:
      key = _key(run.seed, run.context.step, number.index, k)
      find = functools.partial(_draw_or_find, run.is_random, key, find)
    found[side] = find(old[side])
  new = {side: basis for side, (basis, _) in found.items()}
  written = projection.write(new, stored)
  overlap = projection.overlap(projection.read(written), old)
  if schedule is not None:
    rule = run.settings.adaptive or adaptive_lib.Adaptive()
    similarity = adaptive_lib.similarity(rule.measure, new, old, overlap)
    is_valid = functools.reduce(
      jnp.logical_and, (valid for _, valid in found.values())
    )
    schedule = schedule.refreshed(
      rule,
      run.context.step,
      number,
      group.members[0].gap,
      similarity,
      is_valid,
    )
  key = bfloat16.step_key("rotated", run.seed, run.context.step, number.index)
  return _write_matrix(
    run, group, location, key, written, overlap, schedule, flat
  )


def _write_matrix(
  run: _Pass,
  group: refresh_groups.Group,
  location: refresh_groups.Location,
  key: jax.Array,
  bases: Mapping[str, Any],
  overlap: projection.Bases,
  schedule: adaptive_lib.State | None,
  flat: _Slots,
) -> _Slots:
  """The slots of a group with one matrix's bases, moments and schedule new."""
  sides = group.members[0].sides
  for k, kind in enumerate(group.kinds):
    side_in_kind = dict(zip(sides, kind[0].sides, strict=True))
    write = functools.partial(
      _write_in_kind,
      run,
      kind,
      location,
      key,
      {side_in_kind[side]: x for side, x in bases.items()},
      {side_in_kind[side]: x for side, x in overlap.items()},
      schedule,
    )
    before = [flat[site.path] for site in kind]
    after = (
      write(before)
      if len(group.kinds) == 1
      else jax.lax.cond(location.kind == k, write, lambda slots: slots, before)
    )
    flat = flat | {s.path: x for s, x in zip(kind, after, strict=True)}
  return flat


def _key(seed: Any, *numbers: Any) -> jax.Array:
  """A random key for each list of numbers, unlike those of initial bases."""
  key = jax.random.fold_in(jax.random.key(seed), _RANDOM_BASES)
  for number in numbers:
    key = jax.random.fold_in(key, number)
  return key


def _draw_or_find(
  is_random: jax.Array, key: jax.Array, find: Callable, old: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """A basis drawn at random if `is_random`, else found from gradients."""

  def draw(old: jax.Array) -> tuple[jax.Array, jax.Array]:
    drawn = find_lib.random_basis(key, *old.shape)
    return drawn.astype(old.dtype), jnp.bool_(True)

  return jax.lax.cond(is_random, draw, find, old)


def _find(
  settings: Refresh,
  k: int,
  group: refresh_groups.Group,
  location: refresh_groups.Location,
  grads: Mapping[str, jax.Array],
  old: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The new basis of a matrix on its k-th side, and whether it is valid.

  It is not if the gradient is zero or not finite; the basis is then the old
  one.
  """

  def with_gradient(f: Callable, basis: jax.Array) -> Any:
    def in_kind(kind: tuple[plan.Site, ...], basis: jax.Array) -> Any:
      g: Any = slices.take_from(
        [grads[site.path] for site in kind],
        [site.sharded for site in kind],
        location.within,
        location.index,
      )
      return f(g, basis, kind[0].sides[k])

    branches = [functools.partial(in_kind, kind) for kind in group.kinds]
    return jax.lax.switch(location.kind, branches, basis)

  if isinstance(grads[group.members[0].path], Found):
    return with_gradient(_take_found, old)
  if settings.finder == "svd":
    return with_gradient(find_lib.svd_basis, old)
  iterations: Any = settings.iterations
  return find_lib.iterate(
    lambda basis: with_gradient(find_lib.gram, basis), old, iterations
  )


def _take_found(
  found: Found, old: jax.Array, side: str
) -> tuple[jax.Array, jax.Array]:
  """The basis that a backward pass found, and whether it is valid."""
  valid = found.valid[0, 0] > 0
  return jnp.where(valid, found.bases[side].astype(old.dtype), old), valid


def _write_in_kind(
  run: _Pass,
  kind: Sequence[plan.Site],
  location: refresh_groups.Location,
  key: jax.Array,
  bases: Mapping[str, Any],
  overlap: projection.Bases,
  schedule: adaptive_lib.State | None,
  slots: list[refresh_groups.Slot],
) -> list[refresh_groups.Slot]:
  """The slots of a kind with one matrix replaced and its moments rotated."""
  at = ([site.sharded for site in kind], location.within, location.index)
  old = slices.take_from([moments for _, moments, _ in slots], *at)
  moments = {}
  for name, moment in old.items():
    degree, ratio = run.degrees[name]
    of_moment = bfloat16.leaf_key(key, name)
    if ratio is None:
      reset = (
        run.settings.moments == "reset" and not moments_lib.is_pending_sum(name)
      )
      moments[name] = _carry_over(
        reset, moment, overlap, degree, run.is_random, of_moment
      )
    else:
      mean = old[name.removesuffix("nu") + "mu"]
      rotated = moments_lib.rotate_variance(moment, mean, overlap, ratio)
      moments[name] = bfloat16.store(rotated, moment.dtype, of_moment)
  return slices.put_into(slots, *at, (bases, moments, schedule))


def _carry_over(
  reset: bool,
  moment: Any,
  overlap: projection.Bases,
  degree: int,
  is_random: jax.Array | None,
  key: jax.Array,
) -> Any:
  """One moment of one matrix in its new bases."""
  if reset:
    return jax.tree.map(jnp.zeros_like, moment)
  quantized = qarray.is_quantized(moment)
  old = qarray.dequantize(moment) if quantized else moment
  rotated = moments_lib.rotate(old, overlap, degree)
  if is_random is not None and degree == 2:
    rotated = jnp.where(is_random, old, rotated)
  if quantized:
    return qarray.requantize(moment, rotated)
  return bfloat16.store(rotated, moment.dtype, key)


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
