r"""LDAdam's way of carrying Adam's second moment over to a new basis.

It takes the bias-corrected moments for the mean and the variance of the
projected gradient, for which Adam's decays and step count must be known.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import linalg
from galore_optax.subspace import projection
from galore_optax.tree import split


def check_adam(inner_state: Any) -> None:
  """Raises unless an inner state has the two moments of Adam.

  Args:
    inner_state: The inner optimizer's state.
  """
  states = jax.tree.leaves(inner_state, is_leaf=_is_known)
  if any(isinstance(x, optax.MultiStepsState) for x in states):
    raise ValueError(
      'moments="ldadam" needs the number of Adam\'s steps, which an `inner` '
      "with `optax.MultiSteps` does not take at every call. Put "
      "`optax.MultiSteps` around the whole optimizer."
    )
  if not any(isinstance(x, optax.ScaleByAdamState) for x in states):
    raise ValueError(
      'moments="ldadam" is for an `inner` with `optax.scale_by_adam`, such as '
      "`optax.adamw`, with moments that are arrays: it joins its two moments, "
      'which this one does not have. Use moments="rotate".'
    )


def bias_ratios(
  inner: optax.GradientTransformationExtraArgs,
  state: Any,
  updates: Any,
  params: Any,
  extra_args: Mapping[str, Any],
) -> dict[str, jax.Array]:
  r"""What makes Adam's second moments comparable with squares of the first.

  .. math::

    \kappa = \frac{1 - \beta_2^t}{(1 - \beta_1^t)^2}

  after t steps. The decays are found from what a step on zeros makes of moments
  of one element, all equal to 1.

  Args:
    inner: The inner optimizer.
    state: Its state, with the parameters' structure.
    updates: The gradients; only their structure counts.
    params: The parameters, or None; likewise.
    extra_args: Extra arguments of its update.

  Returns:
    Place of each second moment in the state, see
    :func:`galore_optax.subspace.moments.of_state`, to κ.
  """
  # In narrow floats a decay of 0.999 would be read as 1.
  ones = lambda x: jnp.ones(
    (1,) * jnp.ndim(x), jnp.promote_types(jnp.result_type(x), jnp.float32)
  )
  zeros = lambda tree: jax.tree.map(lambda x: 0 * ones(x), tree)
  probe = optax.tree.map_params(inner.init, ones, state)
  small = None if params is None else zeros(params)
  _, after = inner.update(zeros(updates), probe, small, **extra_args)
  counts = _adam_states(state)
  ratios = {}
  for place, found in _adam_states(after).items():
    if not jax.tree.leaves(found.mu):
      continue
    steps = jnp.asarray(counts[place].count)
    b1, b2 = (
      jax.tree.leaves(x)[0].astype(jnp.float32).ravel()[0]
      for x in (found.mu, found.nu)
    )
    # Before the first step there are no moments to carry over.
    left = jnp.where(steps > 0, 1 - b1**steps, 1)
    ratios[f"{place}.nu"] = jnp.where(steps > 0, 1 - b2**steps, 1) / left**2
  return ratios


def _is_known(x: Any) -> bool:
  return isinstance(x, optax.ScaleByAdamState | optax.MultiStepsState)


def _adam_states(state: Any) -> dict[str, optax.ScaleByAdamState]:
  """Adam's states in a state, by their places."""
  flat = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_known)[0]
  return {
    jax.tree_util.keystr(keys): x
    for keys, x in flat
    if isinstance(x, optax.ScaleByAdamState)
  }


def rotate(moment: jax.Array, turn: projection.Bases, order: int) -> jax.Array:
  r"""Carries a moment over into new bases.

  The first moment is linear in the gradient, :math:`\mu \leftarrow C \mu`. The
  second is a mean of squares, of which the diagonal approximation keeps
  :math:`\nu \leftarrow (C \circ C) \nu`.

  Args:
    moment: A moment of the shape of the projected gradient.
    turn: Overlap of the new bases with the old ones, see :func:`overlap`.
    order: 1 or 2.

  Returns:
    The moment in the new bases, same shape and dtype.
  """
  dtype = moment.dtype
  if "left" in turn:
    moment = linalg.matmul("...rs,...sn->...rn", turn["left"] ** order, moment)
  if "right" in turn:
    moment = linalg.matmul("...ms,...rs->...mr", moment, turn["right"] ** order)
  return moment.astype(dtype)


def rotate_variance(
  nu: jax.Array, mu: jax.Array, turn: projection.Bases, ratio: jax.Array
) -> jax.Array:
  r"""Carries Adam's second moment over as mean and variance (LDAdam).

  With the first moment μ and :math:`\kappa = (1 - \beta_2^t) / (1 -
  \beta_1^t)^2`, for which :math:`\nu - \kappa \mu^2` is the variance,

  .. math::

    \nu \leftarrow \left| (C \circ C)(\nu - \kappa \mu^2)
      + \kappa (C \mu)^2 \right|

  Args:
    nu: The second moment, of the shape of the projected gradient.
    mu: The first moment, before it is carried over.
    turn: Overlap of the new bases with the old ones, see :func:`overlap`.
    ratio: κ, scalar.

  Returns:
    The second moment in the new bases, same shape and dtype.
  """
  mu = mu.astype(jnp.promote_types(mu.dtype, jnp.float32))
  spread = rotate(nu - ratio * mu * mu, turn, 2)
  mean = rotate(mu, turn, 1)
  return jnp.abs(spread + ratio * mean * mean).astype(nu.dtype)


# Fields of the states of Optax (and its contrib) that hold running means of
# gradients, order 1, and of their squares, order 2.
_FIRST = ("mu", "trace", "ema", "momentum", "exp_avg", "grad_sum")
_SECOND = ("nu", "nu_max", "sum_of_squares", "exp_avg_sq")
# What is not yet a moment: sums for a step that is still to come, those of
# `optax.MultiSteps` and of `optax.apply_every`.
SUMS = ("acc_grads", "grad_acc")
_ORDERS = {
  **dict.fromkeys((*_FIRST, *SUMS), 1),
  **dict.fromkeys(_SECOND, 2),
}
# States that call them otherwise.
_ORDERS_IN = {
  "FactoredState": {"v": 2},
  "ScaleByAdanState": {"m": 1, "v": 1, "g": 1, "n": 2},
  "ScaleBySM3State": {"nu": 1},
  "ScaleByAdemamixState": {"m1": 1, "m2": 1, "nu": 2},
  "ScaleBySimplifiedAdEMAMixState": {"m": 1, "n": 2},
  "MadgradState": {"s": 1, "grad_sum_sq": 2},
  "ScaleByAdaDeltaState": {"e_g": 2, "e_x": 2},
  "ScaleByOptimisticGradientState": {"previous_gradient": 1},
  "ScaleByRpropState": {"prev_updates": 1},
}


def of_state(state: Any) -> dict[str, tuple[int, split.Split]]:
  """The trees of a kept inner state that can be carried over to new bases.

  Moments are known by the names of their fields in Optax's states: a first
  moment is linear in the gradient, a second one a mean of its squares.

  Args:
    state: An inner state as it is kept.

  Returns:
    Place in the state to the order of the moment, 1 or 2, and its tree.
  """
  flat = jax.tree_util.tree_flatten_with_path(state, is_leaf=split.is_split)[0]
  found = [
    (keys, _order(state, keys), x) for keys, x in flat if split.is_split(x)
  ]
  return {
    jax.tree_util.keystr(keys): (order, x)
    for keys, order, x in found
    if order is not None
  }


def is_sum(place: str) -> bool:
  """Whether a place of :func:`moments` is of gradients that are added up.

  They belong to a step that is still to come, so they are neither kept in
  another basis nor given up.
  """
  return place.rpartition(".")[2] in SUMS


def _order(state: Any, keys: tuple) -> int | None:
  """The order of a tree in a state; None: it is no moment."""
  field = str(getattr(keys[-1], "name", ""))
  for key in keys[:-1]:
    if isinstance(key, jax.tree_util.FlattenedIndexKey):
      return _ORDERS.get(field)  # nothing leads to what it is a part of
    if hasattr(key, "name"):
      state = getattr(state, key.name)
    else:
      state = state[key.idx if hasattr(key, "idx") else key.key]
  return _ORDERS_IN.get(type(state).__name__, _ORDERS).get(field)


def update_low(state: Any, new: Mapping[str, Mapping[str, jax.Array]]) -> Any:
  """Replaces low-rank leaves of a kept inner state.

  Args:
    state: An inner state as it is kept.
    new: Place in the state, see :func:`moments`, to path to new leaf.

  Returns:
    The state with these leaves replaced.
  """

  def replace(keys: tuple, x: Any) -> Any:
    leaves = new.get(jax.tree_util.keystr(keys), {})
    return x._replace(low={**x.low, **leaves}) if leaves else x

  return jax.tree_util.tree_map_with_path(
    replace, state, is_leaf=split.is_split
  )
