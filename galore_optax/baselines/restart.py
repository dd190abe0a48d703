"""Restarts of ReLoRA: the learning rate after them, and pruned moments."""

import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks
from galore_optax.quantization import qarray
from galore_optax.subspace import moments as moments_lib
from galore_optax.tree import paths

PRUNINGS = ("magnitude", "random")


def jagged_schedule(
  schedule: optax.ScalarOrSchedule, reset_every: int, warmup: int
) -> optax.Schedule:
  r"""A learning-rate schedule with a warm-up after each restart.

  At step t of a schedule η, with k = t mod T steps since the last restart,

  .. math::

    \eta(t)\, \min(1, k / w) \quad \text{for } t \ge T, \qquad
    \eta(t) \quad \text{before}

  Args:
    schedule: Learning rate without restarts; its own warm-up, if any, is kept.
    reset_every: Steps T between two restarts.
    warmup: Steps w of each warm-up after a restart; 0 for none.

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
    3. There a warm-up ends at the learning rate of the restart, here at that
    of the current step.
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


def prune_moments(
  key: jax.Array,
  state: Any,
  is_factors: Callable[[Any], bool],
  pruning: str,
  share: float,
  projected: Collection[str] = (),
) -> Any:
  """Sets most of the moments of factors to zero.

  All moments of an entry are kept or set to zero together: a first moment
  without its second one would be divided by epsilon.

  Args:
    key: Random key for `random`.
    state: An optimizer's state.
    is_factors: Whether a node holds moments of one leaf's factors.
    pruning: `magnitude` keeps the entries of each matrix whose moments have
      the largest product, `random` keeps random entries.
    share: Share of the entries that is set to zero, from 0 to 1.
    projected: Paths of factors, of which GaLore keeps moments at a lower rank.

  Returns:
    The state.
  """
  if share <= 0:
    return state
  flat, treedef = paths.flatten(state, is_factors)
  nodes = [x for _, x in flat]
  groups: dict[Any, list[int]] = {}  # nodes of one leaf: its first moment, ...
  for i, (keys, x) in enumerate(flat):
    names = [getattr(key, "name", "") for key in keys]
    # Gradients that are added up belong to a step that is still to come.
    if any(name in (*moments_lib.SUMS, "accumulator") for name in names):
      continue
    last = getattr(keys[-1], "key", None) if keys else None
    of_galore = "low" in names[-2:-1] and last in projected
    if is_factors(x) or of_galore:
      groups.setdefault(keys[-1], []).append(i)
  for number, indices in enumerate(groups.values()):
    leaf_key = jax.random.fold_in(key, number)
    group = [nodes[i] for i in indices]
    pruned = _prune_nodes(leaf_key, group, pruning, share)
    for i, node in zip(indices, pruned, strict=True):
      nodes[i] = node
  return treedef.unflatten(nodes)


def _prune_nodes(
  key: jax.Array, nodes: list[Any], pruning: str, share: float
) -> list[Any]:
  """Prunes the moments of one leaf's factors, factor by factor."""
  parts = [jax.tree.flatten(x, is_leaf=qarray.is_quantized) for x in nodes]
  pruned = [
    _prune(jax.random.fold_in(key, i), list(moments), pruning, share)
    for i, moments in enumerate(zip(*(flat for flat, _ in parts), strict=True))
  ]
  return [
    treedef.unflatten([moments[i] for moments in pruned])
    for i, (_, treedef) in enumerate(parts)
  ]


def _prune(
  key: jax.Array, moments: list[Any], pruning: str, share: float
) -> list[Any]:
  """Prunes the moments of one factor; equal shapes lose the same entries."""
  arrays = [
    qarray.dequantize(x) if qarray.is_quantized(x) else x for x in moments
  ]
  inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in arrays]
  by_shape: dict[tuple[int, ...], list[jax.Array]] = {}
  for x, is_moment in zip(arrays, inexact, strict=True):
    if is_moment:
      by_shape.setdefault(x.shape, []).append(x)
  keep = {
    shape: _keep_mask(key, same, pruning, share)
    for shape, same in by_shape.items()
  }
  pruned = []
  for x, value, is_moment in zip(moments, arrays, inexact, strict=True):
    if is_moment:
      value = jnp.where(keep[value.shape], value, jnp.zeros_like(value))
      x = qarray.requantize(x, value) if qarray.is_quantized(x) else value
    pruned.append(x)
  return pruned


def _keep_mask(
  key: jax.Array, moments: list[jax.Array], pruning: str, share: float
) -> jax.Array:
  """Whether each entry of a factor is kept."""
  shape = moments[0].shape
  if share >= 1:
    return jnp.zeros(shape, bool)
  if pruning == "random":
    return jax.random.bernoulli(key, 1 - share, shape)
  # Logarithms are added, because the product may be too small for float32.
  logs = [jnp.log(jnp.abs(x).astype(jnp.float32)) for x in moments]
  size = jnp.sum(jnp.stack(logs), axis=0)
  # By rank and not by value, because moments may be equal.
  of_matrix = size.reshape(*shape[: max(0, len(shape) - 2)], -1)
  rank = jnp.argsort(jnp.argsort(of_matrix, axis=-1), axis=-1)
  dropped = math.floor(share * (of_matrix.shape[-1] - 1)) + 1
  return (rank >= dropped).reshape(shape)
