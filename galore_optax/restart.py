"""What ReLoRA does to learning rate and moments where it starts anew."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks, qarray

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

  Args:
    key: Random key for `random`.
    state: An optimizer's state.
    is_factors: Whether a node holds the moments of factors.
    pruning: `magnitude` keeps the largest of each matrix, `random` any.
    share: Of the entries, that become zero; 1 for all of them.

  Returns:
    The state.
  """
  flat, treedef = jax.tree.flatten(state, is_leaf=is_factors)
  return treedef.unflatten(
    [
      _thin_node(jax.random.fold_in(key, i), x, pruning, share)
      if is_factors(x)
      else x
      for i, x in enumerate(flat)
    ]
  )


def _thin_node(key: jax.Array, node: Any, pruning: str, share: float) -> Any:
  flat, treedef = jax.tree.flatten(node, is_leaf=qarray.is_quantized)
  return treedef.unflatten(
    [
      _thin(jax.random.fold_in(key, i), x, pruning, share)
      for i, x in enumerate(flat)
    ]
  )


def _thin(key: jax.Array, x: Any, pruning: str, share: float) -> Any:
  if qarray.is_quantized(x):
    kept = _thin(key, qarray.dequantize(x), pruning, share)
    return qarray.requantize(x, kept)
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    return x
  if share >= 1:
    return jnp.zeros_like(x)
  if pruning == "random":
    return jnp.where(jax.random.bernoulli(key, 1 - share, x.shape), x, 0)
  size = jnp.abs(x).astype(jnp.float32)
  axes = tuple(range(max(0, x.ndim - 2), x.ndim))  # matrix by matrix
  least = jnp.quantile(size, share, axis=axes, keepdims=True)
  return jnp.where(size > least, x, jnp.zeros_like(x))
