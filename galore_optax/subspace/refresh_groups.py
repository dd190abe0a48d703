"""Which matrices are refreshed by one computation, and how they are counted."""

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

# What a refresh changes of a leaf: its bases by side, its moments by place,
# and its schedule where that adapts.
Slot = tuple[Mapping[str, Any], Mapping[str, Any], adaptive.State | None]


@dataclasses.dataclass(frozen=True)
class Group:
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

  def numbers(self, layer: Any, layers: Any) -> jax.Array:
    """The matrices' numbers in order, as if a leaf's layers were one stack.

    Args:
      layer: Number of the layer that the leaves are of, 0 if of all.
      layers: Number of all layers then, 1 otherwise.

    Returns:
      int32 (count,), ascending.
    """
    return jnp.concatenate(
      [
        first * layers + layer * count + jnp.arange(count)
        for first, count in sorted(zip(self.first, self.counts, strict=True))
      ]
    ).astype(jnp.int32)

  def place(self, unit: jax.Array) -> "Place":
    """Where a matrix is, of which `unit` tells how many come before it."""

    def look_up(of_matrix: Any) -> jax.Array:
      told = np.asarray(of_matrix)[self.order].astype(np.int32)
      if not told.any():
        return jnp.int32(0)
      return slices.take(jnp.asarray(told), unit)

    of_leaf = lambda x: look_up(np.repeat(x, self.counts))
    sizes = [len(kind) for kind in self.kinds]
    return Place(
      member=of_leaf(np.arange(len(self.members))),
      kind=of_leaf(np.repeat(np.arange(len(sizes)), sizes)),
      within=of_leaf(np.concatenate([np.arange(size) for size in sizes])),
      index=look_up(np.concatenate([np.arange(n) for n in self.counts])),
    )


@dataclasses.dataclass(frozen=True)
class Place:
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


def group(
  sites: Mapping[str, plan.Site],
  slots: Mapping[str, Slot],
  grads: Mapping[str, jax.Array],
  *,
  share: bool,
  by_gradient: bool,
) -> list[Group]:
  """The leaves in groups.

  Args:
    sites: Path to site.
    slots: Path to what a refresh changes.
    grads: Path to gradients (..., m, n).
    share: Whether leaves share a computation at all.
    by_gradient: Whether bases are made of the gradient itself, and not of
      products with it: then leaves of a group are alike in that as well.

  Returns:
    The groups; a leaf is in one of them.
  """
  found: dict[Any, dict[Any, list[tuple[plan.Site, int]]]] = {}
  first = 0
  for path, site in sites.items():
    bases, moments, _ = slots[path]
    gap = site.gap if isinstance(site.gap, int | float) else id(site.gap)
    name = re.sub(r"\d+", "#", path) if sharding.on_mesh(grads[path]) else None
    seen = _form(site, (grads[path], moments))
    kind = (site.sides, site.sharded, seen, *moments)
    alike = kind if by_gradient else len(site.sides)
    alone = None if share else path
    key = (name, gap, alike, alone, _form(site, list(bases.values())))
    found.setdefault(key, {}).setdefault(kind, []).append((site, first))
    first += site.view.count
  return [
    Group(
      tuple(tuple(site for site, _ in kind) for kind in kinds.values()),
      tuple(first for kind in kinds.values() for _, first in kind),
    )
    for kinds in found.values()
  ]


def _form(site: plan.Site, tree: Any) -> tuple:
  """What the arrays of one matrix look like."""
  stack = len(site.view.stack)
  return tuple((x.dtype.name, x.shape[stack:]) for x in jax.tree.leaves(tree))
