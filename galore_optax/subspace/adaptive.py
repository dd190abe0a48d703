"""Refreshes that become rarer where a subspace has settled."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_optax import checks
from galore_optax.subspace import projection

# Steps that a matrix waits at most, for counters to stay in range.
_LONGEST = 2.0**30

MEASURES = ("overlap", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptive:
  r"""When the gap of a matrix grows, for `refresh="adaptive"`.

  At every refresh of a matrix the new subspace is compared with the old one.
  Where the mean of the last `window` similarities reaches `threshold`, the
  matrix waits `growth` times longer from then on. Threshold, window and growth
  are Q-GaLore's by default; the limit and `overlap` are not.

  Attributes:
    threshold: Similarity from which on a subspace counts as settled.
    window: Number of similarities that are averaged.
    growth: Factor on the gap.
    limit: Largest gap, as a multiple of `update_proj_gap`.
    measure: `overlap`: :math:`\|P_{new}^\top P_{old}\|_F^2 / r`, the mean
      squared cosine between the subspaces. For exact bases of pure noise it is
      r / m. `projector="subspace"` starts from the old basis and keeps more of
      it where no directions stand out: about 0.5 for r / m from 1/8 to 1/4, so
      that the threshold should be higher than it for small noisy batches.
      `cosine`: the magnitude of the cosine between the leading singular
      vectors, as in the paper; needs `projector="svd"`, whose bases are
      ordered.

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
    """Refuses values that make no schedule."""
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
  """A matrix's number among all."""

  index: Any
  count: Any


class State(NamedTuple):
  """The schedule of the matrices of one leaf; all have the stack's shape.

  Attributes:
    due_at: Step of the next refresh, int32.
    gap: Steps from each refresh to the next, int32.
    similarities: The last ones, the newest first; float32, one axis more.
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
    """The matrices along one axis."""
    window = self.similarities.shape[-1:]
    return State(
      self.due_at.reshape(-1),
      self.gap.reshape(-1),
      self.similarities.reshape(-1, *window),
      self.refreshes.reshape(-1),
    )

  def refreshed(
    self,
    how: Adaptive,
    step: jax.Array,
    number: Number,
    gap: Any,
    similarity: jax.Array,
    told: jax.Array,
  ) -> "State":
    """The schedule of one matrix after a refresh.

    Args:
      how: The rule.
      step: Steps so far.
      number: Number of the matrix among all, which decides its turn.
      gap: Steps between two refreshes at first.
      similarity: Of the new subspace to the old one, scalar.
      told: Whether the gradient told anything; one that is zero or not finite
        leaves the subspace as it is, which does not mean that it has settled.
    """
    base = jnp.maximum(jnp.asarray(gap).astype(jnp.int32), 1)
    first = self.refreshes == 0
    # The first refresh has nothing to compare with but the random start.
    seen = jnp.concatenate([similarity[None], self.similarities[:-1]])
    seen = jnp.where(first | ~told, self.similarities, seen)
    full = self.refreshes >= how.window
    settled = told & full & (seen.mean() >= how.threshold)
    grown = jnp.minimum(self.gap * how.growth, base * how.limit)
    grown = jnp.minimum(grown, _LONGEST)
    new_gap = jnp.where(settled, grown.astype(jnp.int32), self.gap)
    new_gap = jnp.where(first, base, new_gap)
    # From step 0, where all are refreshed, they get in line.
    turn = _share(base, number)
    wait = jnp.where(first & (turn > 0), turn, new_gap)
    return State(step + wait, new_gap, seen, self.refreshes + 1)


def _share(gap: jax.Array, number: Number) -> jax.Array:
  """Index * gap // count, without the product, which may be out of range."""
  whole, rest = gap // number.count, gap % number.count
  return number.index * whole + number.index * rest // number.count


def start(stack: tuple[int, ...], how: Adaptive) -> State:
  """The schedule before the first refresh.

  Args:
    stack: Sizes of the axes that count a leaf's matrices.
    how: The rule.

  Returns:
    The state; all matrices are due.
  """
  counter = lambda: jnp.zeros(stack, jnp.int32)
  seen = jnp.zeros((*stack, int(how.window)), jnp.float32)
  return State(counter(), counter(), seen, counter())


def similarity(
  measure: str,
  new: projection.Bases,
  old: projection.Bases,
  turn: projection.Bases,
) -> jax.Array:
  """How alike two subspaces are, from 0 to 1; the worse side counts.

  Args:
    measure: See :class:`Adaptive`.
    new: New bases of one matrix.
    old: Old bases.
    turn: Their overlap, see :func:`galore_optax.subspace.projection.overlap`.

  Returns:
    float32 scalar.
  """
  if measure == "cosine":
    found = [jnp.abs(jnp.sum(new[s][:, 0] * old[s][:, 0])) for s in new]
  else:
    found = [jnp.sum(c * c) / c.shape[-1] for c in turn.values()]
  # Bases that are kept in a few bits are not quite of length one.
  return jnp.minimum(jnp.min(jnp.stack(found)), 1).astype(jnp.float32)
