r"""Orthogonalised momentum, and SUMO: GaLore around it.

The polar factor of a moment is found by matrix products alone: no
factorisation, which on CPU hangs when it is batched, and a stack of matrices
goes through the same products as one.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks, paths, plan
from galore_optax.galore import galore

# Singular values from here to 1, as fractions of the Frobenius norm, end at 1.
TOLERANCE = 1e-5

# Largest scaling at which the iteration is stable: above, the largest singular
# value would be mapped to next to nothing, and its direction lost in rounding.
_MAX_SCALING = 1.6977


def _scalings(lowest: float) -> list[float]:
  """The scaling of each iteration, until all singular values are at 1."""
  found = []
  image = lambda x, rho: 0.5 * rho * x * (3 - (rho * x) ** 2)
  while 1 - lowest > 1e-7:
    rho = min(_MAX_SCALING, (3 / (1 + lowest + lowest**2)) ** 0.5)
    lowest = min(image(lowest, rho), image(1.0, rho))
    found.append(rho)
  return found


def polar_factor(x: jax.Array) -> jax.Array:
  r"""The polar factor :math:`U V^\top` of matrices :math:`U S V^\top`.

  By the scaled Newton-Schulz iteration, on the matrix divided by its Frobenius
  norm,

  .. math::

    X \leftarrow \tfrac{3}{2} \rho X - \tfrac{1}{2} \rho^3 X X^\top X,

  16 times, with the ρ for which the singular values between 1e-5 and 1 approach
  1 fastest. It ends at float32 rounding: the error is some 1e-6 for a well
  conditioned matrix, and below 1e-7 κ for a condition number κ up to 1e5, which
  is what the rounding of the matrix itself costs. Directions with a singular
  value of less than 1e-5 of the Frobenius norm stay smaller than 1; those of
  rounding noise, as a rank-deficient matrix has, end at some 0.01 or below. A
  matrix of zeros stays zero.

  Args:
    x: Matrices (..., m, n), real.

  Returns:
    Polar factors of the same shape and dtype.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from galore_optax import polar_factor
    >>> o = polar_factor(jax.random.normal(jax.random.key(0), (3, 8, 20)))
    >>> bool(jnp.allclose(o @ jnp.swapaxes(o, -1, -2), jnp.eye(8), atol=1e-5))
    True

  References:
    Chen and Chow, A Stable Scaling of Newton-Schulz for Improving the Sign
    Function Computation of a Hermitian Matrix, 2014.
  """
  wide = x.shape[-2] <= x.shape[-1]
  y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  y = y if wide else jnp.swapaxes(y, -1, -2)
  # First by the largest entry, so that squares stay in range.
  for size in (_largest, _norm):
    scale = size(y)
    y = y / jnp.where(scale > 0, scale, 1)

  def once(y: jax.Array, rho: jax.Array) -> tuple[jax.Array, None]:
    gram = _matmul("...mn,...kn->...mk", y, y)
    cubic = _matmul("...mk,...kn->...mn", gram, y)
    return 1.5 * rho * y - 0.5 * rho**3 * cubic, None

  y, _ = jax.lax.scan(once, y, jnp.asarray(_scalings(TOLERANCE), y.dtype))
  return (y if wide else jnp.swapaxes(y, -1, -2)).astype(x.dtype)


def _largest(x: jax.Array) -> jax.Array:
  return jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0)


def _norm(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))


def _matmul(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)


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
    scaled = lambda x: max(x.shape[-2:]) ** 0.5 * polar_factor(x)
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
