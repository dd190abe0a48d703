"""RACS: gradients whose rows and columns are scaled, without any moment."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax.residual import limiter
from galore_optax.tree import paths

_DECAY = 0.9  # of the scales
_ITERATIONS = 5


class ScaleByRacsState(NamedTuple):
  """State of :func:`scale_by_racs`, one leaf for each matrix or stack of them.

  Attributes:
    rows: Scales q of the rows, (..., m), float32.
    columns: Scales s of the columns, (..., n), float32.
    norm: Norms φ of the last updates, (...), float32.
  """

  rows: Any
  columns: Any
  norm: Any


def scale_by_racs() -> optax.GradientTransformation:
  r"""Divides rows and columns of gradients by the roots of their scales.

  It keeps two vectors for each matrix. The scales are the diagonals of the
  Kronecker product of two diagonal matrices that is nearest to the gradient's
  outer product with itself. From :math:`\hat q = 1`, five times in turn,

  .. math::

    \hat s_j = \frac{\sum_i \hat q_i G_{ij}^2}{\sum_i \hat q_i^2}, \quad
    \hat q_i = \frac{\sum_j \hat s_j G_{ij}^2}{\sum_j \hat s_j^2}

  and then

  .. math::

    s_t &= \beta s_{t-1} + (1 - \beta) \hat s, \quad
    q_t = \beta q_{t-1} + (1 - \beta) \hat q \\
    \tilde G_{ij} &= \frac{G_{ij}}{\sqrt{q_{t,i}\, s_{t,j}}}, \quad
    U_t = \frac{\gamma}{\max(\|\tilde G\| / \varphi_{t-1}, \gamma)} \tilde G,
    \quad \varphi_t = \|U_t\|

  with β = 0.9 and γ = 1.01; the first update is not limited.

  Returns:
    The gradient transformation. It takes matrices (..., m, n), the last two
    axes of each leaf. Give all other leaves another one, as below. `init`
    raises ValueError for a leaf with fewer axes.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from galore_optax.baselines import scale_by_racs
    >>> params = {"layers": {"w": jnp.ones((4, 8, 16))}, "head": jnp.ones(9)}
    >>> tx = optax.partition(
    ...   {
    ...     "matrices": optax.chain(scale_by_racs(), optax.sgd(2e-3)),
    ...     "others": optax.adamw(3e-2),
    ...   },
    ...   {"layers": "matrices", "head": "others"},
    ... )
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)
    >>> jax.tree.map(jnp.shape, updates["layers"])
    {'w': (4, 8, 16)}

  References:
    Gong et al., `Towards Efficient Optimizer Design for LLM via Structured
    Fisher Approximation with a Low-Rank Extension
    <https://arxiv.org/abs/2502.07752>`_, 2025, equation 16 and Algorithm 1.
  """

  def init(params: Any) -> ScaleByRacsState:
    for path, p in paths.leaves_by_path(params).items():
      if jnp.ndim(p) < 2:
        raise ValueError(
          f"RACS is for matrices, but the leaf {path!r} has shape "
          f"{jnp.shape(p)}. Give such leaves another optimizer, with "
          "`optax.partition`."
        )
    zeros = lambda cut: jax.tree.map(
      lambda p: jnp.zeros(cut(jnp.shape(p)), jnp.float32), params
    )
    return ScaleByRacsState(
      rows=zeros(lambda shape: shape[:-1]),
      columns=zeros(lambda shape: shape[:-2] + shape[-1:]),
      norm=zeros(lambda shape: shape[:-2]),
    )

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    leaves, treedef = jax.tree.flatten(updates)
    states = map(treedef.flatten_up_to, state)
    found = [_update_leaf(*row) for row in zip(leaves, *states, strict=True)]
    new, *kept = zip(*found, strict=True) if found else ((), (), (), ())
    return treedef.unflatten(new), ScaleByRacsState(
      *map(treedef.unflatten, kept)
    )

  return optax.GradientTransformation(init, update)


def _update_leaf(
  g: jax.Array, rows: jax.Array, columns: jax.Array, norm: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """The update of a leaf, and its state."""
  wide = g.astype(jnp.float32)
  q, s = _scales(wide)
  rows = _DECAY * rows + (1 - _DECAY) * q
  columns = _DECAY * columns + (1 - _DECAY) * s
  scaled = wide * _inverse_root(rows)[..., None]
  scaled *= _inverse_root(columns)[..., None, :]
  size = limiter.root(jnp.sum(scaled * scaled, (-2, -1)))
  excess, norm = limiter.limit(size, norm)
  return (scaled / excess[..., None, None]).astype(g.dtype), rows, columns, norm


def _scales(g: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The scales of the rows and of the columns of one gradient."""
  # Fourth powers of small gradients would be below float32's range.
  size = jnp.max(jnp.abs(g), axis=(-2, -1), keepdims=True)
  squares = (g / jnp.where(size > 0, size, 1)) ** 2
  q = jnp.ones(g.shape[:-1], jnp.float32)
  s = jnp.zeros(g.shape[:-2] + g.shape[-1:], jnp.float32)
  for _ in range(_ITERATIONS):
    s = _divide(jnp.einsum("...ij,...i->...j", squares, q), q)
    q = _divide(jnp.einsum("...ij,...j->...i", squares, s), s)
  return q, s * size[..., 0] ** 2


def _divide(x: jax.Array, by: jax.Array) -> jax.Array:
  """Divides by the square of a norm; zeros stay zero."""
  square = jnp.sum(by**2, axis=-1, keepdims=True)
  return x / jnp.where(square > 0, square, 1)


def _inverse_root(x: jax.Array) -> jax.Array:
  """1 / √x, and 0 for rows or columns that never had a gradient."""
  return jnp.where(x > 0, jax.lax.rsqrt(jnp.where(x > 0, x, 1)), 0)
