"""What ReLoRA does to learning rate and moments where it starts anew."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks
from galore_optax.quantization import qarray
from galore_optax.subspace import moments as moments_lib

PRUNINGS = ("magnitude", "random")


def jagged_schedule(
  schedule: optax.ScalarOrSchedule, reset_every: int, warmup: int
) -> optax.Schedule:
  r"""A schedule that warms up anew after each restart.

  At step t of a schedule η, with k = t mod T steps since the last restart,

  .. math::

    \eta(t)\, \min(1, k / w) \quad \text{for } t \ge T, \qquad
    \eta(t) \quad \text{before}

  Args:
    schedule: Learning rate without restarts, with a warm-up of its own.
    reset_every: Steps T between two restarts.
    warmup: Steps w in which the learning rate comes back; 0 for at once.

  Returns:
    The schedule.

  Raises:
    ValueError: If `reset_every` is not positive, or `warmup` is negative or
      not shorter than `reset_every`.

  Example:
    >>> import optax
    >>> rate = jagged_schedule(optax.constant_schedule(1.0), 100, warmup=10)
    >>> [float(rate(t)) for t in (0, 99, 100, 105, 110, 205)]
    [1.0, 1.0, 0.0, 0.5, 1.0, 0.5]

  References:
    Lialin et al., `ReLoRA <https://arxiv.org/abs/2307.05695>`_, 2023, section
    3. There the rate rises to that of the last restart, here to that of the
    step.
  """
  checks.check_positive("reset_every", reset_every)
  if not 0 <= warmup < reset_every:
    raise ValueError(
      f"`warmup` must be 0 or more steps, and fewer than the {reset_every} of "
      f"`reset_every`, got {warmup!r}."
    )
  base = schedule if callable(schedule) else optax.constant_schedule(schedule)

  def rate(count: Any) -> Any:
    count = jnp.asarray(count)
    ramp = jnp.minimum(1.0, (count % reset_every) / max(warmup, 1))
    again = (count >= reset_every) & (warmup > 0)
    return base(count) * jnp.where(again, ramp, 1.0)

  return rate


def thin_out(
  key: jax.Array,
  state: Any,
  is_factors: Callable[[Any], bool],
  pruning: str,
  share: float,
) -> Any:
  """Sets most of the moments of factors to zero.

  All moments of an entry go or stay together: a first moment without its
  second would be divided by epsilon.

  Args:
    key: Random key for `random`.
    state: An optimizer's state.
    is_factors: Whether a node holds moments of one leaf's factors.
    pruning: `magnitude` keeps the entries of each matrix whose moments have
      the largest product, `random` any.
    share: Of the entries, that become zero; 0 for none, 1 for all of them.

  Returns:
    The state.
  """
  if share <= 0:
    return state
  flat, treedef = jax.tree_util.tree_flatten_with_path(
    state, is_leaf=is_factors
  )
  found = [x for _, x in flat]
  groups: dict[Any, list[int]] = {}  # nodes of one leaf: its first moment, ...
  for i, (path, x) in enumerate(flat):
    # Gradients that are added up are of a step that is still to come.
    pending = any(getattr(key, "name", "") in moments_lib.SUMS for key in path)
    if is_factors(x) and not pending:
      groups.setdefault(path[-1], []).append(i)
  for number, places in enumerate(groups.values()):
    own = jax.random.fold_in(key, number)
    nodes = _thin_nodes(own, [found[i] for i in places], pruning, share)
    for i, node in zip(places, nodes, strict=True):
      found[i] = node
  return treedef.unflatten(found)


def _thin_nodes(
  key: jax.Array, nodes: list[Any], pruning: str, share: float
) -> list[Any]:
  """The moments of one leaf's factors, factor by factor."""
  parts = [jax.tree.flatten(x, is_leaf=qarray.is_quantized) for x in nodes]
  thinned = [
    _thin(jax.random.fold_in(key, i), list(moments), pruning, share)
    for i, moments in enumerate(zip(*(flat for flat, _ in parts), strict=True))
  ]
  return [
    treedef.unflatten([moments[i] for moments in thinned])
    for i, (_, treedef) in enumerate(parts)
  ]


def _thin(
  key: jax.Array, moments: list[Any], pruning: str, share: float
) -> list[Any]:
  """The moments of one factor; those of one shape lose the same entries."""
  whole = [
    qarray.dequantize(x) if qarray.is_quantized(x) else x for x in moments
  ]
  counted = [jnp.issubdtype(x.dtype, jnp.inexact) for x in whole]
  of_shape: dict[tuple[int, ...], list[jax.Array]] = {}
  for x, is_moment in zip(whole, counted, strict=True):
    if is_moment:
      of_shape.setdefault(x.shape, []).append(x)
  keep = {
    shape: _kept(key, same, pruning, share) for shape, same in of_shape.items()
  }
  found = []
  for x, value, is_moment in zip(moments, whole, counted, strict=True):
    if is_moment:
      value = jnp.where(keep[value.shape], value, jnp.zeros_like(value))
      x = qarray.requantize(x, value) if qarray.is_quantized(x) else value
    found.append(x)
  return found


def _kept(
  key: jax.Array, moments: list[jax.Array], pruning: str, share: float
) -> jax.Array:
  """Which entries of a factor stay."""
  shape = moments[0].shape
  if share >= 1:
    return jnp.zeros(shape, bool)
  if pruning == "random":
    return jax.random.bernoulli(key, 1 - share, shape)
  # The logarithm of the product, which itself may be too small for float32.
  size = sum(jnp.log(jnp.abs(x).astype(jnp.float32)) for x in moments)
  axes = tuple(range(max(0, len(shape) - 2), len(shape)))  # matrix by matrix
  least = jnp.quantile(size, share, axis=axes, keepdims=True, method="lower")
  return size > least
