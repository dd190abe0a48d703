"""GUM: orthogonalised momentum in subspaces, without their bias."""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks
from galore_optax._galore import galore
from galore_optax.optimizers import _sumo
from galore_optax.optimizers.gum_sampling import Sampled, weighed
from galore_optax.tree import plan, sharding

POLICIES = ("synchronous", "staggered")


def gum(
  learning_rate: Any,
  decay: Any = 0.95,
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  weight_decay: Any = 0.0,
  mask: Any = None,
  *,
  nesterov: bool = False,
  sampled: Any = 0.125,
  rank: Any = 128,
  update_proj_gap: Any = 200,
  scale: Any = 0.2,
  proj_type: str = "std",
  rules: plan.Rules = (),
  projector: str = "subspace",
  refresh: str = "synchronous",
  basis_dtype: Any = "float32",
  state_dtype: Any = None,
  param_shardings: Any = None,
  seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""GUM: SUMO whose subspaces miss nothing in the mean.

  Every T steps a period begins: momentum starts from zero, bases are found,
  and of the N matrices of each shape γ are drawn, each with the probability q =
  γ / N. Until the next one these follow what their bases leave out,

  .. math::

    M_t = \mu M_{t-1} + \tfrac{1}{q} (G_t - P_t P_t^\top G_t), \qquad
    D_t = \mathrm{polar}(M_t)

  and all others what they span,

  .. math::

    M_t = \mu M_{t-1} + \tfrac{1}{1 - q} P_t^\top G_t, \qquad
    D_t = P_t\, \mathrm{polar}(M_t)

  (for the left side). Both are applied like SUMO's update,

  .. math::

    W_{t+1} = W_t - \eta_t (\alpha \sqrt{n}\, D_t + \lambda W_t)

  with the longer side n of the projected gradient. What enters a matrix's
  momentum, lifted to full size, is over the draws

  .. math::

    (1 - q) \frac{1}{1 - q} P P^\top G + q\, \frac{1}{q} (G - P P^\top G) = G

  in the mean, and so is its momentum that of the whole gradients since the
  period began. The identity holds for any P, also one that is rounded or
  changes within the period. It does not extend to D, as the polar factor is
  not linear; being that of the direction alone, it does not depend on the two
  weights either, as long as a momentum has one of them throughout.

  The two branches and their weights are the paper's. How they are held is
  this library's: γ slots of full size a shape, besides SUMO's state of *all*
  matrices, and a draw of γ without replacement in place of one that is
  independent for every matrix, whose number of slots would vary; also the
  exact polar factor, the factor √n and a momentum that starts from zero, since
  none can be carried over from one branch to the other. A matrix whose shape
  no other has stays at full rank, with a warning and the factor α√n of its own
  longer side n; there is no bias then.

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    decay: Decay μ of the momentum.
    b1: Decay of AdamW's first moment, for leaves that are no matrices, or whose
      names or rules keep them at full rank.
    b2: Decay of its second moment.
    eps: Its term outside of the root.
    weight_decay: Decoupled weight decay λ, of the full weights.
    mask: Which leaves are decayed, see :func:`galore_optax.galore_adamw`.
    nesterov: Whether to use Nesterov momentum.
    sampled: Matrices γ of each shape that are drawn for a period: an int, or a
      fraction of those of the shape, a float in (0, 1). At least one is, and
      one is not.
    rank: Rank r; see :func:`galore_optax.galore` for it and the next four.
    update_proj_gap: Steps T of a period; rules cannot change it.
    scale: Factor α, which is 1 for matrices that are too small to project.
      With 0.2 updates are as large as Adam's at full rank.
    proj_type: Which side is projected.
    rules: Ordered rules for single leaves.
    projector: How a basis is found, `subspace` or `svd`, which the paper takes.
    refresh: `synchronous`, the paper's: all bases when a period begins.
      `staggered`: one after the other within it; momentum in a subspace is
      then carried over to the new basis, and draws stay as they are.
    basis_dtype: Dtype of the bases, or `int4` or `int8`.
    state_dtype: Dtype of the moments.
    param_shardings: `jax.NamedSharding` for each parameter, on a mesh.
    seed: Seed of the draws and of the bases before their first refresh.

  Returns:
    The optimizer. Its `init` warns of matrices that no other is like, and
    `update` raises ValueError inside :func:`galore_optax.layerwise`, which has
    one layer at a time to draw from.

  Raises:
    ValueError: If an argument is out of its range, or a rule sets a period; see
      also :func:`galore_optax.galore`.
    TypeError: See :func:`galore_optax.galore`.

  Example:
    One of four matrices has a momentum of full size:

    >>> import jax.numpy as jnp
    >>> from galore_optax import gum, state_bytes, sumo
    >>> params = {"layers": jnp.zeros((4, 64, 512))}
    >>> size = lambda f: state_bytes(f(1e-2, rank=16).init(params))
    >>> size(gum) - size(sumo) == 4 * 64 * 512 + 4  # and its number
    True

  References:
    Pan et al., `Unbiased Gradient Low-Rank Projection
    <https://arxiv.org/abs/2510.17802>`_, 2025; for the exact polar factor
    Refael et al., `SUMO <https://arxiv.org/abs/2505.24749>`_, 2025.
  """
  checks.check_eps(eps, state_dtype)
  checked = plan.check_rules(rules)
  _check(sampled, refresh, projector, checked)
  kinds: dict[Hashable, Any] = {
    "matrix": optax.chain(
      weighed(), _sumo.scale_by_orthogonal_momentum(decay, nesterov)
    ),
    "other": optax.scale_by_adam(b1, b2, eps),
  }
  inner = optax.partition(kinds, _sumo.kinds_by_name(checked))

  def low(extra: plan.Rules) -> optax.GradientTransformationExtraArgs:
    return galore(
      inner,
      rank=rank,
      update_proj_gap=update_proj_gap,
      scale=scale,
      proj_type=proj_type,
      rules=(*extra, *checked),
      projector=projector,
      refresh=refresh,
      basis_dtype=basis_dtype,
      state_dtype=state_dtype,
      param_shardings=param_shardings,
      seed=seed,
    )

  low(())  # refuses what GaLore refuses
  default = plan.Projection(
    rank=rank,
    update_proj_gap=update_proj_gap,
    scale=scale,
    proj_type=proj_type,
  )
  partitions = sharding.partitions(param_shardings)
  settings = Sampled(
    low,
    plan.Plan(checked, default, partitions=partitions),
    sampled=sampled,
    gap=update_proj_gap,
    decay=decay,
    nesterov=nesterov,
    state_dtype=state_dtype,
    seed=seed,
  )
  return optax.chain(
    optax.GradientTransformationExtraArgs(
      settings.init, sharding.with_auto_axes(settings.update)
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def _check(sampled: Any, refresh: str, projector: str, rules: Any) -> None:
  checks.check_choice("refresh", refresh, POLICIES)
  checks.check_choice("projector", projector, ("subspace", "svd"))
  checks.check_positive("sampled", checks.required("sampled", sampled))
  if not isinstance(sampled, jax.core.Tracer):
    share = jnp.issubdtype(jnp.result_type(sampled), jnp.floating)
    if share and not sampled < 1:
      raise ValueError(
        "`sampled` must be a number of matrices (an int) or a fraction of them "
        f"in (0, 1), got {sampled!r}: of all of them nothing would be low-rank."
      )
  for pattern, how in rules:
    if how is not None and how.update_proj_gap is not None:
      raise ValueError(
        f"The rule {pattern!r} in `rules` sets `update_proj_gap`, but matrices "
        "are drawn for one period, which is the same for all. Set it for `gum`."
      )
