"""Which matrices are due for new bases at a step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.context import UpdateContext
from galore_optax.subspace import adaptive, refresh_groups
from galore_optax.subspace.refresh_settings import Refresh
from galore_optax.tree import plan


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


def by_leaf(
  settings: Refresh,
  sites: Mapping[str, plan.Site],
  context: UpdateContext,
  schedules: Mapping[str, adaptive.State],
) -> dict[str, jax.Array]:
  """Which matrices a refresh recomputes.

  Args:
    settings: When bases are recomputed.
    sites: Path to site.
    context: The step, whether bases may be refreshed, and which layer this is.
    schedules: Path to schedule; empty unless the policy is `adaptive`.

  Returns:
    Path to whether each matrix of the leaf is due, bool in the shape of its
    stack.
  """
  count, found, first = total(sites, context), {}, 0
  for path, site in sites.items():
    alone = refresh_groups.Group(((site,),), (first,))
    is_due = of_group(settings, context, count, alone, schedules)
    found[path] = (is_due & context.active).reshape(site.view.stack)
    first += site.view.count
  return found


def of_group(
  settings: Refresh,
  context: UpdateContext,
  count: Any,
  group: refresh_groups.Group,
  schedules: Mapping[str, adaptive.State],
) -> jax.Array:
  """Whether each matrix of a group is due, in the order of their numbers.

  Args:
    settings: When bases are recomputed.
    context: The step, and which layer this is.
    count: Number of all matrices, those of all layers included.
    group: The group.
    schedules: Path to schedule; empty unless the policy is `adaptive`.
  """
  if settings.policy != "adaptive":
    gap = group.members[0].gap
    return _at_step(settings, context, count, numbers(group, context), gap)
  flat = [schedules[site.path].flat() for site in group.members]
  is_due = jnp.concatenate([x.due(context.step) for x in flat])
  return is_due[group.permutation]


def numbers(group: refresh_groups.Group, context: UpdateContext) -> jax.Array:
  """Numbers of a group's matrices among all, ascending."""
  if context.is_one_layer:
    return group.numbers(context.layer, context.layers)
  return group.numbers(0, 1)


def _at_step(
  settings: Refresh,
  context: UpdateContext,
  count: Any,
  numbers: jax.Array,
  gap: Any,
) -> jax.Array:
  r"""Whether each of some matrices is due, bool (count,).

  In a burst, matrix i of N is due at the first steps of all and where
  :math:`(t - \lfloor i T / N \rfloor) \bmod T` is less than the burst's length.
  """
  step = context.step
  if settings.burst is None:
    low, high = span(settings.policy, step, gap, count)
    return (low <= numbers) & (numbers < high)
  gap = jnp.maximum(jnp.asarray(gap).astype(jnp.int32), 1)
  burst: Any = jnp.asarray(settings.burst).astype(jnp.int32)
  phases = jnp.zeros_like(numbers)
  if settings.policy != "synchronous":
    phases = jax.lax.div(numbers * gap, jnp.asarray(count, jnp.int32))
  since = jnp.mod(step - phases, gap)
  return (step < burst) | (since < burst)


def span(
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

    >>> low, high = span("staggered", jnp.int32(3), 6, total=6)
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


def total(sites: Mapping[str, plan.Site], context: UpdateContext) -> Any:
  """Number of all matrices, those of all layers included."""
  matrices = sum(site.view.count for site in sites.values())
  return matrices * (context.layers if context.is_one_layer else 1)
