"""Groups matrices that one compiled computation refreshes, and numbers them."""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_optax.subspace import adaptive
from galore_optax.tree import plan, sharding, slices

# What a refresh changes of a leaf: its bases by side, its moments by their path
# in the inner state, and its schedule if the policy is adaptive.
Slot = tuple[Mapping[str, Any], Mapping[str, Any], adaptive.State | None]


@dataclasses.dataclass(frozen=True)
class Group:
  """Leaves whose bases are found by the same compiled computation.

  Factorizations compile slowly, so they are compiled once for all leaves whose
  bases have the same shape and dtype, left or right. Products with gradients
  and moments are compiled once for each kind: the leaves of a group whose
  gradients and moments have the same shapes too. On a mesh, the paths of a
  group's leaves differ only in numbers, because such leaves are usually sharded
  in the same way.

  Attributes:
    kinds: The leaves by kind.
    first: Number of each leaf's first matrix among the matrices of all groups,
      which are numbered in the order of the leaves.
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
  def permutation(self) -> np.ndarray:
    """Sorts the members' matrices by number."""
    starts = np.cumsum([0, *self.counts])
    ranges = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    by_number = sorted(zip(self.first, ranges, strict=True), key=lambda x: x[0])
    return np.concatenate([x for _, x in by_number]).astype(np.int32)

  def numbers(self, layer: Any, layers: Any) -> jax.Array:
    """The matrices' numbers, as if the layers of each leaf were one stack.

    Args:
      layer: Index of the layer that the leaves belong to; 0 if they are whole.
      layers: Number of layers; 1 if the leaves are whole.

    Returns:
      int32 (count,), ascending.
    """
    return jnp.concatenate(
      [
        first * layers + layer * count + jnp.arange(count)
        for first, count in sorted(zip(self.first, self.counts, strict=True))
      ]
    ).astype(jnp.int32)

  def location(self, unit: jax.Array) -> "Location":
    """The location of the matrix at position `unit`, sorted by number."""

    def look_up(of_matrix: Any) -> jax.Array:
      table = np.asarray(of_matrix)[self.permutation].astype(np.int32)
      if not table.any():
        return jnp.int32(0)
      return slices.take(jnp.asarray(table), unit)

    of_leaf = lambda x: look_up(np.repeat(x, self.counts))
    sizes = [len(kind) for kind in self.kinds]
    return Location(
      member=of_leaf(np.arange(len(self.members))),
      kind=of_leaf(np.repeat(np.arange(len(sizes)), sizes)),
      within=of_leaf(np.concatenate([np.arange(size) for size in sizes])),
      index=look_up(np.concatenate([np.arange(n) for n in self.counts])),
    )


@dataclasses.dataclass(frozen=True)
class Location:
  """Where a matrix is in a group; int32 scalars.

  Attributes:
    member: Index of its leaf in the group.
    kind: Index of the leaf's kind.
    within: Index of the leaf in its kind.
    index: Index of the matrix in its leaf.
  """

  member: jax.Array
  kind: jax.Array
  within: jax.Array
  index: jax.Array


def group(
  sites: Mapping[str, plan.Site],
  slots: Mapping[str, Slot],
  grads: Mapping[str, jax.Array],
  *,
  share: bool,
  by_gradient: bool,
) -> list[Group]:
  """Divides the projected leaves into groups.

  Args:
    sites: Path to site.
    slots: Path to what a refresh changes.
    grads: Path to gradients (..., m, n), or to trees of them. A leaf without
      one is in no group.
    share: Whether leaves share a computation at all.
    by_gradient: Whether the gradient itself is factorized, not products with
      it: the leaves of a group then have gradients of the same shape too.

  Returns:
    The groups; each leaf with a gradient is in one of them.
  """
  found: dict[Any, dict[Any, list[tuple[plan.Site, int]]]] = {}
  first = 0
  for path, site in sites.items():
    if path not in grads:
      first += site.view.count
      continue
    bases, moments, _ = slots[path]
    gap = site.gap if isinstance(site.gap, int | float) else id(site.gap)
    on_mesh = any(map(sharding.on_mesh, jax.tree.leaves(grads[path])))
    name = re.sub(r"\d+", "#", path) if on_mesh else None
    forms = _forms(site, (grads[path], moments))
    kind = (site.sides, site.sharded, forms, *moments)
    alike = kind if by_gradient else len(site.sides)
    alone = None if share else path
    key = (name, gap, alike, alone, _forms(site, list(bases.values())))
    found.setdefault(key, {}).setdefault(kind, []).append((site, first))
    first += site.view.count
  return [
    Group(
      tuple(tuple(site for site, _ in kind) for kind in kinds.values()),
      tuple(first for kind in kinds.values() for _, first in kind),
    )
    for kinds in found.values()
  ]


def _forms(site: plan.Site, tree: Any) -> tuple:
  """Dtype and shape of each array that belongs to one matrix."""
  stack = len(site.view.stack)
  return tuple((x.dtype.name, x.shape[stack:]) for x in jax.tree.leaves(tree))
