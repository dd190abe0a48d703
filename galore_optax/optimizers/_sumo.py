"""SUMO: momentum in a subspace, replaced by its polar factor."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks, linalg
from galore_optax._galore import galore
from galore_optax.tree import paths, plan


def scale_by_orthogonal_momentum(
  decay: Any = 0.95,
  nesterov: bool = False,
  accumulator_dtype: Any = None,
) -> optax.GradientTransformation:
  r"""Momentum of which all singular values are made equal.

  .. math::

    M_t = \mu M_{t-1} + R_t, \qquad
    N_t = \sqrt{\max(m, n)}\; U V^\top \quad \text{with } M_t = U S V^\top

  for each matrix of m rows and n columns, the last two axes of a leaf. Around
  it, :func:`galore_optax.galore` makes R and M low-rank, which the polar factor
  :math:`U V^\top` is found exactly for (:func:`polar_factor`), where Muon takes
  five approximate iterations at full size. The factor makes the sizes of
  entries comparable between shapes.

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

  # The momentum's place in the state has the name by which it is known.
  return optax.chain(
    optax.trace(decay, nesterov, accumulator_dtype),
    optax.GradientTransformation(init, update),
  )


def sumo(
  learning_rate: Any,
  decay: Any = 0.95,
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  weight_decay: Any = 0.0,
  mask: Any = None,
  *,
  nesterov: bool = False,
  rank: Any = 128,
  update_proj_gap: Any = 200,
  scale: Any = 0.2,
  proj_type: str = "std",
  rules: plan.Rules = (),
  projector: str = "subspace",
  refresh: str = "staggered",
  moments: str = "rotate",
  basis_dtype: Any = "float32",
  state_dtype: Any = None,
  recovery: str | None = None,
  param_shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""SUMO: momentum in the gradients' subspaces, orthogonalised exactly.

  .. math::

    M_t = \mu M_{t-1} + P_t^\top G_t, \qquad
    W_{t+1} = W_t - \eta_t \left( \alpha \sqrt{\max(r, n)}\, P_t\,
      \mathrm{polar}(M_t) + \lambda W_t \right)

  written for the left side, on which n is the longer one. At a refresh the
  momentum is carried over by :math:`M \leftarrow P_{new}^\top P_{old} M`. One
  moment is kept, where GaLore around Adam keeps two. Leaves that are no
  matrices, or whose names or rules keep them at full rank, get AdamW.

  Two things of the published algorithm are left out: the part of the plain
  gradient outside of the subspace that it adds, of which `recovery="fira"` adds
  a scaled one; and the limit to the growth of :math:`\|\mathrm{polar}(M_t)\|`,
  which does not grow but with the moment's rank.

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    decay: Decay μ of the momentum.
    b1: Decay of AdamW's first moment, for the other leaves.
    b2: Decay of its second moment.
    eps: Its term outside of the root.
    weight_decay: Decoupled weight decay λ, of the full weights.
    mask: Which leaves are decayed, see :func:`galore_optax.galore_adamw`.
    nesterov: Whether to use Nesterov momentum.
    rank: Rank r; see :func:`galore_optax.galore` for it and all that follow.
    update_proj_gap: Steps T between two refreshes of a basis.
    scale: Factor α, which is 1 for matrices that are too small to project.
      With 0.2 updates are as large as Adam's at full rank.
    proj_type: Which side is projected.
    rules: Ordered rules for single leaves.
    projector: How a basis is found.
    refresh: When.
    moments: What becomes of the momentum then; the paper's is `rotate`.
    basis_dtype: Dtype of the bases, or `int4` or `int8`.
    state_dtype: Dtype of the moments.
    recovery: What becomes of the rest of the gradient.
    param_shardings: `jax.NamedSharding` for each parameter, on a mesh.

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
  checks.check_choice("projector", projector, ("subspace", "svd"))
  checks.check_eps(eps, state_dtype)
  rules = plan.check_rules(rules)
  kinds: dict[Hashable, Any] = {
    "matrix": scale_by_orthogonal_momentum(decay, nesterov),
    "other": optax.scale_by_adam(b1, b2, eps),
  }
  inner = optax.chain(
    optax.partition(kinds, kinds_by_name(rules)),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
  return galore(
    inner,
    rank=rank,
    update_proj_gap=update_proj_gap,
    scale=scale,
    proj_type=proj_type,
    rules=rules,
    projector=projector,
    refresh=refresh,
    moments=moments,
    basis_dtype=basis_dtype,
    state_dtype=state_dtype,
    recovery=recovery,
    param_shardings=param_shardings,
  )


def kinds_by_name(rules: plan.Rules) -> Callable[[Any], Any]:
  """Labels the leaves that rules and names let GaLore project.

  That of a matrix which stays at full rank because it is small is none: its
  momentum is orthogonalised at full size.
  """
  known = plan.Plan(tuple(rules), plan.Projection())

  def label(path: str, leaf: Any) -> str:
    matrix = jnp.ndim(leaf) >= 2 and not jnp.iscomplexobj(leaf)
    return "matrix" if matrix and known.projects(path) else "other"

  return lambda params: paths.map_with_path(label, params)
