r"""LDAdam's way of carrying Adam's second moment over to a new basis.

It takes the bias-corrected moments for the mean and the variance of the
projected gradient, for which Adam's decays and step count must be known.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def check(inner_state: Any) -> None:
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
    :func:`galore_optax.layout.moments`, to κ.
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
