"""Ready recipes: GaLore around the optimizers it is used with."""

from typing import Unpack

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from galore_optax import checks
from galore_optax._galore import galore
from galore_optax.optimizers import options as options_lib
from galore_optax.optimizers.adam8bit import Mask, adamw_8bit
from galore_optax.optimizers.options import GaLoreOptions, recipe
from galore_optax.subspace.refresh_settings import Refresh


def _apollo(residual: str) -> dict[str, str]:
  """Options of an APOLLO recipe that must keep their defaults, and why."""
  return {
    "residual": f"it is the method residual={residual!r}",
    "accumulation_steps": options_lib.WHOLE_GRADIENT,
    "faithful": options_lib.OTHER_PAPER,
  }


@recipe()
def galore_adamw(
  learning_rate: optax.ScalarOrSchedule,
  b1: ArrayLike = 0.9,
  b2: ArrayLike = 0.999,
  eps: ArrayLike = 1e-8,
  eps_root: ArrayLike = 0.0,
  mu_dtype: DTypeLike | None = None,
  weight_decay: optax.ScalarOrSchedule = 1e-4,
  mask: Mask | None = None,
  *,
  nesterov: bool = False,
  **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore around AdamW.

  Adam's moments are those of the projected gradients, :math:`R_t = P_t^\top
  G_t`. The weights W get the lifted update and a full-size decay:

  .. math::

    W_{t+1} = W_t - \eta_t \left( \alpha P_t
      \frac{\hat\mu_t}{\sqrt{\hat\nu_t + \bar\varepsilon} + \varepsilon}
      + \lambda W_t \right)

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Term ε added to the root.
    eps_root: Term added under the root.
    mu_dtype: Dtype of the first moment; None for that of the gradients.
    weight_decay: Decoupled weight decay λ, of the full weights.
    mask: Which leaves are decayed: a tree of bools in the parameters'
      structure, or a function that makes one; None for all leaves.
    nesterov: Whether to use Nesterov momentum.
    **options: GaLore's options, see :func:`galore_optax.galore`.

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
  checks.check_eps(eps, options.get("state_dtype"))
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
    **options,
  )


_RANDOM = Refresh(finder="random", moments="keep")


@recipe(
  {"rank": 256, "scale": 1.0, "refresh": _RANDOM, "residual": "apollo"},
  refused=_apollo("apollo"),
)
def apollo_adamw(
  learning_rate: optax.ScalarOrSchedule,
  b1: ArrayLike = 0.9,
  b2: ArrayLike = 0.999,
  eps: ArrayLike = 1e-8,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  mask: Mask | None = None,
  **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
  r"""APOLLO: the whole gradient, with each column scaled to Adam's size.

  Adam runs on :math:`R_t = P_t^\top G_t` with a random projection P. Only the
  column norms of its directions :math:`N_t` are used: they scale the columns of
  the full gradient,

  .. math::

    W_{t+1} = W_t - \eta_t \sqrt{\alpha}\, G_t\, \mathrm{diag}\left(
      \frac{\|N_{t,:j}\|}{\|R_{t,:j}\|} \right)

  and the norm of the update may grow by 1% a step.

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Term added to the root.
    weight_decay: Decoupled weight decay, of the full weights.
    mask: Which leaves are decayed, see :func:`galore_adamw`.
    **options: GaLore's options, see :func:`galore_optax.galore`.
      The defaults that differ: `rank=256`, which the paper takes for 7B,
      `scale=1.0`, `residual="apollo"` and `refresh=Refresh(finder="random",
      moments="keep")`. The update is multiplied by the root of `scale`. The
      finders `subspace` and `svd` take the leading directions, and store a
      basis instead of a seed.

  Returns:
    The optimizer.

  Raises:
    ValueError: See :func:`galore_optax.galore`.
    TypeError: See :func:`galore_optax.galore`.

  Example:
    Two moments of rank 16, and a seed and a norm for each matrix:

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
  checks.check_eps(eps, options.get("state_dtype"))
  return galore(
    optax.adamw(
      learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask
    ),
    **options,
  )


@recipe(
  {"rank": 1, "scale": 128.0, "refresh": _RANDOM, "residual": "apollo_mini"},
  refused=_apollo("apollo_mini"),
)
def apollo_mini_adamw(
  learning_rate: optax.ScalarOrSchedule,
  b1: ArrayLike = 0.9,
  b2: ArrayLike = 0.999,
  eps: ArrayLike = 1e-8,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  mask: Mask | None = None,
  **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
  r"""APOLLO-Mini: the whole gradient, with each matrix scaled to Adam's size.

  As :func:`apollo_adamw`, but with rank one and one factor for each matrix,

  .. math::

    W_{t+1} = W_t - \eta_t \sqrt{\alpha}\, \frac{\|N_t\|}{\|R_t\|}\, G_t

  and hardly more state than plain gradient descent.

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Term added to the root.
    weight_decay: Decoupled weight decay, of the full weights.
    mask: Which leaves are decayed, see :func:`galore_adamw`.
    **options: GaLore's options, see :func:`galore_optax.galore`.
      The defaults that differ: `rank=1`, `scale=128.0`,
      `residual="apollo_mini"`, and `refresh` as in :func:`apollo_adamw`. The
      update is multiplied by the root of `scale`.

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
  checks.check_eps(eps, options.get("state_dtype"))
  return galore(
    optax.adamw(
      learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask
    ),
    **options,
  )


@recipe()
def galore_adafactor(
  learning_rate: optax.ScalarOrSchedule,
  decay_rate: ArrayLike = 0.8,
  clipping_threshold: ArrayLike | None = 1.0,
  momentum: ArrayLike | None = 0.9,
  eps: ArrayLike = 1e-30,
  weight_decay: optax.ScalarOrSchedule | None = None,
  mask: Mask | None = None,
  *,
  min_dim_size_to_factor: int | None = None,
  **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore around Adafactor with a first moment.

  Adafactor's second moment is a rank-one product of row and column means, here
  those of the squared projected gradients. With `momentum` the state has a
  first moment as well; without it, Adafactor's state is so small that GaLore
  saves nothing. Updates are clipped by their root mean square in the subspace.
  The parameters' scale is not used (`multiply_by_parameter_scale=False`).

  Args:
    learning_rate: Learning rate, a float or a schedule of the step.
    decay_rate: The second moment's decay at step t is 1 - t^-decay_rate.
    clipping_threshold: Largest root mean square of an update; None for no
      clipping.
    momentum: Decay of the first moment; None for no first moment.
    eps: Term added to the squared gradients.
    weight_decay: Weight decay. As in `optax.adafactor`, it is not multiplied
      by the learning rate; None for no decay.
    mask: Which leaves are decayed, see :func:`galore_adamw`.
    min_dim_size_to_factor: Arrays whose second-largest axis is shorter have an
      unfactored second moment. In a subspace that axis may be the rank. None
      means 128, Optax's default.
    **options: GaLore's options, see :func:`galore_optax.galore`.
      Factored second moments are left as they are at a refresh.

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
    dtype_momentum=options.get("state_dtype") or jnp.float32,
    weight_decay_rate=weight_decay,
    eps=eps,
    weight_decay_mask=mask,
  )
  return galore(
    inner,
    **options,
  )


@recipe()
def galore_sgd(
  learning_rate: optax.ScalarOrSchedule,
  momentum: ArrayLike | None = 0.9,
  *,
  nesterov: bool = False,
  accumulator_dtype: DTypeLike | None = None,
  **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore around stochastic gradient descent with momentum.

  .. math::

    M_{t+1} &= P_t^\top G_t + \beta M_t \\
    W_{t+1} &= W_t - \eta_t \alpha P_t M_{t+1}

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    momentum: Decay β of the momentum; None for no momentum.
    nesterov: Whether to use Nesterov momentum.
    accumulator_dtype: Dtype of the momentum; None for that of the gradients.
    **options: GaLore's options, see :func:`galore_optax.galore`.

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
    **options,
  )


@recipe()
def galore_lion(
  learning_rate: optax.ScalarOrSchedule,
  b1: ArrayLike = 0.9,
  b2: ArrayLike = 0.99,
  mu_dtype: DTypeLike | None = None,
  weight_decay: optax.ScalarOrSchedule = 1e-3,
  mask: Mask | None = None,
  **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore around Lion.

  The sign is taken in the subspace, entry by entry:

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
    **options: GaLore's options, see :func:`galore_optax.galore`.

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
    **options,
  )


@recipe()
def galore_adamw_8bit(
  learning_rate: optax.ScalarOrSchedule,
  b1: ArrayLike = 0.9,
  b2: ArrayLike = 0.999,
  eps: ArrayLike = 1e-8,
  weight_decay: optax.ScalarOrSchedule = 1e-4,
  mask: Mask | None = None,
  *,
  min_size: int | None = None,
  **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
  r"""8-bit GaLore: GaLore around AdamW with moments in eight bits.

  The update is that of :func:`galore_adamw`. Between steps the moments of all
  leaves, projected or not, are stored in eight bits, see
  :func:`galore_optax.scale_by_adam_8bit`.

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Term ε added to the root.
    weight_decay: Decoupled weight decay λ, of the full weights.
    mask: Which leaves are decayed, see :func:`galore_adamw`.
    min_size: Moments with fewer elements stay in float32; None means 4096.
    **options: GaLore's options, see :func:`galore_optax.galore`.

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
    **options,
  )


@recipe(
  {"basis_dtype": "int4", "refresh": Refresh(policy="adaptive")},
  refused={"faithful": options_lib.OTHER_PAPER},
)
def q_galore_adamw_8bit(
  learning_rate: optax.ScalarOrSchedule,
  b1: ArrayLike = 0.9,
  b2: ArrayLike = 0.95,
  eps: ArrayLike = 1e-8,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  mask: Mask | None = None,
  *,
  min_size: int | None = None,
  **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
  r"""Q-GaLore's optimizer: 4-bit bases, 8-bit moments, adaptive refreshes.

  This is :func:`galore_adamw_8bit` with bases in four bits, which are refreshed
  less often once their subspace has settled. The other half of Q-GaLore is
  8-bit weights: make them by :func:`galore_optax.quantize_params` and update
  them with :func:`galore_optax.apply_updates`, or use
  :func:`galore_optax.layerwise`, which does both. The default numbers are those
  of the paper and its scripts. How bases are found, how moments are carried
  over and when each matrix is due are this library's choices, and so is the
  measure of settled subspaces, see :class:`galore_optax.Adaptive`.

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Term ε added to the root.
    weight_decay: Decoupled weight decay λ, of the full weights.
    mask: Which leaves are decayed, see :func:`galore_adamw`.
    min_size: Moments with fewer elements stay in float32; None means 4096.
    **options: GaLore's options, see :func:`galore_optax.galore`.
      The defaults that differ: `basis_dtype="int4"` and
      `refresh=Refresh(policy="adaptive")`.

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
    **options,
  )
