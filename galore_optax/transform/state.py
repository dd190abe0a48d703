"""The state of GaLore."""

from typing import Any, NamedTuple

import optax


class GaLoreState(NamedTuple):
  """State of :func:`galore_optax.galore`.

  The field names are those of version 0.1, so that its checkpoints restore:
  `projector` holds the bases, `recovery` what is kept for residuals.

  Attributes:
    step: Updates so far.
    projector: Path of a projected leaf to side (`left`, `right`; of a tensor
      `axis0`, `axis1`, ...) to basis; a leaf at full rank has no entry. A
      basis in 4 or 8 bits is a :class:`galore_optax.QArray` of its transpose, a
      random one its seed.
    inner_state: The inner optimizer's state. Each tree in it that has the
      parameters' structure, such as Adam's `mu`, is stored as a
      :class:`galore_optax.tree.split.Split`.
    schedule: Path of a projected leaf to its
      :class:`galore_optax.subspace.adaptive.State`; None unless the refresh
      policy is `adaptive`.
    accumulator: Mean of the projected gradients since the last step, a
      :class:`galore_optax.tree.split.Split`; None unless
      `accumulation_steps` > 1.
    micro_step: Number of gradients in `accumulator`, or None.
    recovery: Path of a projected leaf to what is kept for its residual: a
      :class:`galore_optax.residual.normalized.State`, or for Fira and APOLLO
      the norm of each matrix's last residual, 0 before the first step. None
      unless `residual` is given.
  """

  step: Any  # shape=(), dtype=jnp.int32
  projector: Any  # (..., m, r) or (..., n, r), dtype=basis_dtype
  inner_state: optax.OptState
  schedule: Any = None
  accumulator: Any = None
  micro_step: Any = None  # shape=(), dtype=jnp.int32
  recovery: Any = None  # (...) or (..., n), dtype=jnp.float32

  @property
  def bases(self) -> Any:
    """The bases: another name of the field `projector`."""
    return self.projector
