"""GUM: orthogonalized momentum in subspaces, unbiased on average."""

from collections.abc import Hashable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from galore_optax import checks
from galore_optax._galore import galore
from galore_optax.optimizers import _sumo
from galore_optax.optimizers import options as options_lib
from galore_optax.optimizers.adam8bit import Mask
from galore_optax.optimizers.gum_sampling import Sampled
from galore_optax.optimizers.options import GaLoreOptions, recipe
from galore_optax.subspace.refresh_settings import Refresh
from galore_optax.transform import axis_names
from galore_optax.tree import rules as rules_lib
from galore_optax.tree import sharding

POLICIES = ("synchronous", "staggered")


@recipe(
  {"scale": 0.2, "refresh": Refresh(policy="synchronous")},
  refused={
    "residual": "drawn matrices already follow what the bases leave out",
    "accumulation_steps": options_lib.WHOLE_GRADIENT,
    "faithful": options_lib.OTHER_PAPER,
  },
)
def gum(
  learning_rate: optax.ScalarOrSchedule,
  decay: ArrayLike = 0.95,
  b1: ArrayLike = 0.9,
  b2: ArrayLike = 0.999,
  eps: ArrayLike = 1e-8,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  mask: Mask | None = None,
  *,
  nesterov: bool = False,
  sampled: ArrayLike = 0.125,
  **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
  r"""GUM: SUMO whose subspaces leave nothing out on average.

  Every T steps a period begins: momentum starts from zero, bases are found, and
  γ of the N matrices of each shape are drawn, each with the probability q = γ /
  N. Until the next period, the drawn matrices follow what their bases leave
  out,

  .. math::

    M_t = \mu M_{t-1} + \tfrac{1}{q} (G_t - P_t P_t^\top G_t), \qquad
    D_t = \mathrm{polar}(M_t)

  and all others follow what their bases span,

  .. math::

    M_t = \mu M_{t-1} + \tfrac{1}{1 - q} P_t^\top G_t, \qquad
    D_t = P_t\, \mathrm{polar}(M_t)

  (for the left side). Both are applied like SUMO's update,

  .. math::

    W_{t+1} = W_t - \eta_t (\alpha \sqrt{n}\, D_t + \lambda W_t)

  with the longer side n of the projected gradient. Averaged over the draws, the
  term that is added to a matrix's momentum, lifted to full size, is

  .. math::

    (1 - q) \frac{1}{1 - q} P P^\top G + q\, \frac{1}{q} (G - P P^\top G) = G

  Its momentum is therefore, on average, that of the whole gradients since the
  period began. This holds for any P, also for one that is rounded or changes
  within the period. It does not hold for D, since the polar factor is not
  linear. The polar factor only depends on the direction of M, so the two
  weights do not change D as long as one of them applies throughout a period.

  The two branches and their weights are the paper's. Three things are this
  library's. The state has γ slots of full size for each shape, besides SUMO's
  state of *all* matrices. Exactly γ matrices are drawn without replacement;
  with independent draws the number of slots would vary. And the polar factor is
  exact, with the factor √n; momentum starts from zero, because it cannot be
  carried from one branch to the other. A matrix whose shape is unique stays at
  full rank, with a warning and the factor α√n of its own longer side n; it has
  no bias.

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    decay: Decay μ of the momentum.
    b1: Decay of AdamW's first moment, for leaves that are not matrices, or
      whose names or rules keep them at full rank.
    b2: Decay of AdamW's second moment.
    eps: Term that AdamW adds to the root.
    weight_decay: Decoupled weight decay λ, of the full weights.
    mask: Which leaves are decayed, see :func:`galore_optax.galore_adamw`.
    nesterov: Whether to use Nesterov momentum.
    sampled: Number γ of matrices of each shape that are drawn for a period: an
      int, or a fraction of all of that shape, a float in (0, 1). At least one
      is drawn, never all.
    **options: GaLore's options, see :func:`galore_optax.galore`. The defaults
      that differ: `scale=0.2`, with which updates are as large as Adam's at
      full rank (it does not apply to matrices that are too small to project),
      and `refresh=Refresh(policy="synchronous")`, the paper's: all bases are
      found when a period begins. With `staggered` refreshes the momentum in a
      subspace is carried into the new basis, and draws stay as they are.
      `update_proj_gap` is the length T of a period; rules cannot change it.

  Returns:
    The optimizer. Its `init` warns of matrices whose shape is unique. `update`
    raises ValueError inside :func:`galore_optax.layerwise`, where it would see
    one layer at a time.

  Raises:
    ValueError: If an argument is out of its range, or a rule sets a period; see
      also :func:`galore_optax.galore`.
    TypeError: See :func:`galore_optax.galore`.

  Example:
    One of four matrices has a momentum of full size, and its index is stored:

    >>> import jax.numpy as jnp
    >>> from galore_optax import gum, state_bytes, sumo
    >>> params = {"layers": jnp.zeros((4, 64, 512))}
    >>> size = lambda f: state_bytes(f(1e-2, rank=16).init(params))
    >>> size(gum) - size(sumo) == 4 * 64 * 512 + 4  # its index
    True

  References:
    Pan et al., `Unbiased Gradient Low-Rank Projection
    <https://arxiv.org/abs/2510.17802>`_, 2025; for the exact polar factor
    Refael et al., `SUMO <https://arxiv.org/abs/2505.24749>`_, 2025.
  """
  rules = rules_lib.check_rules(options.pop("rules", ()))
  rules_lib.refuse_tensors(rules, "`gum` orthogonalizes matrices")
  _check(sampled, options.get("refresh"), rules)
  checks.check_eps(eps, options.get("state_dtype"))
  kinds: dict[Hashable, Any] = {
    # The identity keeps the state's structure of version 0.1.
    "matrix": optax.chain(
      optax.identity(), _sumo.scale_by_orthogonal_momentum(decay, nesterov)
    ),
    "other": optax.scale_by_adam(b1, b2, eps),
  }
  inner = optax.partition(kinds, _sumo.kinds_by_name(rules))

  def low_rank(extra: rules_lib.Rules) -> optax.GradientTransformationExtraArgs:
    return galore(inner, rules=(*extra, *rules), **options)

  low_rank(())  # raises for what GaLore refuses
  settings = Sampled(
    low_rank,
    options_lib.plan_of(rules, options),
    sampled=sampled,
    gap=options.get("update_proj_gap"),
    decay=decay,
    nesterov=nesterov,
    state_dtype=options.get("state_dtype"),
    seed=options.get("seed"),
  )
  return optax.chain(
    optax.GradientTransformationExtraArgs(
      settings.init,
      sharding.with_auto_axes(axis_names.unnamed(settings.update)),
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def _check(sampled: Any, refresh: Any, rules: Any) -> None:
  checks.check_choice("refresh", refresh.policy, POLICIES)
  options_lib.check_finder("gum", refresh)
  options_lib.check_no_burst("gum", refresh)
  if refresh.moments != "rotate" or refresh.random_from is not None:
    raise ValueError(
      "`gum` starts its momentum from zero in each period and rotates it "
      f"within one, got moments={refresh.moments!r} and "
      f"random_from={refresh.random_from!r}. Leave them out."
    )
  checks.check_positive("sampled", checks.required("sampled", sampled))
  if not isinstance(sampled, jax.core.Tracer):
    is_fraction = jnp.issubdtype(jnp.result_type(sampled), jnp.floating)
    if is_fraction and not sampled < 1:
      raise ValueError(
        "`sampled` must be a number of matrices (an int) or a fraction of them "
        f"in (0, 1), got {sampled!r}: with all of them nothing is low-rank."
      )
  for pattern, projection in rules:
    if projection is not None and projection.update_proj_gap is not None:
      raise ValueError(
        f"The rule {pattern!r} in `rules` sets `update_proj_gap`, but matrices "
        "are drawn for one period, which is the same for all. Set it for `gum`."
      )
