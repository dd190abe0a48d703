"""What other parts of this library pass to an update besides gradients."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax

# The only private extra argument of `update`. Layer-by-layer updates need an
# extra argument: the optimizer they are given may be a chain, a mask or any
# other wrapper around GaLore, and wrappers pass on nothing else.
_ARGUMENT = "galore_context"


class UpdateContext(NamedTuple):
  """The circumstances of one update; a pytree, as wrappers require.

  Attributes:
    step: Updates so far, int32 scalar. GaLore fills it in.
    active: Whether bases may be refreshed, bool scalar; None for True. GaLore
      fills it in.
    layer: Index of the layer if one layer of a stack is updated, else None.
    layers: Number of layers of that stack, else None.
    basis_grads: Path of a projected leaf to the matrices (..., m, n) from which
      its bases are found, where that is not the gradient (LDAdam).
    weights: Path of a projected leaf to a factor on its projected gradient
      (GUM).
    probe: A :class:`galore_optax.projected.probe.Probe`, which every GaLore
      describes itself to instead of updating; None for an update.
  """

  step: Any = None
  active: Any = None
  layer: Any = None
  layers: Any = None
  basis_grads: Mapping[str, jax.Array] | None = None
  weights: Mapping[str, Any] | None = None
  probe: Any = None

  @property
  def is_one_layer(self) -> bool:
    """Whether one layer of a stack is updated."""
    return self.layer is not None


def update_with(
  tx: optax.GradientTransformationExtraArgs,
  context: UpdateContext,
  updates: optax.Updates,
  state: optax.OptState,
  params: optax.Params | None = None,
  **extra_args: Any,
) -> tuple[optax.Updates, Any]:
  """Calls `tx.update` and passes a context to every GaLore in `tx`.

  Args:
    tx: GaLore, or any optimizer around it that passes extra arguments on.
    context: The context.
    updates: As for `tx.update`.
    state: As for `tx.update`.
    params: As for `tx.update`.
    **extra_args: As for `tx.update`.

  Returns:
    What `tx.update` returns.
  """
  return tx.update(updates, state, params, **{_ARGUMENT: context}, **extra_args)


def split_off(
  extra_args: Mapping[str, Any],
) -> tuple[UpdateContext, dict[str, Any]]:
  """The context in the extra arguments of an update, and the other arguments.

  Args:
    extra_args: Extra arguments of `update`.

  Returns:
    The context, which is empty if :func:`update_with` was not used, and the
    extra arguments for the inner optimizer.
  """
  others = {k: v for k, v in extra_args.items() if k != _ARGUMENT}
  return extra_args.get(_ARGUMENT, UpdateContext()), others
