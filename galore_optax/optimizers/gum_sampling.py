"""Matrices that are drawn, for a period, to follow what their bases leave out.

The others are GaLore's. All matrices of one shape are drawn from together, and
the momentum of those that are drawn lies in slots of full size: their number
is fixed, whose they are changes.
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

from galore_optax import linalg
from galore_optax._galore import LAYER_ARG, GaLoreState
from galore_optax.subspace import moments, projection
from galore_optax.tree import matrix_view, paths, sharding, slices, split
from galore_optax.tree import plan as plan_lib

# Extra argument of the inner `update`: path to the weight of what is projected.
_WEIGHTS = "gum_weights"
_DRAW = 0x67756D  # keeps draws apart from the seed's other uses
# What of a gradient counts as none: its rest, where that is rounding noise.
_NOISE = 1e-5


class GumState(NamedTuple):
  """State of :func:`gum`, but for what its learning rate needs.

  Attributes:
    galore: State of the low-rank branch, a :class:`galore_optax.GaLoreState`.
    held: Which matrices are at full rank in this period. The matrices of one
      shape are numbered through, leaf after leaf, and known by the path of the
      first leaf; None for one that no other is like, which always is.
    momentum: Their momentum, likewise.
  """

  galore: GaLoreState
  held: Any  # (γ,), dtype=jnp.int32
  momentum: Any  # (γ, m, n), dtype=state_dtype


@dataclasses.dataclass(frozen=True)
class _Family:
  """The matrices of one shape, of which some are drawn; in order."""

  sites: tuple[plan_lib.Site, ...]

  @property
  def path(self) -> str:
    return self.sites[0].path

  @property
  def name(self) -> str:
    """What is common to its matrices, however they are stacked."""
    view = self.sites[0].view
    return f"{view.m}x{view.n}/{self.sites[0].rank}/{self.sites[0].sides}"

  @property
  def first(self) -> list[int]:
    """Number of each leaf's first matrix, and of all."""
    counts = (site.view.count for site in self.sites)
    return [0, *itertools.accumulate(counts)]

  @property
  def count(self) -> int:
    return self.first[-1]


def _families(sites: Mapping[str, plan_lib.Site]) -> list[_Family]:
  found: dict[Hashable, list[plan_lib.Site]] = {}
  for site in sites.values():
    key = (site.view.m, site.view.n, site.sides, site.rank)
    found.setdefault(key, []).append(site)
  return [_Family(tuple(members)) for members in found.values()]


@dataclasses.dataclass(frozen=True)
class Sampled:
  """The settings of one transformation, and its two functions.

  Attributes:
    low: From further rules to GaLore, around an inner optimizer that begins
      with :func:`weighed` for the matrices.
    plan: Its plan.
    sampled: How many matrices of each shape are drawn, or which fraction.
    gap: Steps T of a period.
    decay: Decay of the momentum.
    nesterov: Whether it is Nesterov's.
    state_dtype: Its dtype, or None.
    seed: Seed of the draws.
  """

  low: Callable[[plan_lib.Rules], Any]
  plan: plan_lib.Plan
  sampled: Any
  gap: Any
  decay: Any
  nesterov: bool
  state_dtype: Any
  seed: Any

  def init(self, params: optax.Params) -> GumState:
    """State for parameters, with room for γ matrices of each shape."""
    state = self.low(()).init(params)
    if split.is_placeholder(params):
      return GumState(state, 0, 0)
    leaves = paths.leaves_by_path(params)
    families = _families(
      self.plan.sites_from_bases(
        leaves, projection.basis_shapes(state.projector)
      )
    )
    alone = [family.path for family in families if family.count == 1]
    if alone:
      for family in families:
        if family.count == 1:
          _check_axes(family.sites[0])
      _warn_of_single(alone)
      rules = tuple((f"^{re.escape(path)}$", None) for path in alone)
      with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "galore projects none")
        state = self.low(rules).init(params)
    many = [family for family in families if family.count > 1]
    sizes = {f.path: _number_of(self.sampled, f.count) for f in many}
    return GumState(
      state,
      {path: jnp.arange(size, dtype=jnp.int32) for path, size in sizes.items()}
      | dict.fromkeys(alone),
      {f.path: self._zeros(f, sizes[f.path], leaves) for f in many},
    )

  def update(
    self,
    updates: optax.Updates,
    state: GumState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, GumState]:
    """GaLore's update, and in the places of those that are held their own."""
    if LAYER_ARG in extra_args:
      raise ValueError(_LAYERWISE)
    leaves = paths.leaves_by_path(updates)
    sites = self.plan.sites_from_bases(
      leaves, projection.basis_shapes(state.galore.projector)
    )
    families = _families(sites)
    gap = jnp.maximum(jnp.asarray(self.gap).astype(jnp.int32), 1)
    period, begun = jnp.divmod(state.galore.step, gap)
    held = {
      f.path: jnp.where(begun == 0, self._draw(f, period, old), old)
      for f in families
      for old in [state.held[f.path]]
    }
    weights = {
      site.path: f.count / (f.count - len(held[f.path]))
      for f in families
      for site in f.sites
    }
    small, low = self.low(()).update(
      updates,
      _restarted(state.galore, begun == 0),
      params,
      **{_WEIGHTS: weights},
      **extra_args,
    )
    new, momentum = paths.leaves_by_path(small), {}
    for f in families:
      decay = jnp.where(begun == 0, 0, self.decay)
      found, momentum[f.path] = self._follow(
        f, held[f.path], decay, leaves, low, state.momentum[f.path]
      )
      new |= _placed(f, held[f.path], found, new)
    alone = [path for path, numbers in state.held.items() if numbers is None]
    new |= {path: self.plan.scale(path) * new[path] for path in alone}
    done = paths.map_with_path(
      lambda path, g: new[path].astype(jnp.result_type(g)), updates
    )
    return done, GumState(low, held | dict.fromkeys(alone), momentum)

  def _zeros(
    self, family: _Family, size: int, leaves: Mapping[str, Any]
  ) -> jax.Array:
    """Momentum of γ matrices, sharded as those of the first leaf are."""
    site = family.sites[0]
    like = [jnp.result_type(leaves[site.path]) for site in family.sites]
    dtype = self.state_dtype or jnp.result_type(jnp.float32, *like)
    zeros = jnp.zeros((size, site.view.m, site.view.n), dtype)
    return sharding.shard_divisible_like(
      zeros,
      leaves[site.path],
      lambda spec: (None, *site.view.spec(spec)[-2:]),
    )

  def _draw(
    self, family: _Family, period: jax.Array, like: jax.Array
  ) -> jax.Array:
    """As many different matrices of a family as are held, all alike likely."""
    key = jax.random.fold_in(jax.random.key(self.seed), _DRAW)
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
    low: GaLoreState,
    momentum: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Directions of the matrices that are held, and their momentum.

    They are walked by a loop, so that one of them is worked on at a time.
    """
    site = family.sites[0]
    size = max(site.low_shape[-2:]) ** 0.5  # that of the low-rank branch
    weight = family.count / len(momentum)
    read = functools.partial(_read, family, leaves, low.projector)
    exact = _are_exact(low.projector[site.path])

    def one(slot: jax.Array, carry: tuple) -> tuple:
      found, momentum = carry
      rest = weight * _rest(*read(held[slot]), exact)
      kept = decay * momentum[slot].astype(rest.dtype) + rest
      seen = rest + self.decay * kept if self.nesterov else kept
      done = size * linalg.polar_factor(seen)
      return (
        found.at[slot].set(done.astype(found.dtype)),
        momentum.at[slot].set(kept.astype(momentum.dtype)),
      )

    wide = jnp.promote_types(momentum.dtype, jnp.float32)
    start = (jnp.zeros_like(momentum, wide), momentum)
    return jax.lax.fori_loop(0, len(momentum), one, start)


def _number_of(sampled: Any, count: int) -> int:
  """How many of a family are drawn: at least one, and never all."""
  if isinstance(sampled, jax.core.Tracer):
    raise ValueError(
      "`sampled` decides the shapes of the state and cannot be traced. Under "
      "`optax.inject_hyperparams`, call `init` outside of `jax.jit` and "
      "`jax.eval_shape`, or pass static_args=('sampled',)."
    )
  share = jnp.issubdtype(jnp.result_type(sampled), jnp.floating)
  number = round(float(sampled) * count) if share else int(sampled)
  return min(max(1, number), count - 1)


def _restarted(state: GaLoreState, begins: jax.Array) -> GaLoreState:
  """The low-rank branch, without its momentum where a period begins."""
  start = lambda x: jnp.where(begins, jnp.zeros_like(x), x)
  found = moments.find_moments(state.inner_state)
  none = {
    place: {path: start(x) for path, x in tree.low.items()}
    for place, (_, tree) in found.items()
  }
  return state._replace(
    inner_state=moments.replace_moments(state.inner_state, none)
  )


def _read(
  family: _Family,
  leaves: Mapping[str, jax.Array],
  kept: Mapping[str, Mapping[str, Any]],
  number: jax.Array,
) -> tuple[jax.Array, projection.Bases]:
  """The gradient of a matrix of a family, and its bases."""

  def take(site: plan_lib.Site, i: jax.Array) -> Any:
    bases = projection.read(kept[site.path])
    grad = site.view.as_matrix(leaves[site.path])
    wide = jnp.promote_types(grad.dtype, jnp.float32)
    at = lambda x: slices.take(slices.flat(x), i)
    return at(grad).astype(wide), jax.tree.map(at, bases)

  first = np.asarray(family.first[:-1], np.int32)
  member = jnp.sum(number >= first, dtype=jnp.int32) - 1
  return jax.lax.switch(
    member,
    [functools.partial(take, site) for site in family.sites],
    number - jnp.asarray(first)[member],
  )


def _rest(grad: jax.Array, bases: projection.Bases, exact: bool) -> jax.Array:
  """What bases leave out of a gradient, 0 where that is rounding noise.

  Where bases are orthonormal the rest is without what they span, but for noise
  of the whole gradient's size, which the polar factor would scale up: it is
  taken out once more. Where they are rounded, what is left there is no noise.
  """
  outside = lambda x: x - projection.lift(projection.project(x, bases), bases)
  grad = jnp.where(jnp.isfinite(grad).all(), grad, 0)
  rest = outside(outside(grad)) if exact else outside(grad)
  largest = lambda x: jnp.max(jnp.abs(x))
  return jnp.where(largest(rest) > _NOISE * largest(grad), rest, 0)


def _are_exact(kept: Any) -> bool:
  """Whether bases are orthonormal to the precision of float32."""
  return all(x.dtype == jnp.float32 for x in jax.tree.leaves(kept))


def _placed(
  family: _Family,
  held: jax.Array,
  found: jax.Array,
  updates: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
  """The updates of a family's leaves, with those of the held put in."""
  done = {}
  for site, first in zip(family.sites, family.first, strict=False):
    old = site.view.as_matrix(updates[site.path])
    own = (site.scale * found).astype(old.dtype)
    new = slices.put_many(slices.flat(old), own, held - first)
    done[site.path] = site.view.from_matrix(new.reshape(old.shape))
  return done


def weighed() -> optax.GradientTransformationExtraArgs:
  """Multiplies what is projected by the weights that `update` is given."""

  def update(
    updates: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[Any, Any]:
    del params
    weights = extra_args.get(_WEIGHTS, {})
    weigh = lambda path, x: x * weights[path] if path in weights else x
    return paths.map_with_path(weigh, updates), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


def _check_axes(site: plan_lib.Site) -> None:
  """Refuses a matrix at full rank that is not its leaf's last two axes."""
  if site.view != matrix_view.matrix_view(site.view.shape):
    raise ValueError(
      f"gum cannot keep the matrix {site.path!r} at full rank: no other has "
      "its shape, and its rule names other rows and columns than the last two "
      "axes, which the inner optimizer sees. Give it the rule None for AdamW, "
      "or use `sumo`, which projects every matrix."
    )


def _warn_of_single(alone: list[str]) -> None:
  told = ", ".join(map(repr, alone[:8])) + (", ..." if alone[8:] else "")
  warnings.warn(
    f"gum keeps {len(alone)} matrices at full rank, {told}: no other has their "
    "shape, and to hold the momentum of one of one takes as much as that. "
    "`sumo` projects every matrix.",
    stacklevel=4,  # of the call of `init`
  )


_LAYERWISE = """\
`gum` draws matrices among all layers and keeps one momentum for those that are
drawn, which an update of one layer after the other (`layerwise`) cannot have.
Use the usual step, or `sumo`, which treats every matrix by itself."""
