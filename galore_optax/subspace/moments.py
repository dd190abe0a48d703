r"""Carries an inner optimizer's moments into a new basis.

A refresh replaces the basis P in which the moments are expressed. Everything
that carries them over is here, step by step:

* `find_moments` finds the moments in an inner state, and the degree of each: 1
  for means of gradients, 2 for means of their squares. `replace_moments` puts
  new ones in their place.
* `rotate` carries a moment over by :math:`C = P_{new}^\top P_{old}`.
* `rotate_variance` carries Adam's second moment over as a variance and a
  squared mean, as LDAdam does. It needs Adam's decays and number of steps, in
  the form of `bias_ratios`; `check_adam` says whether the state has them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import linalg
from galore_optax.subspace import projection
from galore_optax.tree import sides, split

# Fields of the states of Optax (and of its contrib) that hold running means of
# gradients, degree 1, and of their squares, degree 2.
_FIRST = ("mu", "trace", "ema", "momentum", "exp_avg", "grad_sum")
_SECOND = ("nu", "nu_max", "sum_of_squares", "exp_avg_sq")
# Fields of `optax.MultiSteps` and `optax.apply_every` that add up gradients for
# a step still to come. They are no moments yet.
SUMS = ("acc_grads", "grad_acc")
_DEGREES = {
  **dict.fromkeys((*_FIRST, *SUMS), 1),
  **dict.fromkeys(_SECOND, 2),
}
# States whose fields have other names, or other meanings.
_DEGREES_IN = {
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


def find_moments(state: Any) -> dict[str, tuple[int, split.Split]]:
  """The moments in an inner state that can be carried into new bases.

  Moments are recognized by the names of their fields in Optax's states. A first
  moment is linear in the gradient, a second one is a mean of its squares.

  Args:
    state: An inner state as
      :func:`galore_optax.tree.split.split_state` returns it.

  Returns:
    Key path in the state (as `jax.tree_util.keystr` writes it) to the degree of
    the moment, 1 or 2, and its tree.
  """
  flat = jax.tree_util.tree_flatten_with_path(state, is_leaf=split.is_split)[0]
  trees = [
    (keys, _degree(state, keys), x) for keys, x in flat if split.is_split(x)
  ]
  return {
    jax.tree_util.keystr(keys): (degree, x)
    for keys, degree, x in trees
    if degree is not None
  }


def is_pending_sum(key_path: str) -> bool:
  """Whether a tree that `find_moments` found adds up gradients.

  The sum is for a step that is still to come. At a refresh it is therefore
  always rotated, also where moments are left as they are or reset.

  Args:
    key_path: A key of what :func:`find_moments` returns.
  """
  return key_path.rpartition(".")[2] in SUMS


def _degree(state: Any, keys: tuple) -> int | None:
  """Degree of the tree at a key path of a state, or None if it is no moment."""
  field = str(getattr(keys[-1], "name", ""))
  for key in keys[:-1]:
    if isinstance(key, jax.tree_util.FlattenedIndexKey):
      # The node was flattened without keys: the next one cannot be reached.
      return _DEGREES.get(field)
    if hasattr(key, "name"):
      state = getattr(state, key.name)
    else:
      state = state[key.idx if hasattr(key, "idx") else key.key]
  return _DEGREES_IN.get(type(state).__name__, _DEGREES).get(field)


def replace_moments(
  state: Any, new: Mapping[str, Mapping[str, jax.Array]]
) -> Any:
  """An inner state with some of its low-rank moments replaced.

  Args:
    state: An inner state, split.
    new: Key path in the state, see :func:`find_moments`, to path of a projected
      leaf to its new moment.

  Returns:
    The state.
  """

  def replace(keys: tuple, x: Any) -> Any:
    leaves = new.get(jax.tree_util.keystr(keys), {})
    return x._replace(low={**x.low, **leaves}) if leaves else x

  return jax.tree_util.tree_map_with_path(
    replace, state, is_leaf=split.is_split
  )


def rotate(
  moment: jax.Array, rotation: projection.Bases, degree: int
) -> jax.Array:
  r"""Carries a moment into new bases.

  The first moment is linear in the gradient, :math:`\mu \leftarrow C \mu`. The
  second one is a mean of squares, which :math:`\nu \leftarrow (C \circ C) \nu`
  approximates by neglecting correlations between directions.

  Args:
    moment: A moment of the shape of the projected gradient.
    rotation: Side to C (r, r), the overlap of the new basis with the old one,
      see :func:`galore_optax.subspace.projection.overlap`.
    degree: 1 or 2.

  Returns:
    The moment in the new bases, of the same shape, float32 at least.
  """
  if "left" in rotation:
    left = rotation["left"] ** degree
    moment = linalg.matmul("...rs,...sn->...rn", left, moment)
  if "right" in rotation:
    right = rotation["right"] ** degree
    moment = linalg.matmul("...ms,...rs->...mr", moment, right)
  of_tensor = {
    side: jnp.swapaxes(c, -1, -2) ** degree
    for side, c in rotation.items()
    if sides.is_tensor_side(side)
  }
  return projection.project(moment, of_tensor)


def rotate_variance(
  nu: jax.Array, mu: jax.Array, rotation: projection.Bases, ratio: jax.Array
) -> jax.Array:
  r"""Carries Adam's second moment over as a variance and a squared mean.

  This is LDAdam's rule. With the first moment μ and :math:`\kappa = (1 -
  \beta_2^t) / (1 - \beta_1^t)^2`, for which :math:`\nu - \kappa \mu^2` is the
  variance,

  .. math::

    \nu \leftarrow \left| (C \circ C)(\nu - \kappa \mu^2)
      + \kappa (C \mu)^2 \right|

  Args:
    nu: The second moment, of the shape of the projected gradient.
    mu: The first moment, before it is rotated.
    rotation: As for :func:`rotate`.
    ratio: κ, a scalar, see :func:`bias_ratios`.

  Returns:
    The second moment in the new bases, of the same shape, float32 at least.
  """
  mu = mu.astype(jnp.promote_types(mu.dtype, jnp.float32))
  variance = rotate(nu - ratio * mu * mu, rotation, 2)
  mean = rotate(mu, rotation, 1)
  return jnp.abs(variance + ratio * mean * mean)


def check_adam(inner_state: Any) -> None:
  """Raises unless an inner state has Adam's two moments.

  Args:
    inner_state: The inner optimizer's state.
  """
  states = jax.tree.leaves(inner_state, is_leaf=_is_adam_or_multi_steps)
  if any(isinstance(x, optax.MultiStepsState) for x in states):
    raise ValueError(
      'moments="ldadam" needs the number of Adam\'s steps, which an `inner` '
      "with `optax.MultiSteps` does not take at every call. Put "
      "`optax.MultiSteps` around the whole optimizer."
    )
  if not any(isinstance(x, optax.ScaleByAdamState) for x in states):
    raise ValueError(
      'moments="ldadam" is for an `inner` with `optax.scale_by_adam`, such as '
      "`optax.adamw`, with moments that are arrays: it combines Adam's two "
      'moments, which this `inner` does not have. Use moments="rotate".'
    )


def bias_ratios(
  inner: optax.GradientTransformationExtraArgs,
  state: Any,
  updates: Any,
  params: Any,
  extra_args: Mapping[str, Any],
) -> dict[str, jax.Array]:
  r"""Ratio that makes squares of Adam's first moment comparable to the second.

  After t steps,

  .. math::

    \kappa = \frac{1 - \beta_2^t}{(1 - \beta_1^t)^2}

  The decays are read off a step of the inner optimizer whose gradients are all
  zeros and whose moments are all ones.

  Args:
    inner: The inner optimizer.
    state: Its state, with the parameters' structure.
    updates: The gradients, of which only the structure is used.
    params: The parameters, of which only the structure is used, or None.
    extra_args: Extra arguments of its update.

  Returns:
    Key path of each second moment in the state, see :func:`find_moments`, to κ.
  """
  # In a narrower float a decay of 0.999 would be read as 1.
  ones = lambda x: jnp.ones(
    (1,) * jnp.ndim(x), jnp.promote_types(jnp.result_type(x), jnp.float32)
  )
  zeros = lambda tree: jax.tree.map(lambda x: 0 * ones(x), tree)
  probe = optax.tree.map_params(inner.init, ones, state)
  small = None if params is None else zeros(params)
  _, after = inner.update(zeros(updates), probe, small, **extra_args)
  before = _adam_states(state)
  ratios = {}
  for key_path, adam in _adam_states(after).items():
    if not jax.tree.leaves(adam.mu):
      continue
    steps = jnp.asarray(before[key_path].count)
    b1, b2 = (
      jax.tree.leaves(x)[0].astype(jnp.float32).ravel()[0]
      for x in (adam.mu, adam.nu)
    )
    # Before the first step there are no moments to carry over.
    weight = jnp.where(steps > 0, 1 - b1**steps, 1)
    ratios[f"{key_path}.nu"] = (
      jnp.where(steps > 0, 1 - b2**steps, 1) / weight**2
    )
  return ratios


def _is_adam_or_multi_steps(x: Any) -> bool:
  return isinstance(x, optax.ScaleByAdamState | optax.MultiStepsState)


def _adam_states(state: Any) -> dict[str, optax.ScaleByAdamState]:
  """Key path to each of Adam's states in a state."""
  flat = jax.tree_util.tree_flatten_with_path(
    state, is_leaf=_is_adam_or_multi_steps
  )[0]
  return {
    jax.tree_util.keystr(keys): x
    for keys, x in flat
    if isinstance(x, optax.ScaleByAdamState)
  }
