"""Ready recipes: GaLore around the optimizers it is used with."""

from typing import Any

import jax.numpy as jnp
import optax

from galore_optax import checks
from galore_optax._galore import galore
from galore_optax.optimizers.adam8bit import adamw_8bit
from galore_optax.subspace import adaptive as adaptive_lib
from galore_optax.tree import plan


def galore_adamw(
  learning_rate: Any,
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  eps_root: Any = 0.0,
  mu_dtype: Any = None,
  weight_decay: Any = 1e-4,
  mask: Any = None,
  *,
  nesterov: bool = False,
  rank: Any = 128,
  update_proj_gap: Any = 200,
  scale: Any = 0.25,
  proj_type: str = "std",
  rules: plan.Rules = (),
  projector: str = "subspace",
  refresh: str = "staggered",
  moments: str = "rotate",
  state_dtype: Any = None,
  recovery: str | None = None,
  param_shardings: Any = None,
  faithful: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore around AdamW.

  Adam's moments are kept of the projected gradients :math:`R_t = P_t^\top G_t`;
  the weights W see the lifted update and a full-size decay:

  .. math::

    W_{t+1} = W_t - \eta_t \left( \alpha P_t
      \frac{\hat\mu_t}{\sqrt{\hat\nu_t + \bar\varepsilon} + \varepsilon}
      + \lambda W_t \right)

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Term ε outside of the root.
    eps_root: Term inside of the root.
    mu_dtype: Dtype of the first moment; None for that of the gradients.
    weight_decay: Decoupled weight decay λ, of the full weights.
    mask: Which leaves are decayed: a tree of bools in the parameters'
      structure, or a function that makes one; None for all.
    nesterov: Whether to use Nesterov momentum.
    rank: Rank r, or the fraction of the shorter side; see
      :func:`galore_optax.galore` for it and all that follow.
    update_proj_gap: Steps T between two refreshes of a basis.
    scale: The papers' α.
    proj_type: Which side is projected.
    rules: Ordered rules for single leaves.
    projector: How a basis is found.
    refresh: When.
    moments: What becomes of the moments then.
    state_dtype: Dtype of the moments.
    recovery: What becomes of the rest of the gradient; `fira` adds it.
    param_shardings: `jax.NamedSharding` for each parameter, on a mesh.
    faithful: The paper's algorithm exactly.

  Returns:
    The optimizer.

  Raises:
    ValueError: See :func:`galore_optax.galore`.
    TypeError: See :func:`galore_optax.galore`.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from galore_optax import galore_adamw
    >>> target = jnp.outer(jnp.arange(32.0), jnp.arange(64.0)) / 1024
    >>> loss = lambda params: jnp.sum((params["w"] - target) ** 2)
    >>> params = {"w": jnp.zeros((32, 64))}
    >>> tx = galore_adamw(0.2, rank=4, scale=1.0, weight_decay=0.0)
    >>> state = tx.init(params)
    >>> update = jax.jit(tx.update)
    >>> for _ in range(100):
    ...   updates, state = update(jax.grad(loss)(params), state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> bool(loss(params) < 0.05 * loss({"w": 0 * target}))
    True

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm
    2; Loshchilov et al., `Decoupled Weight Decay Regularization
    <https://arxiv.org/abs/1711.05101>`_, 2019; Chen et al., `Fira
    <https://arxiv.org/abs/2410.01623>`_, 2024.
  """
  checks.check_eps(eps, state_dtype)
  inner = optax.adamw(
    learning_rate,
    b1=b1,
    b2=b2,
    eps=eps,
    eps_root=eps_root,
    mu_dtype=mu_dtype,
    weight_decay=weight_decay,
    mask=mask,
    nesterov=nesterov,
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
    state_dtype=state_dtype,
    recovery=recovery,
    param_shardings=param_shardings,
    faithful=faithful,
  )


def apollo_adamw(
  learning_rate: Any,
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  weight_decay: Any = 0.0,
  mask: Any = None,
  *,
  rank: Any = 256,
  update_proj_gap: Any = 200,
  scale: Any = 1.0,
  proj_type: str = "std",
  rules: plan.Rules = (),
  projector: str = "random",
  state_dtype: Any = None,
  seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""APOLLO: the whole gradient, each channel at Adam's size.

  Adam runs on :math:`R_t = P_t^\top G_t` with a random projection P. It gives
  directions :math:`N_t`, of which only the norms are used, to scale the columns
  of the full gradient:

  .. math::

    W_{t+1} = W_t - \eta_t \sqrt{\alpha}\, G_t\, \mathrm{diag}\left(
      \frac{\|N_{t,:j}\|}{\|R_{t,:j}\|} \right)

  where the norm of the update may grow by 1% a step.

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Term outside of the root.
    weight_decay: Decoupled weight decay, of the full weights.
    mask: Which leaves are decayed, see :func:`galore_adamw`.
    rank: Rank r; 256 is what the paper takes for 7B.
    update_proj_gap: Steps T between two projections.
    scale: The papers' α, under a root.
    proj_type: Which side is projected, see :func:`galore_optax.galore`.
    rules: Ordered rules for single leaves.
    projector: `random`, of which only the seed is kept, or `svd` or `subspace`
      for the leading directions, which take a basis.
    state_dtype: Dtype of the moments.
    seed: Seed of the projections.

  Returns:
    The optimizer.

  Raises:
    ValueError: See :func:`galore_optax.galore`.
    TypeError: See :func:`galore_optax.galore`.

  Example:
    Two moments of rank 16, and for each matrix a seed and a norm:

    >>> import jax.numpy as jnp
    >>> from galore_optax import apollo_adamw, state_bytes
    >>> tx = apollo_adamw(1e-2, rank=16)
    >>> state = tx.init({"w": jnp.zeros((512, 1376))})
    >>> state_bytes(state) - 4 * 2 * 16 * 1376
    16

  References:
    Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
    <https://arxiv.org/abs/2412.05270>`_, 2024, Algorithm 1.
  """
  checks.check_eps(eps, state_dtype)
  return galore(
    optax.adamw(
      learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask
    ),
    rank=rank,
    update_proj_gap=update_proj_gap,
    scale=scale,
    proj_type=proj_type,
    rules=rules,
    projector=projector,
    moments="keep",
    state_dtype=state_dtype,
    seed=seed,
    recovery="apollo",
  )


def apollo_mini_adamw(
  learning_rate: Any,
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  weight_decay: Any = 0.0,
  mask: Any = None,
  *,
  rank: Any = 1,
  update_proj_gap: Any = 200,
  scale: Any = 128.0,
  proj_type: str = "std",
  rules: plan.Rules = (),
  projector: str = "random",
  state_dtype: Any = None,
  seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""APOLLO-Mini: the whole gradient, each matrix at Adam's size.

  As :func:`apollo_adamw` at rank one, with one factor a matrix,

  .. math::

    W_{t+1} = W_t - \eta_t \sqrt{\alpha}\, \frac{\|N_t\|}{\|R_t\|}\, G_t

  and hardly more state than plain gradient descent.

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Term outside of the root.
    weight_decay: Decoupled weight decay, of the full weights.
    mask: Which leaves are decayed, see :func:`galore_adamw`.
    rank: Rank r; the method is made for 1.
    update_proj_gap: Steps T between two projections.
    scale: The papers' α, under a root.
    proj_type: Which side is projected, see :func:`galore_optax.galore`.
    rules: Ordered rules for single leaves.
    projector: `random`, of which only the seed is kept, or `svd` or `subspace`
      for the leading directions, which take a basis.
    state_dtype: Dtype of the moments.
    seed: Seed of the projections.

  Returns:
    The optimizer.

  Raises:
    ValueError: See :func:`galore_optax.galore`.
    TypeError: See :func:`galore_optax.galore`.

  Example:
    >>> import jax.numpy as jnp
    >>> from galore_optax import apollo_mini_adamw, state_bytes
    >>> state_bytes(apollo_mini_adamw(1e-2).init({"w": jnp.zeros((512, 1376))}))
    11024

  References:
    Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
    <https://arxiv.org/abs/2412.05270>`_, 2024, Algorithm 1.
  """
  checks.check_eps(eps, state_dtype)
  return galore(
    optax.adamw(
      learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask
    ),
    rank=rank,
    update_proj_gap=update_proj_gap,
    scale=scale,
    proj_type=proj_type,
    rules=rules,
    projector=projector,
    moments="keep",
    state_dtype=state_dtype,
    seed=seed,
    recovery="apollo_mini",
  )


def galore_adafactor(
  learning_rate: Any,
  decay_rate: Any = 0.8,
  clipping_threshold: Any = 1.0,
  momentum: Any = 0.9,
  eps: Any = 1e-30,
  weight_decay: Any = None,
  mask: Any = None,
  *,
  min_dim_size_to_factor: int | None = None,
  rank: Any = 128,
  update_proj_gap: Any = 200,
  scale: Any = 0.25,
  proj_type: str = "std",
  rules: plan.Rules = (),
  projector: str = "subspace",
  refresh: str = "staggered",
  moments: str = "rotate",
  state_dtype: Any = None,
  faithful: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore around Adafactor with a first moment.

  Adafactor's second moment is a rank-one product of row and column means, here
  of the projected gradients. With `momentum` a first moment is kept as well;
  without it, Adafactor's state is so small that GaLore saves nothing. Updates
  are clipped by their root mean square in the subspace. The parameters' scale
  is not used (`multiply_by_parameter_scale=False`).

  Args:
    learning_rate: Learning rate, a float or a schedule of the step.
    decay_rate: The second moment's decay at step t is 1 - t^-decay_rate.
    clipping_threshold: Largest root mean square of an update; None for none.
    momentum: Decay of the first moment; None for none.
    eps: Term added to the squared gradients.
    weight_decay: Rate that is multiplied by the weights and, as in
      `optax.adafactor`, not by the learning rate; None for none.
    mask: Which leaves are decayed, see :func:`galore_adamw`.
    min_dim_size_to_factor: Arrays whose second-largest axis is shorter keep an
      unfactored second moment. It is compared with the rank, too. None
      means 128, Optax's default.
    rank: Rank r; see :func:`galore_optax.galore` for it and all that follow.
    update_proj_gap: Steps T between two refreshes of a basis.
    scale: The papers' α.
    proj_type: Which side is projected.
    rules: Ordered rules for single leaves.
    projector: How a basis is found.
    refresh: When.
    moments: What becomes of the moments then; factored ones are kept.
    state_dtype: Dtype of the moments.
    faithful: The paper's algorithm exactly.

  Returns:
    The optimizer.

  Raises:
    ValueError: See :func:`galore_optax.galore`.
    TypeError: See :func:`galore_optax.galore`.

  Example:
    >>> import jax.numpy as jnp
    >>> from galore_optax import galore_adafactor, state_bytes
    >>> params = {"w": jnp.zeros((512, 1376))}
    >>> elements = 512 * 128 + 128 * 1376 + 128 + 1376
    >>> state = galore_adafactor(1e-2).init(params)
    >>> state_bytes(state) - 4 * elements < 32  # counters
    True

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, section
    5.1; Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_,
    2018.
  """
  inner = optax.adafactor(
    learning_rate,
    # None by default, for `optax.inject_hyperparams` would trace an int.
    min_dim_size_to_factor=(
      128 if min_dim_size_to_factor is None else min_dim_size_to_factor
    ),
    decay_rate=decay_rate,
    multiply_by_parameter_scale=False,
    clipping_threshold=clipping_threshold,
    momentum=momentum,
    dtype_momentum=jnp.float32 if state_dtype is None else state_dtype,
    weight_decay_rate=weight_decay,
    eps=eps,
    weight_decay_mask=mask,
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
    state_dtype=state_dtype,
    faithful=faithful,
  )


def galore_sgd(
  learning_rate: Any,
  momentum: Any = 0.9,
  *,
  nesterov: bool = False,
  accumulator_dtype: Any = None,
  rank: Any = 128,
  update_proj_gap: Any = 200,
  scale: Any = 0.25,
  proj_type: str = "std",
  rules: plan.Rules = (),
  projector: str = "subspace",
  refresh: str = "staggered",
  moments: str = "rotate",
  state_dtype: Any = None,
  faithful: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore around stochastic gradient descent with momentum.

  .. math::

    M_{t+1} &= P_t^\top G_t + \beta M_t \\
    W_{t+1} &= W_t - \eta_t \alpha P_t M_{t+1}

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    momentum: Decay β of the momentum; None for none.
    nesterov: Whether to use Nesterov momentum.
    accumulator_dtype: Dtype of the momentum; None for that of the gradients.
    rank: Rank r; see :func:`galore_optax.galore` for it and all that follow.
    update_proj_gap: Steps T between two refreshes of a basis.
    scale: The papers' α.
    proj_type: Which side is projected.
    rules: Ordered rules for single leaves.
    projector: How a basis is found.
    refresh: When.
    moments: What becomes of the momentum then.
    state_dtype: Dtype of the momentum.
    faithful: The paper's algorithm exactly.

  Returns:
    The optimizer.

  Raises:
    ValueError: See :func:`galore_optax.galore`.
    TypeError: See :func:`galore_optax.galore`.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> from galore_optax import galore_sgd
    >>> state = galore_sgd(0.1, rank=4).init({"w": jnp.zeros((32, 64))})
    >>> optax.tree.get(state, "trace").low["w"].shape
    (4, 64)

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, section 3.
  """
  inner = optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype)
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
    state_dtype=state_dtype,
    faithful=faithful,
  )


def galore_lion(
  learning_rate: Any,
  b1: Any = 0.9,
  b2: Any = 0.99,
  mu_dtype: Any = None,
  weight_decay: Any = 1e-3,
  mask: Any = None,
  *,
  rank: Any = 128,
  update_proj_gap: Any = 200,
  scale: Any = 0.25,
  proj_type: str = "std",
  rules: plan.Rules = (),
  projector: str = "subspace",
  refresh: str = "staggered",
  moments: str = "rotate",
  state_dtype: Any = None,
  faithful: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore around Lion.

  The sign is taken in the subspace, so that every kept direction moves:

  .. math::

    W_{t+1} = W_t - \eta_t \left( \alpha P_t
      \operatorname{sign}(\beta_1 M_t + (1 - \beta_1) P_t^\top G_t)
      + \lambda W_t \right)

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    b1: Weight of the moment in the update.
    b2: Decay of the moment.
    mu_dtype: Dtype of the moment; None for that of the gradients.
    weight_decay: Decoupled weight decay λ, of the full weights.
    mask: Which leaves are decayed, see :func:`galore_adamw`.
    rank: Rank r; see :func:`galore_optax.galore` for it and all that follow.
    update_proj_gap: Steps T between two refreshes of a basis.
    scale: The papers' α.
    proj_type: Which side is projected.
    rules: Ordered rules for single leaves.
    projector: How a basis is found.
    refresh: When.
    moments: What becomes of the moment then.
    state_dtype: Dtype of the moment.
    faithful: The paper's algorithm exactly.

  Returns:
    The optimizer.

  Raises:
    ValueError: See :func:`galore_optax.galore`.
    TypeError: See :func:`galore_optax.galore`.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> from galore_optax import galore_lion
    >>> state = galore_lion(1e-3, rank=4).init({"w": jnp.zeros((32, 64))})
    >>> optax.tree.get(state, "mu").low["w"].shape
    (4, 64)

  References:
    Chen et al., `Symbolic Discovery of Optimization Algorithms
    <https://arxiv.org/abs/2302.06675>`_, 2023.
  """
  inner = optax.lion(
    learning_rate,
    b1=b1,
    b2=b2,
    mu_dtype=mu_dtype,
    weight_decay=weight_decay,
    mask=mask,
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
    state_dtype=state_dtype,
    faithful=faithful,
  )


def galore_adamw_8bit(
  learning_rate: Any,
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  weight_decay: Any = 1e-4,
  mask: Any = None,
  *,
  min_size: int | None = None,
  rank: Any = 128,
  update_proj_gap: Any = 200,
  scale: Any = 0.25,
  proj_type: str = "std",
  rules: plan.Rules = (),
  projector: str = "subspace",
  refresh: str = "staggered",
  moments: str = "rotate",
  basis_dtype: Any = "float32",
  accumulation_steps: int | None = None,
  faithful: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""8-bit GaLore: GaLore around AdamW with moments in eight bits.

  The update is that of :func:`galore_adamw`. Between steps the moments of the
  projected gradients, and those of the leaves at full rank, are kept in eight
  bits, see :func:`galore_optax.scale_by_adam_8bit`.

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Term ε outside of the root.
    weight_decay: Decoupled weight decay λ, of the full weights.
    mask: Which leaves are decayed, see :func:`galore_adamw`.
    min_size: Moments with fewer elements stay in float32; None for 4096.
    rank: Rank r; see :func:`galore_optax.galore` for it and all that follow.
    update_proj_gap: Steps T between two refreshes of a basis.
    scale: The papers' α.
    proj_type: Which side is projected.
    rules: Ordered rules for single leaves.
    projector: How a basis is found.
    refresh: When.
    moments: What becomes of the moments then.
    basis_dtype: Dtype of the bases, or `int4` or `int8`.
    accumulation_steps: Gradients that make one step; None for one.
    faithful: The paper's algorithm exactly.

  Returns:
    The optimizer.

  Raises:
    ValueError: See :func:`galore_optax.galore`.
    TypeError: See :func:`galore_optax.galore`.

  Example:
    >>> import jax.numpy as jnp
    >>> from galore_optax import galore_adamw_8bit, state_bytes
    >>> params = {"w": jnp.zeros((512, 1376))}
    >>> state = galore_adamw_8bit(1e-2).init(params)
    >>> moments = 2 * 128 * 1376  # one byte each, and a scale for 256 of them
    >>> state_bytes(state) < 4 * 512 * 128 + 1.02 * moments
    True

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, section
    4.3; Dettmers et al., `8-bit Optimizers
    <https://arxiv.org/abs/2110.02861>`_, 2022.
  """
  return galore(
    adamw_8bit(
      learning_rate, b1, b2, eps, weight_decay, mask, min_size=min_size
    ),
    rank=rank,
    update_proj_gap=update_proj_gap,
    scale=scale,
    proj_type=proj_type,
    rules=rules,
    projector=projector,
    refresh=refresh,
    moments=moments,
    basis_dtype=basis_dtype,
    accumulation_steps=accumulation_steps,
    faithful=faithful,
  )


def q_galore_adamw_8bit(
  learning_rate: Any,
  b1: Any = 0.9,
  b2: Any = 0.95,
  eps: Any = 1e-8,
  weight_decay: Any = 0.0,
  mask: Any = None,
  *,
  min_size: int | None = None,
  rank: Any = 128,
  update_proj_gap: Any = 200,
  scale: Any = 0.25,
  proj_type: str = "std",
  rules: plan.Rules = (),
  projector: str = "subspace",
  adaptive: adaptive_lib.Adaptive | None = None,
  moments: str = "rotate",
  accumulation_steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Q-GaLore's optimizer: 4-bit bases, 8-bit moments, adaptive refreshes.

  :func:`galore_adamw_8bit` whose bases are kept in four bits and refreshed
  less and less often where the subspace has settled. The other half of
  Q-GaLore is the weights: keep them in eight bits by
  :func:`galore_optax.quantize_params` and update them with
  :func:`galore_optax.apply_updates`, or both at once by
  :func:`galore_optax.layerwise`. The numbers that are defaults are those of
  the paper and its scripts. How bases are found, what becomes of moments and
  when matrices take their turns is this library's; so is the measure of
  settled subspaces, see :class:`galore_optax.Adaptive`.

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Term ε outside of the root.
    weight_decay: Decoupled weight decay λ, of the full weights.
    mask: Which leaves are decayed, see :func:`galore_adamw`.
    min_size: Moments with fewer elements stay in float32; None for 4096.
    rank: Rank r; see :func:`galore_optax.galore` for it and all that follow.
    update_proj_gap: Steps T between the first refreshes of a basis.
    scale: The papers' α.
    proj_type: Which side is projected.
    rules: Ordered rules for single leaves.
    projector: How a basis is found.
    adaptive: When a subspace counts as settled.
    moments: What becomes of the moments at a refresh.
    accumulation_steps: Gradients that make one step; None for one.

  Returns:
    The optimizer.

  Raises:
    ValueError: See :func:`galore_optax.galore`.
    TypeError: See :func:`galore_optax.galore`.

  Example:
    >>> import jax.numpy as jnp
    >>> from galore_optax import q_galore_adamw_8bit
    >>> state = q_galore_adamw_8bit(1e-2).init({"w": jnp.zeros((512, 1376))})
    >>> state.projector["w"]["left"].codes.dtype.name
    'int4'

  References:
    Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024.
  """
  return galore(
    adamw_8bit(
      learning_rate, b1, b2, eps, weight_decay, mask, min_size=min_size
    ),
    rank=rank,
    update_proj_gap=update_proj_gap,
    scale=scale,
    proj_type=proj_type,
    rules=rules,
    projector=projector,
    refresh="adaptive",
    adaptive=adaptive,
    moments=moments,
    basis_dtype="int4",
    accumulation_steps=accumulation_steps,
  )
