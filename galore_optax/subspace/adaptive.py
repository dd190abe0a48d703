"""Adaptive refresh schedules: a settled subspace is refreshed less often."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_optax import checks
from galore_optax.subspace import projection

# The longest gap in steps; keeps counters within int32.
_LONGEST = 2.0**30

MEASURES = ("overlap", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptive:
  r"""When the refresh gap of a matrix grows, for `Refresh(policy="adaptive")`.

  At every refresh of a matrix its new subspace is compared with the old one.
  When the mean of the last `window` similarities reaches `threshold`, the gap
  to the next refresh is multiplied by `growth`. The defaults of threshold,
  window and growth are Q-GaLore's; the limit and `overlap` are this library's.

  Attributes:
    threshold: Mean similarity at which a subspace counts as settled, 0.4.
    window: Number of similarities that are averaged, 5.
    growth: Factor on the gap, 2.
    limit: Largest gap, as a multiple of `update_proj_gap`, 16.
    measure: How similar two subspaces are. `overlap`: :math:`\|P_{new}^\top
      P_{old}\|_F^2 / r`, the mean squared cosine between them. For exact bases
      of pure noise it is r / m. `finder="subspace"` starts from the old basis
      and keeps more of it where no directions stand out: about 0.5 for r / m
      from 1/8 to 1/4. With small noisy batches the threshold should therefore
      be above 0.5. `cosine`: the magnitude of the cosine between the leading
      singular vectors, as in the paper; needs `finder="svd"`, whose bases are
      sorted by singular value.

  Example:
    >>> Adaptive(threshold=0.6).growth
    2.0

  References:
    Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024, section
    3.2.
  """

  threshold: float = 0.4
  window: int = 5
  growth: float = 2.0
  limit: float = 16.0
  measure: str = "overlap"

  def __post_init__(self):
    """Refuses values out of range."""
    checks.check_choice("measure", self.measure, MEASURES)
    if isinstance(self.window, bool) or not isinstance(self.window, int):
      raise TypeError(f"`window` must be an int, got {self.window!r}.")
    for name in ("threshold", "window"):
      checks.check_positive(name, getattr(self, name))
    for name in ("growth", "limit"):
      checks.check_number(name, getattr(self, name))
      if getattr(self, name) < 1:
        raise ValueError(
          f"`{name}` must be at least 1, got {getattr(self, name)}."
        )


class Number(NamedTuple):
  """The number of a matrix among all `count` matrices."""

  index: Any
  count: Any


class State(NamedTuple):
  """The schedule of the matrices of one leaf; all have the stack's shape.

  Attributes:
    due_at: Step of the next refresh, int32.
    gap: Steps from a refresh to the next, int32.
    similarities: The last `window` similarities, newest first; float32, on an
      additional last axis.
    refreshes: Number of refreshes so far, int32.
  """

  due_at: Any
  gap: Any
  similarities: Any
  refreshes: Any

  def due(self, step: jax.Array) -> jax.Array:
    """Whether each matrix is due, bool (count,)."""
    return (self.due_at <= step).reshape(-1)

  def flat(self) -> "State":
    """The same schedule with one stack axis."""
    window = self.similarities.shape[-1:]
    return State(
      self.due_at.reshape(-1),
      self.gap.reshape(-1),
      self.similarities.reshape(-1, *window),
      self.refreshes.reshape(-1),
    )

  def refreshed(
    self,
    rule: Adaptive,
    step: jax.Array,
    number: Number,
    gap: Any,
    similarity: jax.Array,
    is_valid: jax.Array,
  ) -> "State":
    """The schedule of one matrix after a refresh.

    Args:
      rule: When the gap grows.
      step: Steps so far.
      number: Number of the matrix among all, which sets its phase.
      gap: The initial gap, in steps.
      similarity: Similarity of the new subspace to the old one, scalar.
      is_valid: Whether the gradient was finite and non-zero. If it was not, the
        basis stayed as it was, which does not mean that it has settled.
    """
    base = jnp.maximum(jnp.asarray(gap).astype(jnp.int32), 1)
    first = self.refreshes == 0
    # The first refresh can only be compared with the initial basis.
    similarities = jnp.concatenate([similarity[None], self.similarities[:-1]])
    similarities = jnp.where(first | ~is_valid, self.similarities, similarities)
    full = self.refreshes >= rule.window
    settled = is_valid & full & (similarities.mean() >= rule.threshold)
    grown = jnp.minimum(self.gap * rule.growth, base * rule.limit)
    grown = jnp.minimum(grown, _LONGEST)
    new_gap = jnp.where(settled, grown.astype(jnp.int32), self.gap)
    new_gap = jnp.where(first, base, new_gap)
    # All matrices are refreshed at step 0; the next time each at its phase.
    phase = _phase(base, number)
    wait = jnp.where(first & (phase > 0), phase, new_gap)
    return State(step + wait, new_gap, similarities, self.refreshes + 1)


def _phase(gap: jax.Array, number: Number) -> jax.Array:
  """`index * gap // count` without the product, which may overflow."""
  whole, rest = gap // number.count, gap % number.count
  return number.index * whole + number.index * rest // number.count


def start(stack: tuple[int, ...], rule: Adaptive) -> State:
  """The schedule before the first refresh.

  Args:
    stack: Sizes of the axes that count a leaf's matrices.
    rule: When the gap grows.

  Returns:
    The state; all matrices are due.
  """
  counter = lambda: jnp.zeros(stack, jnp.int32)
  similarities = jnp.zeros((*stack, int(rule.window)), jnp.float32)
  return State(counter(), counter(), similarities, counter())


def similarity(
  measure: str,
  new: projection.Bases,
  old: projection.Bases,
  overlap: projection.Bases,
) -> jax.Array:
  """Similarity of two subspaces, from 0 to 1; of two sides, the smaller one.

  Args:
    measure: See :class:`Adaptive`.
    new: New bases of one matrix.
    old: Old bases.
    overlap: Their overlap C, see
      :func:`galore_optax.subspace.projection.overlap`.

  Returns:
    float32 scalar.
  """
  if measure == "cosine":
    sides = [jnp.abs(jnp.sum(new[s][:, 0] * old[s][:, 0])) for s in new]
  else:
    sides = [jnp.sum(c * c) / c.shape[-1] for c in overlap.values()]
  # The columns of a basis in few bits do not have exactly unit length.
  return jnp.minimum(jnp.min(jnp.stack(sides)), 1).astype(jnp.float32)
