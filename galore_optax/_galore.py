"""GaLore: an inner optimizer that runs in the gradients' dominant subspaces."""

import functools
from collections.abc import Callable
from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from galore_optax import _chain, checks, old_spellings
from galore_optax import context as context_lib
from galore_optax.residual import methods as residual_lib
from galore_optax.subspace import initial, refresh_settings
from galore_optax.subspace.refresh_settings import Refresh
from galore_optax.transform import axis_names, start, update
from galore_optax.transform.settings import Settings
from galore_optax.tree import plan as plan_lib
from galore_optax.tree import rules as rules_lib
from galore_optax.tree import sharding

PARAMS_MODES = ("split", "project")
BASIS_CODES = initial.CODES


@old_spellings.refuse
def galore(
  inner: optax.GradientTransformation | None = None,
  *,
  rank: ArrayLike = 128,
  update_proj_gap: ArrayLike = 200,
  scale: ArrayLike = 0.25,
  proj_type: str = "std",
  rules: rules_lib.Rules = (),
  refresh: Refresh | str = Refresh(),  # noqa: B008
  residual: str | None = None,
  residual_factor: ArrayLike | None = None,
  residual_decay: ArrayLike | None = None,
  residual_growth: ArrayLike | None = None,
  basis_dtype: DTypeLike = "float32",
  state_dtype: DTypeLike | None = None,
  accumulation_steps: int | None = None,
  param_shardings: Any = None,
  seed: ArrayLike = 0,
  faithful: bool = False,
  params_mode: str = "split",
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore: runs an optimizer in the gradients' dominant subspaces.

  Each gradient matrix :math:`G_t \in \mathbb{R}^{m \times n}` is projected on
  an orthonormal basis of rank r, the inner optimizer :math:`\rho` runs on the
  small matrix, and its update is lifted back:

  .. math::

    R_t &= P_t^\top G_t \\
    N_t &= \rho_t(R_t) \\
    U_t &= \alpha P_t N_t

  (written for the left side). Every T steps the basis is recomputed from the
  current gradient. The state holds one basis of rank r for each matrix, and the
  inner optimizer's moments at rank r instead of at full size.

  Args:
    inner: An Optax optimizer. Its weight decay acts on the full weights (with
      `params_mode="split"`), so the terms of its update that depend on the
      weights must be separable from those of the gradient. If None, the
      result marks where GaLore is in :func:`galore_optax.chain`.
    rank: Rank r: a positive int, or a fraction in (0, 1] of each matrix's
      shorter side (a float).
    update_proj_gap: Steps T between two refreshes of a basis.
    scale: The papers' α, a factor on the lifted updates. With Adam it acts as
      a learning rate of the projected matrices alone. Terms that `inner` adds
      for the weights, such as decoupled decay, are not multiplied (with
      `params_mode="split"`).
    proj_type: Which side is projected. `std`, the paper's rule: the shorter
      one. `reverse_std`: the longer one, whose state is smaller. `left`: rows.
      `right`: columns. `full`: both. `auto`: the one-sided projection with the
      smallest state; with `param_shardings`, the side that is not divided over
      devices, where projection needs no communication.
    rules: Ordered pairs `(regex, Projection or None)`. The first whose regex
      is found in a leaf's path (`re.search` in `layers/attn/q/kernel`) decides
      how the leaf is projected; None leaves it at full rank. Leaves without a
      rule are projected if they have two axes or more (the last two are the
      matrix, the others stack matrices; axes that Flax's partition metadata
      name `layers` or `experts` always do) and the projection makes the state
      smaller (counted with two moments, as Adam has), unless their path names
      an embedding, an output head, a norm, a bias or a scale.
    refresh: When and how bases are recomputed, a :class:`galore_optax.Refresh`,
      or only its policy: `staggered`, `synchronous` or `adaptive`.
    residual: What to do with the part of the gradient that the bases do not
      span, :math:`S_t = G_t - P_t R_t`. None: it is dropped. `normalized`: it
      is added, each column divided by the root of a running mean of its
      squares,

      .. math::

        U_t &= \alpha (P_t N_t + \mathrm{factor} \cdot \tilde S_t) \\
        \tilde S_{t,ij} &= S_{t,ij} \sqrt{(m - r) / \hat c_{t,j}}, \quad
          c_{t,j} = \beta c_{t-1,j} + (1 - \beta) \sum_i S_{t,ij}^2

      with the bias of c removed. (For the right side, rows take the part of
      columns.) The state grows by one number for each column, and S itself is
      never computed. `factored`: the mean square has a factor for each column
      and one for each row, as in Adafactor; it takes one more product of the
      size of the lift. The learning rate and the sign of `inner` multiply the
      residual too. `fira`: it is added, scaled column by column to
      the size that `inner` gives to the projected gradient,

      .. math::

        U_t &= \alpha P_t N_t + S_t \\
        S_t &= (G_t - \alpha P_t R_t)\, \mathrm{diag}(\phi_t), \quad
          \phi_{t,j} = \|N_{t,:j}\| / \|R_{t,:j}\|

      with S scaled down where its norm would grow by more than 1% a step. (For
      the right side φ scales rows; for both sides it is one number for the
      matrix.) The state grows by one number for each matrix. The learning rate
      and the sign of `inner` multiply S too; φ and the limit are computed
      without them, so that they must come last in `inner`. `apollo`: the
      projected gradient only gives the scaling,

      .. math::

        U_t = \sqrt{\alpha}\, G_t\, \mathrm{diag}(\phi_t),

      with the same limit; `apollo_mini`: with one φ for the whole matrix, for
      which rank 1 is enough. They were published with α of 1 and 128, and with
      `Refresh(finder="random")`, see :func:`galore_optax.apollo_adamw`.
    residual_factor: The factor on a `normalized` or `factored` residual, whose
      entries are about as large as Adam's; None means 1.
    residual_decay: Decay β of the mean of its squares; None means 0.95.
    residual_growth: Largest ratio of the norm of :math:`\tilde S` to that of
      the step before, such as Fira's 1.01; where it would be larger,
      :math:`\tilde S` is scaled down. The state then grows by one number more
      for each matrix. None or infinity sets no limit.
    basis_dtype: Dtype of the bases: a float dtype, or `int4` or `int8` for
      block-wise codes, see :class:`galore_optax.QArray`.
    state_dtype: Dtype in which moments are stored between steps. None: bfloat16
      for bfloat16 parameters; for others theirs, but at least float32. `inner`
      computes in float32 at least, and what is stored in bfloat16 is rounded at
      random, without bias: rounded to the nearest, a second moment would not
      decay at b2 = 0.999. Moments to which `inner` gives a dtype of its own
      keep it. In float16 `inner` also computes, where an ε of 1e-8 is 0, so
      that Adam would divide 0 by 0. For moments in
      8 bits take :func:`galore_optax.galore_adamw_8bit`, or
      :func:`galore_optax.scale_by_adam_8bit` as `inner`.
    accumulation_steps: Number k of calls of `update` that make one step; None
      means 1. The first k - 1 calls return zeros and only add the projected
      gradient to a low-rank accumulator; the k-th makes a step with the mean.
      Bases that are due are found from the first of the k gradients.
      (`optax.MultiSteps` around GaLore accumulates at full size.)
    param_shardings: `jax.NamedSharding` of each parameter, if they are on a
      mesh: decides the sides of `proj_type="auto"`, and how stacked layers are
      read. From a stack that is divided among devices, a refresh takes one
      layer without gathering the others; layers whose projected side is divided
      are projected and lifted one by one, so that the devices exchange one
      layer at a time.
    seed: Seed of the initial bases, of random ones, and of random rounding.
    faithful: Whether to follow the paper's algorithm exactly:
      `refresh=Refresh.paper()`, and every matrix is projected, even if that
      saves nothing.
    params_mode: What an `inner` that reads the parameters is given. `split`:
      what it adds for the parameters alone, such as decoupled weight decay, is
      computed at full size, exactly; an `inner` for which that is impossible
      is refused. `project`: the projected weights :math:`P^\top W`; decay then
      acts on what the bases span, times α, and an `inner` that keeps where the
      weights began, such as a schedule-free one, is refused.

  Returns:
    A gradient transformation. A projected matrix whose gradient has an entry
    that is not finite counts as zero; elsewhere only that entry does.
    `init` raises ValueError or TypeError for rules, leaves or an inner
    optimizer that do not fit, and `update` for gradients that do not.

  Raises:
    ValueError: If an argument is out of its range.
    TypeError: If an argument has the wrong type.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from galore_optax import galore, state_bytes
    >>> params = {"w": jnp.zeros((256, 1024)), "bias": jnp.zeros(1024)}
    >>> tx = galore(optax.adamw(1e-2, weight_decay=0.1), rank=16)
    >>> state = tx.init(params)
    >>> grads = jax.tree.map(jnp.ones_like, params)
    >>> updates, state = jax.jit(tx.update)(grads, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> state_bytes(state) / state_bytes(optax.adamw(1e-2).init(params)) < 0.1
    True

  References:
    Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
    Projection <https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm 2; for
    `residual="fira"` Chen et al., `Fira: Can We Achieve Full-rank Training of
    LLMs Under Low-rank Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024;
    for `residual="normalized"` the compensation of Gong et al., `Towards
    Efficient Optimizer Design for LLM via Structured Fisher Approximation with
    a Low-Rank Extension <https://arxiv.org/abs/2502.07752>`_, 2025; for
    `residual="factored"` the denominator of Shazeer and Stern, `Adafactor
    <https://arxiv.org/abs/1804.04235>`_, 2018; for `residual="apollo"` Zhu et
    al., `APOLLO: SGD-like Memory, AdamW-level
    Performance <https://arxiv.org/abs/2412.05270>`_, 2024.
  """
  checks.check_choice("params_mode", params_mode, PARAMS_MODES)
  basis_dtype = checks.dtype_name("basis_dtype", basis_dtype, BASIS_CODES)
  checks.check_float_dtype("state_dtype", state_dtype)
  accumulation_steps = _check_accumulation(accumulation_steps)
  refresh = refresh_settings.complete(refresh)
  if faithful:
    refresh = refresh_settings.faithful(refresh)
  defaults = rules_lib.Projection(
    rank=checks.required("rank", rank),
    update_proj_gap=checks.required("update_proj_gap", update_proj_gap),
    scale=checks.required("scale", scale),
    proj_type=checks.required("proj_type", proj_type),
  )
  residual_lib.check(residual, refresh, accumulation_steps, params_mode)
  residual_lib.check_basis(refresh, basis_dtype)
  residual_settings = residual_lib.settings(
    residual,
    residual_factor,
    residual_decay,
    residual_growth,
    basis_dtype,
  )
  rules = rules_lib.check_rules(rules)
  residual_lib.check_rules(residual, refresh, rules)

  def wrap(
    inner: optax.GradientTransformation,
  ) -> optax.GradientTransformationExtraArgs:
    _chain.check_inner(inner)
    settings = Settings(
      inner=optax.with_extra_args_support(inner),
      plan=plan_lib.Plan(
        rules,
        defaults,
        always=faithful,
        seeded=refresh.finder == "random",
        partitions=sharding.partitions(param_shardings),
      ),
      refresh=refresh,
      params_mode=params_mode,
      basis_dtype=basis_dtype,
      state_dtype=state_dtype,
      seed=seed,
      accumulation_steps=accumulation_steps,
      residual=residual_settings,
    )
    return optax.GradientTransformationExtraArgs(
      functools.partial(start.init, settings), _or_describe(settings)
    )

  return _chain.marker(wrap) if inner is None else wrap(inner)


def _or_describe(settings: Settings) -> Callable:
  """The update function; called with a probe, it describes itself to that."""
  step = sharding.with_auto_axes(
    axis_names.unnamed(functools.partial(update.update, settings))
  )

  def update_or_describe(updates, state, params=None, **extra_args):
    context, _ = context_lib.split_off(extra_args)
    if context.probe is None:
      return step(updates, state, params, **extra_args)
    described = update.describe(settings, updates, state, params, extra_args)
    context.probe.described.append(described)
    return updates, state

  return update_or_describe


def _check_accumulation(steps: Any) -> int:
  """The number of gradients that make a step; raises unless it is one."""
  # None by default, because `optax.inject_hyperparams` would trace an int.
  if steps is None:
    return 1
  if isinstance(steps, bool) or not isinstance(steps, int):
    raise TypeError(
      f"`accumulation_steps` must be an int, got {steps!r}: it decides the "
      "structure of the state."
    )
  if steps < 1:
    raise ValueError(f"`accumulation_steps` must be positive, got {steps}.")
  return steps
