"""Alice: Adam in a subspace that switches, and the rest, column by column."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax.linalg import matmul
from train.methods import transforms
from train.methods.options import OptimizerConfig
from train.methods.rivals import parts

# As the paper has them at 60M to 350M parameters.
SECOND_DECAY = 0.9  # of the second moment
TRACKING_DECAY = 0.999  # of the covariance within the subspace
COMPENSATION = 0.4  # factor on what the subspace leaves out
LEADING = 5 / 16  # share of a basis that is eigenvectors


def alice(c: OptimizerConfig, lr: optax.Schedule, shardings: Any = None):
  """Alice for the block matrices, AdamW for the rest.

  `optimizer.scale` is its factor α. `optimizer.rank` and
  `optimizer.update_proj_gap` are those of its subspaces, `optimizer.b1` and
  `eps` those of its Adam; the second decay is 0.9, whatever AdamW's is.
  """
  inner = scale_by_alice(c.rank, c.update_proj_gap, c.b1, c.eps)
  matrices = parts.finished(c, lr, inner, optax.scale(c.scale))
  return parts.for_matrices(matrices, transforms.adamw(c, lr, shardings))


class Matrix(NamedTuple):
  """State of a leaf, whose matrices have m rows and n columns, m <= n.

  Attributes:
    basis: U (m, r).
    tracked: Covariance Q of the projected gradients (r, r).
    mu: First moment (r, n).
    nu: Second moment (r, n).
    energy: Mean squares p of the columns of the residual (n).
    norm: Norm φ of the last compensation.
  """

  basis: jax.Array
  tracked: jax.Array
  mu: jax.Array
  nu: jax.Array
  energy: jax.Array
  norm: jax.Array


class ScaleByAliceState(NamedTuple):
  """State of :func:`scale_by_alice`.

  Attributes:
    count: Updates so far.
    matrices: A :class:`Matrix` for each leaf.
  """

  count: Any  # shape=(), dtype=jnp.int32
  matrices: Any


def scale_by_alice(
  rank: int, gap: int, b1: Any, eps: Any
) -> optax.GradientTransformation:
  r"""Adam in a tracked subspace, with compensation for what it leaves out.

  At the first step and at each multiple of the gap, the basis switches: to the
  first l of r eigenvectors of

  .. math::

    \beta_3 U Q U^\top + (1 - \beta_3) G_t G_t^\top

  found by one subspace iteration from U, and to r - l directions drawn from the
  complement of all r. Then, and at all other steps,

  .. math::

    \sigma &= U^\top G_t, \quad Q \leftarrow \beta_3 Q + (1 - \beta_3) \sigma
      \sigma^\top, \quad R = G_t - U \sigma \\
    m &\leftarrow \beta_1 m + (1 - \beta_1) \sigma, \quad
    v \leftarrow \beta_2 v + (1 - \beta_2) \sigma^2 \\
    p_j &\leftarrow \beta_1 p_j + (1 - \beta_1) \sum_i R_{ij}^2, \quad
    C = \sqrt{m - r}\, R \operatorname{diag}(p)^{-1/2} \\
    U_t &= U \frac{m}{\sqrt v + \varepsilon} + \alpha_c \eta C

  where η limits the growth of the norm of C. Matrices with more rows than
  columns are transposed. Moments are kept as they are when the basis switches.

  The paper begins with U = 0, from which no subspace iteration leads anywhere;
  here it begins with random directions. Nor does it fix the signs of
  eigenvectors. Here each has that of the direction it replaces, so that the
  kept momentum is not turned around.

  Args:
    rank: Rank r, at most m.
    gap: Steps between two switches.
    b1: Decay of the first moment and of p.
    eps: Term added to the root.

  Returns:
    The gradient transformation, for matrices in the last two axes.

  References:
    Gong et al., `Towards Efficient Optimizer Design for LLM via Structured
    Fisher Approximation with a Low-Rank Extension
    <https://arxiv.org/abs/2502.07752>`_, 2025, Algorithms 2, 3, 4 and 10.
  """

  def init(params: Any) -> ScaleByAliceState:
    matrices = jax.tree.map(lambda p: _start(p.shape, rank), params)
    return ScaleByAliceState(jnp.zeros([], jnp.int32), matrices)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    count: Any = optax.safe_increment(state.count)
    due = (count == 1) | (count % gap == 0)

    def update_leaf(g: jax.Array, old: Matrix) -> tuple[jax.Array, Matrix]:
      turn = lambda x: x.mT if g.shape[-2] > g.shape[-1] else x
      wide = turn(g.astype(jnp.float32))
      basis = jax.lax.cond(
        due, lambda: _switch(old, wide, count), lambda: old.basis
      )
      step, new = _update_matrix(wide, old._replace(basis=basis), b1, eps)
      return turn(step).astype(g.dtype), new

    new, matrices = parts.map_leaves(update_leaf, updates, state.matrices)
    return new, ScaleByAliceState(count, matrices)

  return optax.GradientTransformation(init, update)


def _start(shape: tuple[int, ...], rank: int) -> Matrix:
  """The first state of a leaf."""
  *lead, a, b = shape
  m, n = min(a, b), max(a, b)
  r = min(rank, m)
  zeros = lambda *ends: jnp.zeros((*lead, *ends), jnp.float32)
  basis, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (m, r)))
  return Matrix(
    jnp.broadcast_to(basis, (*lead, m, r)),
    zeros(r, r),
    zeros(r, n),
    zeros(r, n),
    zeros(n),
    zeros(),
  )


def _update_matrix(
  g: jax.Array, old: Matrix, b1: Any, eps: Any
) -> tuple[jax.Array, Matrix]:
  """The update of matrices with m <= n, and their state."""
  m, r = old.basis.shape[-2:]
  low = matmul("...mr,...mn->...rn", old.basis, g)
  residual = g - matmul("...mr,...rn->...mn", old.basis, low)
  covariance = matmul("...rn,...sn->...rs", low, low)
  tracked = _decay(TRACKING_DECAY, old.tracked, covariance)
  mu = _decay(b1, old.mu, low)
  nu = _decay(SECOND_DECAY, old.nu, low**2)
  # The sums are those of the squares of G less those of σ.
  energy = _decay(b1, old.energy, jnp.sum(residual**2, axis=-2))
  known = energy > 0
  size = jnp.where(known, jax.lax.rsqrt(jnp.where(known, energy, 1)), 0)
  extra = (m - r) ** 0.5 * residual * size[..., None, :]
  extra, norm = parts.limited(extra, old.norm)
  step = mu / (jnp.sqrt(nu) + eps)
  step = matmul("...mr,...rn->...mn", old.basis, step) + COMPENSATION * extra
  return step, Matrix(old.basis, tracked, mu, nu, energy, norm)


def _decay(decay: Any, mean: jax.Array, x: jax.Array) -> jax.Array:
  """The next value of a running mean."""
  return decay * mean + (1 - decay) * x


def _switch(old: Matrix, g: jax.Array, count: jax.Array) -> jax.Array:
  """The next basis: leading eigenvectors, and directions that are drawn."""
  m, r = old.basis.shape[-2:]
  vectors = _eigenvectors(old, g)
  # Of a rank above m / 2 the complement is too small to fill the rest.
  leading = max(1, round(LEADING * r), 2 * r - m)
  complement = jnp.linalg.qr(vectors, mode="complete")[0][..., r:]
  # The same draw for all matrices: their complements differ.
  key = jax.random.fold_in(jax.random.key(0), count)
  drawn = jax.random.permutation(key, m - r)[: r - leading]
  return jnp.concatenate(
    [vectors[..., :leading], complement[..., drawn]], axis=-1
  )


def _eigenvectors(old: Matrix, g: jax.Array) -> jax.Array:
  """Eigenvectors of the tracked covariance by one iteration, largest first."""

  def apply(x: jax.Array) -> jax.Array:
    past = matmul("...mr,...mk->...rk", old.basis, x)
    past = matmul("...rs,...sk->...rk", old.tracked, past)
    past = matmul("...mr,...rk->...mk", old.basis, past)
    now = matmul("...mn,...mk->...nk", g, x)
    now = matmul("...mn,...nk->...mk", g, now)
    return _decay(TRACKING_DECAY, past, now)

  found, _ = jnp.linalg.qr(apply(old.basis))
  small = matmul("...mr,...ms->...rs", found, apply(found))
  _, vectors = jnp.linalg.eigh(small)
  vectors = matmul("...mr,...rs->...ms", found, vectors[..., ::-1])
  along = jnp.sum(vectors * old.basis, axis=-2, keepdims=True)
  return jnp.where(along < 0, -vectors, vectors)
