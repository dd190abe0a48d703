"""SUMO: the polar factor of momentum in a subspace."""

from collections.abc import Callable, Hashable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from galore_optax import checks, linalg
from galore_optax._galore import galore
from galore_optax.optimizers import options as options_lib
from galore_optax.optimizers.adam8bit import Mask
from galore_optax.optimizers.options import GaLoreOptions, recipe
from galore_optax.tree import boxes, paths, plan, split
from galore_optax.tree import rules as rules_lib


def scale_by_orthogonal_momentum(
  decay: ArrayLike = 0.95,
  nesterov: bool = False,
  accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
  r"""Orthogonalized momentum: all its singular values are made equal.

  .. math::

    M_t = \mu M_{t-1} + R_t, \qquad
    N_t = \sqrt{\max(m, n)}\; U V^\top \quad \text{with } M_t = U S V^\top

  for each matrix of m rows and n columns, the last two axes of a leaf. With
  :func:`galore_optax.galore` around it R and M are low-rank, and the polar
  factor :math:`U V^\top` is computed exactly (:func:`polar_factor`), where Muon
  takes five approximate iterations at full size. The factor
  :math:`\sqrt{\max(m, n)}` makes the entries about equally large for all
  shapes.

  Args:
    decay: Decay μ of the momentum.
    nesterov: Whether to use Nesterov momentum.
    accumulator_dtype: Dtype of the momentum; None for that of the gradients.

  Returns:
    A gradient transformation. Its `init` raises ValueError for a leaf with
    fewer than two axes.

  Example:
    >>> import jax.numpy as jnp
    >>> from galore_optax import galore, scale_by_orthogonal_momentum
    >>> tx = galore(scale_by_orthogonal_momentum(), rank=4, scale=1.0)
    >>> params = {"w": jnp.ones((16, 64))}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> round(float(jnp.linalg.norm(updates["w"], 2)), 3)  # of rank one
    8.0

  References:
    Refael et al., `SUMO <https://arxiv.org/abs/2505.24749>`_, 2025, Algorithm
    1, blocks 1.1 and 2; Jordan et al., Muon, 2024.
  """

  def init(params: optax.Params) -> optax.EmptyState:
    for path, leaf in paths.leaves_by_path(params).items():
      if jnp.ndim(leaf) < 2:
        raise ValueError(
          "`scale_by_orthogonal_momentum` is for matrices, but the leaf "
          f"{path!r} has shape {jnp.shape(leaf)}. Use `sumo`, or "
          "`optax.partition`, to give such leaves another optimizer."
        )
    return optax.EmptyState()

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    scaled = lambda x: max(x.shape[-2:]) ** 0.5 * linalg.polar_factor(x)
    return jax.tree.map(scaled, updates), state

  # `optax.trace` names the momentum `trace` in the state, by which
  # `subspace.moments` recognizes it.
  return optax.chain(
    optax.trace(decay, nesterov, accumulator_dtype),
    optax.GradientTransformation(init, update),
  )


@recipe({"scale": 0.2}, refused={"faithful": options_lib.OTHER_PAPER})
def sumo(
  learning_rate: optax.ScalarOrSchedule,
  decay: ArrayLike = 0.95,
  b1: ArrayLike = 0.9,
  b2: ArrayLike = 0.999,
  eps: ArrayLike = 1e-8,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  mask: Mask | None = None,
  *,
  nesterov: bool = False,
  **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
  r"""SUMO: momentum in the gradients' subspaces, orthogonalized exactly.

  .. math::

    M_t = \mu M_{t-1} + P_t^\top G_t, \qquad
    W_{t+1} = W_t - \eta_t \left( \alpha \sqrt{\max(r, n)}\, P_t\,
      \mathrm{polar}(M_t) + \lambda W_t \right)

  (written for the left side, where n is the longer side). At a refresh the
  momentum is carried over by :math:`M \leftarrow P_{new}^\top P_{old} M`. The
  state has one moment, where GaLore around Adam has two. Leaves that are not
  matrices, or whose names or rules keep them at full rank, get AdamW.

  Two parts of the published algorithm are left out. It adds the plain gradient
  outside of the subspace; `residual="fira"` adds it with a scale. And it limits
  the growth of :math:`\|\mathrm{polar}(M_t)\|`, which only depends on the rank
  of the moment.

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    decay: Decay μ of the momentum.
    b1: Decay of AdamW's first moment, for the other leaves.
    b2: Decay of AdamW's second moment.
    eps: Term that AdamW adds to the root.
    weight_decay: Decoupled weight decay λ, of the full weights.
    mask: Which leaves are decayed, see :func:`galore_optax.galore_adamw`.
    nesterov: Whether to use Nesterov momentum.
    **options: GaLore's options, see :func:`galore_optax.galore`. The default
      that differs: `scale=0.2`, with which updates are as large as Adam's at
      full rank. `scale` does not apply to matrices that are too small to
      project. The paper rotates the momentum, as the default `refresh` does.

  Returns:
    The optimizer.

  Raises:
    ValueError: See :func:`galore_optax.galore`.
    TypeError: See :func:`galore_optax.galore`.

  Example:
    >>> import jax.numpy as jnp
    >>> from galore_optax import galore_adamw, state_bytes, sumo
    >>> params = {"w": jnp.zeros((64, 512))}
    >>> size = lambda tx: state_bytes(tx.init(params))
    >>> basis, moment = 4 * 64 * 16, 4 * 16 * 512
    >>> size(sumo(1e-2, rank=16)) - basis - moment < 100
    True

  References:
    Refael et al., `SUMO: Subspace-Aware Moment-Orthogonalization for
    Accelerating Memory-Efficient LLM Training
    <https://arxiv.org/abs/2505.24749>`_, 2025, Algorithm 1.
  """
  options_lib.check_finder("sumo", options.get("refresh"))
  checks.check_eps(eps, options.get("state_dtype"))
  rules = options["rules"] = rules_lib.check_rules(options.get("rules", ()))
  rules_lib.refuse_tensors(rules, "`sumo` orthogonalizes matrices")
  kinds: dict[Hashable, Any] = {
    "matrix": scale_by_orthogonal_momentum(decay, nesterov),
    "other": optax.scale_by_adam(b1, b2, eps),
  }
  inner = optax.chain(
    optax.partition(kinds, kinds_by_name(rules)),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
  tx = galore(inner, **options)
  which = options_lib.plan_of(rules, options)

  def init(params: optax.Params) -> Any:
    state: Any = tx.init(params)
    if not split.is_placeholder(params):
      leaves, axes = paths.leaves_by_path(params), boxes.axis_names(params)
      which.check_full_rank_axes("sumo", leaves, axes, state.projector)
    return state

  return optax.GradientTransformationExtraArgs(init, tx.update)


def kinds_by_name(rules: rules_lib.Rules) -> Callable[[Any], Any]:
  """Labels leaves `matrix` if rules and names allow GaLore to project them.

  A matrix that stays at full rank because it is small is labelled `matrix` too:
  its momentum is orthogonalized at full size.
  """
  by_rule = plan.Plan(tuple(rules), rules_lib.Projection())

  def label(path: str, leaf: Any) -> str:
    is_matrix = jnp.ndim(leaf) >= 2 and not jnp.iscomplexobj(leaf)
    return "matrix" if is_matrix and by_rule.projects(path) else "other"

  return lambda params: paths.map_with_path(label, params)
