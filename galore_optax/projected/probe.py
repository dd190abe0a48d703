"""Finds the GaLore in an optimizer, with its settings and its state.

The optimizer may be a chain, a mask or any other wrapper around GaLore. An
update with a probe in its context reaches every GaLore in it, which then
describes itself instead of updating.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from galore_optax import context as context_lib
from galore_optax.context import UpdateContext
from galore_optax.projected.gradient import Found
from galore_optax.tree import plan


class Described(NamedTuple):
  """A GaLore at one step.

  Attributes:
    step: The array `step` of its state, which identifies the state.
    sites: Path to site.
    bases: Path to side to basis, as the state stores them.
    due: Path to whether each matrix is due for a refresh, bool (...).
    iterations: Subspace iterations of a refresh.
    refreshed: From path to what a backward pass found, and whether the step is
      taken, to the state with the new bases, and the moments in them.
  """

  step: Any
  sites: Mapping[str, plan.Site]
  bases: Mapping[str, Mapping[str, Any]]
  due: Mapping[str, jax.Array]
  iterations: Any
  refreshed: Callable[[Mapping[str, Found], Any], Any]


@jax.tree_util.register_static
class Probe:
  """Collects descriptions.

  Attributes:
    active: Whether bases may be refreshed, bool scalar; None for True.
    described: Those of all GaLores that an update reached.
  """

  def __init__(self, active: Any = None):
    self.active = active
    self.described: list[Described] = []


def describe(
  tx: optax.GradientTransformationExtraArgs,
  updates: optax.Updates,
  state: optax.OptState,
  params: optax.Params,
  context: UpdateContext,
  active: Any,
) -> list[Described]:
  """Describes every GaLore in an optimizer.

  Args:
    tx: The optimizer.
    updates: Arrays in the structure and shapes of gradients.
    state: Its state.
    params: The parameters.
    context: The circumstances of the update that follows.
    active: Whether bases may be refreshed, bool scalar; None for True.

  Returns:
    The descriptions.
  """
  probe = Probe(active)
  context = context._replace(probe=probe)
  context_lib.update_with(tx, context, updates, state, params)
  return probe.described
