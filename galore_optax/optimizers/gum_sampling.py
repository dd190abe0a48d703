"""Draws matrices that follow, for a period, what their bases leave out (GUM).

GaLore updates the other matrices. The draw is among all matrices of one shape.
The momentum of the drawn matrices is stored in slots of full size. The number
of slots is fixed; which matrix each belongs to changes from period to period.
"""

import dataclasses
import functools
import itertools
import re
import warnings
import zlib
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax import context as context_lib
from galore_optax import linalg
from galore_optax.subspace import moments, projection
from galore_optax.transform import axis_names
from galore_optax.transform.state import GaLoreState
from galore_optax.tree import (
  boxes,
  matrix_view,
  paths,
  sharding,
  slices,
  split,
)
from galore_optax.tree import plan as plan_lib
from galore_optax.tree import rules as rules_lib

# Makes the keys of draws differ from other uses of the seed.
_DRAWS = 0x67756D
# A residual smaller than this fraction of the gradient is rounding noise.
_NOISE = 1e-5


class GumState(NamedTuple):
  """State of :func:`gum`, without that of its learning rate.

  Attributes:
    galore: State of the low-rank branch, a :class:`galore_optax.GaLoreState`.
    held: For each shape, the numbers of the matrices that are at full rank in
      this period. The key is the path of the first leaf of that shape, and
      matrices are numbered leaf after leaf. None for a matrix whose shape is
      unique: it is always at full rank.
    momentum: For each shape, the momentum of these matrices.
  """

  galore: GaLoreState
  held: Any  # (γ,), dtype=jnp.int32
  momentum: Any  # (γ, m, n), dtype=state_dtype


@dataclasses.dataclass(frozen=True)
class _Family:
  """All matrices of one shape, in the order of their leaves."""

  sites: tuple[plan_lib.Site, ...]

  @property
  def path(self) -> str:
    return self.sites[0].path

  @property
  def name(self) -> str:
    """A name that does not depend on how the matrices are stacked."""
    view = self.sites[0].view
    m, n = view.dims
    return f"{m}x{n}/{self.sites[0].rank}/{self.sites[0].sides}"

  @property
  def first(self) -> list[int]:
    """Number of each leaf's first matrix, and the number of all matrices."""
    counts = (site.view.count for site in self.sites)
    return [0, *itertools.accumulate(counts)]

  @property
  def count(self) -> int:
    return self.first[-1]


def _families(sites: Mapping[str, plan_lib.Site]) -> list[_Family]:
  found: dict[Hashable, list[plan_lib.Site]] = {}
  for site in sites.values():
    key = (*site.view.dims, site.sides, site.rank)
    found.setdefault(key, []).append(site)
  return [_Family(tuple(members)) for members in found.values()]


@dataclasses.dataclass(frozen=True)
class Sampled:
  """The settings of one transformation, and its two functions.

  Attributes:
    low_rank: Makes the low-rank branch, a GaLore, given additional rules.
    plan: The plan of the low-rank branch.
    sampled: How many matrices of each shape are drawn, or which fraction.
    gap: Length T of a period, in steps.
    decay: Decay of the momentum.
    nesterov: Whether to use Nesterov momentum.
    state_dtype: Dtype of the momentum, or None.
    seed: Seed of the draws.
  """

  low_rank: Callable[[rules_lib.Rules], Any]
  plan: plan_lib.Plan
  sampled: Any
  gap: Any
  decay: Any
  nesterov: bool
  state_dtype: Any
  seed: Any

  def init(self, params: optax.Params) -> GumState:
    """State for parameters, with γ slots of full size for each shape."""
    state = self.low_rank(()).init(params)
    if split.is_placeholder(params):
      return GumState(state, 0, 0)
    leaves = paths.leaves_by_path(params)
    axes = boxes.axis_names(params)
    self.plan.check_full_rank_axes("gum", leaves, axes, state.projector)
    families = self._families(leaves, axis_names.without_names(state))
    unique = [family.path for family in families if family.count == 1]
    if unique:
      for family in families:
        if family.count == 1:
          _check_axes(family.sites[0])
      _warn_of_single(unique)
      rules = tuple((f"^{re.escape(path)}$", None) for path in unique)
      with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "galore projects none")
        state = self.low_rank(rules).init(params)
    many = [family for family in families if family.count > 1]
    sizes = {f.path: _number_of(self.sampled, f.count) for f in many}
    return GumState(
      state,
      {path: jnp.arange(size, dtype=jnp.int32) for path, size in sizes.items()}
      | dict.fromkeys(unique),
      {f.path: self._zeros(f, sizes[f.path], leaves) for f in many},
    )

  def update(
    self,
    updates: optax.Updates,
    state: GumState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, GumState]:
    """GaLore's update, with the updates of the drawn matrices put in."""
    context, extra_args = context_lib.split_off(extra_args)
    if context.is_one_layer:
      raise ValueError(_LAYERWISE)
    leaves = paths.leaves_by_path(updates)
    families = self._families(leaves, state.galore)
    gap = jnp.maximum(jnp.asarray(self.gap).astype(jnp.int32), 1)
    period, phase = jnp.divmod(state.galore.step, gap)
    begins = phase == 0
    held = {
      f.path: jnp.where(begins, self._draw(f, period, old), old)
      for f in families
      for old in [state.held[f.path]]
    }
    weights = {
      site.path: f.count / (f.count - len(held[f.path]))
      for f in families
      for site in f.sites
    }
    low_updates, low_state = context_lib.update_with(
      self.low_rank(()),
      context._replace(weights=weights),
      updates,
      _restarted(state.galore, begins),
      params,
      **extra_args,
    )
    new, momentum = paths.leaves_by_path(low_updates), {}
    for f in families:
      decay = jnp.where(begins, 0, self.decay)
      directions, momentum[f.path] = self._follow(
        f, held[f.path], decay, leaves, low_state, state.momentum[f.path]
      )
      new |= _with_held(f, held[f.path], directions, new)
    unique = [path for path, numbers in state.held.items() if numbers is None]
    new |= {path: self.plan.scale(path) * new[path] for path in unique}
    new_updates = paths.map_with_path(
      lambda path, g: new[path].astype(jnp.result_type(g)), updates
    )
    held |= dict.fromkeys(unique)
    return new_updates, GumState(low_state, held, momentum)

  def _families(
    self, leaves: Mapping[str, Any], state: GaLoreState
  ) -> list[_Family]:
    """The projected matrices, grouped by shape."""
    shapes = projection.basis_shapes(state.projector)
    return _families(self.plan.sites_from_bases(leaves, shapes))

  def _zeros(
    self, family: _Family, size: int, leaves: Mapping[str, Any]
  ) -> jax.Array:
    """Momentum of γ matrices, sharded like the matrices of the first leaf."""
    site = family.sites[0]
    like = [jnp.result_type(leaves[site.path]) for site in family.sites]
    dtype = self.state_dtype or jnp.result_type(jnp.float32, *like)
    zeros = jnp.zeros((size, *site.view.dims), dtype)
    return sharding.shard_divisible_like(
      zeros,
      leaves[site.path],
      lambda spec: (None, *site.view.spec(spec)[-2:]),
    )

  def _draw(
    self, family: _Family, period: jax.Array, like: jax.Array
  ) -> jax.Array:
    """Distinct matrices of a family, uniformly drawn, as many as in `like`."""
    key = jax.random.fold_in(jax.random.key(self.seed), _DRAWS)
    for number in (period, zlib.crc32(family.name.encode())):
      key = jax.random.fold_in(key, number)
    numbers = jax.random.permutation(key, family.count)[: len(like)]
    return numbers.astype(like.dtype)

  def _follow(
    self,
    family: _Family,
    held: jax.Array,
    decay: Any,
    leaves: Mapping[str, Any],
    low_state: GaLoreState,
    momentum: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Directions of the drawn matrices, and their new momentum.

    A loop goes through the matrices, so that memory holds one at a time.
    """
    site = family.sites[0]
    size = max(site.low_shape[-2:]) ** 0.5  # as in the low-rank branch
    weight = family.count / len(momentum)
    read = functools.partial(_read, family, leaves, low_state.projector)
    exact = _are_exact(low_state.projector[site.path])

    def one(slot: jax.Array, carry: tuple) -> tuple:
      directions, momentum = carry
      residual = weight * _residual(*read(held[slot]), exact)
      new = decay * momentum[slot].astype(residual.dtype) + residual
      ahead = residual + self.decay * new if self.nesterov else new
      direction = size * linalg.polar_factor(ahead)
      return (
        directions.at[slot].set(direction.astype(directions.dtype)),
        momentum.at[slot].set(new.astype(momentum.dtype)),
      )

    wide = jnp.promote_types(momentum.dtype, jnp.float32)
    given = [leaves[site.path] for site in family.sites]
    start, _ = sharding.vary_together(
      ((jnp.zeros_like(momentum, wide), momentum), given)
    )
    return jax.lax.fori_loop(0, len(momentum), one, start)


def _number_of(sampled: Any, count: int) -> int:
  """How many matrices of a family are drawn: at least one, never all."""
  if isinstance(sampled, jax.core.Tracer):
    raise ValueError(
      "`sampled` decides the shapes of the state and cannot be traced. Under "
      "`optax.inject_hyperparams`, call `init` outside of `jax.jit` and "
      "`jax.eval_shape`, or pass static_args=('sampled',)."
    )
  is_fraction = jnp.issubdtype(jnp.result_type(sampled), jnp.floating)
  number = round(float(sampled) * count) if is_fraction else int(sampled)
  return min(max(1, number), count - 1)


def _restarted(state: GaLoreState, begins: jax.Array) -> GaLoreState:
  """The state of the low-rank branch, with zero momentum if a period begins."""
  restart = lambda x: jnp.where(begins, jnp.zeros_like(x), x)
  new = {
    name: {path: restart(x) for path, x in tree.low.items()}
    for name, (_, tree) in moments.find_moments(state.inner_state).items()
  }
  return state._replace(
    inner_state=moments.replace_moments(state.inner_state, new)
  )


def _read(
  family: _Family,
  leaves: Mapping[str, jax.Array],
  stored: Mapping[str, Mapping[str, Any]],
  number: jax.Array,
) -> tuple[jax.Array, projection.Bases]:
  """The gradient of matrix `number` of a family, and its bases."""

  def take(site: plan_lib.Site, i: jax.Array) -> Any:
    bases = projection.read(stored[site.path])
    grad = site.view.as_stack(leaves[site.path])
    wide = jnp.promote_types(grad.dtype, jnp.float32)
    at = lambda x: slices.take(slices.flat(x, x.ndim - 2), i)
    return at(grad).astype(wide), jax.tree.map(at, bases)

  first = np.asarray(family.first[:-1], np.int32)
  member = jnp.sum(number >= first, dtype=jnp.int32) - 1
  return jax.lax.switch(
    member,
    [functools.partial(take, site) for site in family.sites],
    number - jnp.asarray(first)[member],
  )


def _residual(
  grad: jax.Array, bases: projection.Bases, exact: bool
) -> jax.Array:
  """The part of a gradient outside its bases; 0 if that is rounding noise.

  With orthonormal bases the residual has nothing in their span but rounding
  noise of the gradient's size, which the polar factor would scale up: it is
  projected out a second time. With rounded bases, the residual in their span is
  not noise and stays.
  """
  outside = lambda x: x - projection.lift(projection.project(x, bases), bases)
  grad = jnp.where(jnp.isfinite(grad).all(), grad, 0)
  residual = outside(outside(grad)) if exact else outside(grad)
  largest = lambda x: jnp.max(jnp.abs(x))
  return jnp.where(largest(residual) > _NOISE * largest(grad), residual, 0)


def _are_exact(stored: Any) -> bool:
  """Whether bases are orthonormal to the precision of float32."""
  return all(x.dtype == jnp.float32 for x in jax.tree.leaves(stored))


def _with_held(
  family: _Family,
  held: jax.Array,
  directions: jax.Array,
  updates: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
  """The updates of a family's leaves, with those of drawn matrices put in."""
  new_updates = {}
  for site, first in zip(family.sites, family.first, strict=False):
    old = site.view.as_stack(updates[site.path])
    drawn = (site.scale * directions).astype(old.dtype)
    new = slices.put_many(slices.flat(old, old.ndim - 2), drawn, held - first)
    new_updates[site.path] = site.view.from_stack(new.reshape(old.shape))
  return new_updates


def _check_axes(site: plan_lib.Site) -> None:
  """Refuses a matrix at full rank that is not its leaf's last two axes."""
  if site.view != matrix_view.matrix_view(site.view.shape):
    raise ValueError(
      f"gum cannot update the matrix {site.path!r} at full rank: its shape is "
      "unique, and its rule names other rows and columns than the last two "
      "axes, which the inner optimizer sees. Give it the rule None for AdamW, "
      "or use `sumo`, which projects every matrix."
    )


def _warn_of_single(unique: list[str]) -> None:
  names = ", ".join(map(repr, unique[:8])) + (", ..." if unique[8:] else "")
  warnings.warn(
    f"gum keeps {len(unique)} matrices at full rank, {names}: their shapes are "
    "unique, and sampling one of one saves nothing. `sumo` projects every "
    "matrix.",
    stacklevel=4,  # of the call of `init`
  )


_LAYERWISE = """\
`gum` draws matrices among all layers and stores one momentum for the drawn
ones, which is impossible if layers are updated one after the other
(`layerwise`). Use the usual step, or `sumo`, which treats every matrix by
itself."""
