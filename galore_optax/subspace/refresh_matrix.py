"""New bases for one matrix, and its moments carried into them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_optax.context import UpdateContext
from galore_optax.quantization import bfloat16, carried, qarray
from galore_optax.subspace import adaptive as adaptive_lib
from galore_optax.subspace import due, projection, refresh_groups
from galore_optax.subspace import find as find_lib
from galore_optax.subspace import moments as moments_lib
from galore_optax.subspace.refresh_settings import Refresh
from galore_optax.tree import in_place, plan, slices

# What a refresh changes, by the path of the leaf.
Slots = dict[str, refresh_groups.Slot]

# Makes the keys of random bases differ from other uses of the seed.
_RANDOM_BASES = 0x676F6C6F


class Found(NamedTuple):
  """Bases of one leaf that are known already.

  Attributes:
    bases: Side to basis (..., m, r) or (..., n, r); or to a
      :class:`galore_optax.quantization.carried.Carried` of the transposed.
    valid: 1 where the gradient was finite and not zero, else 0; (..., 1, 1),
      float32.
  """

  bases: Any
  valid: Any


@dataclasses.dataclass(frozen=True)
class Pass:
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


def refresh_matrix(
  run: Pass,
  group: refresh_groups.Group,
  unit: jax.Array,
  grads: Mapping[str, jax.Array],
  flat: Slots,
) -> Slots:
  """The slots of a group with the matrix at position `unit` refreshed."""
  number = adaptive_lib.Number(
    slices.take(due.numbers(group, run.context), unit), run.total
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
    find = functools.partial(
      _find, run.settings, k, group, location, grads, stored[side]
    )
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


def _find(
  settings: Refresh,
  k: int,
  group: refresh_groups.Group,
  location: refresh_groups.Location,
  grads: Mapping[str, jax.Array],
  stored: Any,
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
    return with_gradient(functools.partial(_take_found, stored), old)
  if settings.finder == "svd":
    return with_gradient(find_lib.svd_basis, old)
  iterations: Any = settings.iterations
  return find_lib.iterate(
    lambda basis: with_gradient(find_lib.gram, basis), old, iterations
  )


def _take_found(
  stored: Any, found: Found, old: jax.Array, side: str
) -> tuple[jax.Array, jax.Array]:
  """The basis that a backward pass found, and whether it is valid."""
  valid = found.valid[0, 0] > 0
  new = found.bases[side]
  if isinstance(new, carried.Carried):
    new = carried.unpack(new, stored)
  (basis,) = projection.read({side: new}).values()
  return jnp.where(valid, basis.astype(old.dtype), old), valid


def _draw_or_find(
  is_random: jax.Array, key: jax.Array, find: Callable, old: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """A basis drawn at random if `is_random`, else found from gradients."""

  def draw(old: jax.Array) -> tuple[jax.Array, jax.Array]:
    drawn = find_lib.random_basis(key, *old.shape)
    return drawn.astype(old.dtype), jnp.bool_(True)

  return jax.lax.cond(is_random, draw, find, old)


def _key(seed: Any, *numbers: Any) -> jax.Array:
  """A random key for each list of numbers, unlike those of initial bases."""
  key = jax.random.fold_in(jax.random.key(seed), _RANDOM_BASES)
  for number in numbers:
    key = jax.random.fold_in(key, number)
  return key


def _write_matrix(
  run: Pass,
  group: refresh_groups.Group,
  location: refresh_groups.Location,
  key: jax.Array,
  bases: Mapping[str, Any],
  overlap: projection.Bases,
  schedule: adaptive_lib.State | None,
  flat: Slots,
) -> Slots:
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
      else in_place.update_if(location.kind == k, write, before)
    )
    flat = flat | {s.path: x for s, x in zip(kind, after, strict=True)}
  return flat


def _write_in_kind(
  run: Pass,
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
