"""Bases and projections: pure functions on one matrix or a stack of them.

A basis has orthonormal columns: `left`, P of shape (..., m, r), spans columns
of the gradient G; `right`, Q of shape (..., n, r), spans rows. A one-sided site
has one of them, a two-sided site both.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax import qarray

Bases = Mapping[str, jax.Array]

METHODS = ("subspace", "svd", "random")

# Passes of CholeskyQR, and their shifts relative to the trace: two shifted
# passes bring any condition number up to 1e6 down to where the third is exact.
_SHIFTS = (1e-6, 1e-7, 0.0)

# Shift of the Gram operator: bounds the condition number of an iterate by 1e6.
_GRAM_SHIFT = 1e-6

# Rows that are eliminated together on CPU.
_BLOCK = 64

_HIGHEST = jax.lax.Precision.HIGHEST


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["seed"],
  meta_fields=["shape"],
)
@dataclasses.dataclass(frozen=True)
class RandomBasis:
  """A random projection that is never stored, only its seed.

  All matrices of a stack share it. Its entries are normal with variance 1 / r,
  so that it keeps the norms of vectors in the mean; its columns are not quite
  orthogonal.

  Attributes:
    seed: Gives the entries; uint32 scalar.
    shape: Shape (..., m, r) of the stack of projections.

  Example:
    >>> p = read({"left": RandomBasis(jnp.uint32(7), (3, 64, 16))})["left"]
    >>> p.shape, bool(abs(jnp.mean(p * p) - 1 / 16) < 0.01)
    ((64, 16), True)
  """

  seed: Any
  shape: tuple[int, ...]

  def draw(self) -> jax.Array:
    """The projection (m, r), float32; one for each seed."""
    size, rank = self.shape[-2:]

    def normal(seed: jax.Array) -> jax.Array:
      key = jax.random.key(seed)
      return jax.random.normal(key, (size, rank), jnp.float32) / rank**0.5

    drawn = jax.vmap(normal)(jnp.reshape(self.seed, -1))
    return drawn.reshape(*jnp.shape(self.seed), size, rank)

  def renewed(self, due: jax.Array) -> "RandomBasis":
    """The next projection where it is due, this one otherwise."""
    after = jax.random.bits(jax.random.key(self.seed), (), jnp.uint32)
    return dataclasses.replace(self, seed=jnp.where(due, after, self.seed))


def read(kept: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Bases as arrays, from how the state keeps them.

  Args:
    kept: Side to basis: an array, or a :class:`galore_optax.QArray` of the
      transposed basis, whose blocks lie within one direction and which
      compilers lay out like that without copying it; or a `RandomBasis`, which
      is without the axes that stack matrices.

  Returns:
    Side to basis (..., m, r) or (..., n, r).
  """
  return {side: _read(x) for side, x in kept.items()}


def read_stacked(kept: Mapping[str, Any]) -> dict[str, jax.Array]:
  """As :func:`read`, with the axes that stack matrices on random bases too."""
  return {
    side: jnp.broadcast_to(x, kept[side].shape)
    if isinstance(kept[side], RandomBasis) and not jnp.ndim(kept[side].seed)
    else x
    for side, x in read(kept).items()
  }


def _read(kept: Any) -> jax.Array:
  if isinstance(kept, RandomBasis):
    return kept.draw()
  if qarray.is_quantized(kept):
    return jnp.swapaxes(qarray.dequantize(kept), -1, -2)
  return kept


def shape_of(kept: Any) -> tuple[int, ...]:
  """Shape (..., m, r) of a basis that the state keeps."""
  shape = kept.shape
  if qarray.is_quantized(kept):
    return (*shape[:-2], shape[-1], shape[-2])
  return shape


def write(bases: Bases, kept: Mapping[str, Any]) -> dict[str, Any]:
  """Bases as the state keeps them.

  A quantised basis is rounded to the nearest and not made orthonormal again:
  the gradient is projected and lifted with the same, slightly skew basis.

  Args:
    bases: Side to basis.
    kept: Gives the formats.

  Returns:
    The bases, each in the format of its counterpart.
  """
  return {
    side: qarray.requantize(kept[side], jnp.swapaxes(x, -1, -2))
    if qarray.is_quantized(kept[side])
    else x.astype(kept[side].dtype)
    for side, x in bases.items()
  }


def project(g: jax.Array, bases: Bases) -> jax.Array:
  r"""Projects gradients on their bases, :math:`R = P^\top G Q`.

  Args:
    g: Gradients (..., m, n).
    bases: `left` (..., m, r), `right` (..., n, r), or both.

  Returns:
    Projected gradients: (..., r, n), (..., m, r) or (..., r, r).

  Example:
    >>> bases = {"left": jnp.eye(4)[:, :2]}
    >>> project(jnp.ones((4, 3)), bases).shape
    (2, 3)
  """
  if "left" in bases:
    g = _matmul("...mr,...mn->...rn", bases["left"], g)
  if "right" in bases:
    g = _matmul("...mn,...nr->...mr", g, bases["right"])
  return g


def lift(low: jax.Array, bases: Bases) -> jax.Array:
  r"""Lifts low-rank updates back, :math:`U = P N Q^\top`.

  Args:
    low: Updates (..., r, n), (..., m, r) or (..., r, r).
    bases: The bases they were made in.

  Returns:
    Updates (..., m, n).
  """
  if "right" in bases:
    low = _matmul("...mr,...nr->...mn", low, bases["right"])
  if "left" in bases:
    low = _matmul("...mr,...rn->...mn", bases["left"], low)
  return low


def overlap(new: Bases, old: Bases) -> dict[str, jax.Array]:
  r"""How the new bases see the old ones, :math:`C = P_{new}^\top P_{old}`.

  Args:
    new: New bases.
    old: Old bases of the same shapes.

  Returns:
    Side to C of shape (..., r, r).
  """
  return {
    side: _matmul("...mr,...ms->...rs", new[side], old[side]) for side in new
  }


def rotate(moment: jax.Array, turn: Bases, order: int) -> jax.Array:
  r"""Carries a moment over into new bases.

  The first moment is linear in the gradient, :math:`\mu \leftarrow C \mu`. The
  second is a mean of squares, of which the diagonal approximation keeps
  :math:`\nu \leftarrow (C \circ C) \nu`.

  Args:
    moment: A moment of the shape of the projected gradient.
    turn: Overlap of the new bases with the old ones, see :func:`overlap`.
    order: 1 or 2.

  Returns:
    The moment in the new bases, same shape and dtype.
  """
  dtype = moment.dtype
  if "left" in turn:
    moment = _matmul("...rs,...sn->...rn", turn["left"] ** order, moment)
  if "right" in turn:
    moment = _matmul("...ms,...rs->...mr", moment, turn["right"] ** order)
  return moment.astype(dtype)


def rotate_variance(
  nu: jax.Array, mu: jax.Array, turn: Bases, ratio: jax.Array
) -> jax.Array:
  r"""Carries Adam's second moment over as mean and variance (LDAdam).

  With the first moment μ and :math:`\kappa = (1 - \beta_2^t) / (1 -
  \beta_1^t)^2`, for which :math:`\nu - \kappa \mu^2` is the variance,

  .. math::

    \nu \leftarrow \left| (C \circ C)(\nu - \kappa \mu^2)
      + \kappa (C \mu)^2 \right|

  Args:
    nu: The second moment, of the shape of the projected gradient.
    mu: The first moment, before it is carried over.
    turn: Overlap of the new bases with the old ones, see :func:`overlap`.
    ratio: κ, scalar.

  Returns:
    The second moment in the new bases, same shape and dtype.
  """
  mu = mu.astype(jnp.promote_types(mu.dtype, jnp.float32))
  spread = rotate(nu - ratio * mu * mu, turn, 2)
  mean = rotate(mu, turn, 1)
  return jnp.abs(spread + ratio * mean * mean).astype(nu.dtype)


def drop_null(low: jax.Array, bases: Bases, tolerance: jax.Array) -> jax.Array:
  """Zeroes the directions in which a projected gradient is rounding noise.

  Where the gradient's numerical rank is below r, the remaining rows of R hold
  rounding errors, some 1e-7 of the largest row. A normalising optimizer such
  as Adam would blow them up to full-size updates in random directions.

  Args:
    low: Projected gradients R. One that is not finite anywhere counts as zero.
    bases: The bases they were made with.
    tolerance: Directions whose norm is below this fraction of the Frobenius
      norm are zeroed; scalar.

  Returns:
    R with the null directions exactly zero.
  """
  axes = [axis for side, axis in (("left", -1), ("right", -2)) if side in bases]
  energy = low * low
  keep = jnp.bool_(True)
  for axis in axes:
    here = jnp.sum(energy, axis)
    # Comparisons with nan are false. Sums compile faster than maxima.
    whole = jnp.sum(here, -1)[..., None]
    told = (here >= tolerance**2 * whole) & (whole < jnp.inf)
    keep &= jnp.expand_dims(told, axis)
  return jnp.where(keep, low, 0)


def start_basis(key: jax.Array, size: int, rank: int) -> jax.Array:
  r"""An orthonormal basis to start from, without any linear algebra.

  The first r columns of a cosine transform (type IV) with random signs,
  :math:`P_{ij} = s_i \sqrt{2/m} \cos(\pi (2 i + 1)(2 j + 1) / 4 m)`: exactly
  orthonormal, spread over all coordinates like a random basis, with no entry
  equal to zero, and elementwise to compute.

  Args:
    key: Random key for the signs.
    size: Number of rows m.
    rank: Number of columns r.

  Returns:
    float32 (m, r) with orthonormal columns.

  Example:
    >>> p = start_basis(jax.random.key(0), 8, 3)
    >>> bool(jnp.allclose(p.T @ p, jnp.eye(3), atol=1e-6))
    True
  """
  i = 2 * jnp.arange(size, dtype=jnp.uint32)[:, None] + 1
  j = 2 * jnp.arange(rank, dtype=jnp.uint32)[None, :] + 1
  # Whole turns are taken off in integers: cos of a large angle is inexact.
  turn = (i * j) % jnp.uint32(8 * size)
  angle = turn.astype(jnp.float32) * jnp.float32(jnp.pi / (4 * size))
  signs = jax.random.rademacher(key, (size, 1), jnp.float32)
  return signs * jnp.float32((2 / size) ** 0.5) * jnp.cos(angle)


def random_basis(key: jax.Array, size: int, rank: int) -> jax.Array:
  """An orthonormal basis drawn uniformly among all (Haar's measure).

  That is what the Gram-Schmidt process makes of independent normal numbers.

  Args:
    key: Random key.
    size: Number of rows m.
    rank: Number of columns r.

  Returns:
    float32 (m, r) with orthonormal columns.

  Example:
    >>> p = random_basis(jax.random.key(0), 8, 3)
    >>> bool(jnp.allclose(p.T @ p, jnp.eye(3), atol=1e-6))
    True
  """
  return _orthonormalize(jax.random.normal(key, (size, rank), jnp.float32))


def find_basis(
  g: jax.Array, old: jax.Array, side: str, method: str, iterations: jax.Array
) -> jax.Array:
  """The basis of one gradient's dominant subspace.

  A gradient that is zero or not finite tells nothing, and `old` is kept.

  Args:
    g: One gradient (m, n).
    old: The basis so far, (m, r) for `left` and (n, r) for `right`.
    side: `left` or `right`.
    method: `subspace`, warm-started subspace iteration, or `svd`, exact.
    iterations: Number of iterations for `subspace`, int32 scalar.

  Returns:
    Basis of the shape and dtype of `old`.

  Example:
    >>> g = jnp.outer(jnp.arange(1.0, 5.0), jnp.ones(3))
    >>> old = start_basis(jax.random.key(0), 4, 1)
    >>> new = find_basis(g, old, "left", "subspace", 2)
    >>> lifted = lift(project(g, {"left": new}), {"left": new})
    >>> bool(jnp.allclose(lifted, g, atol=1e-4))
    True
  """
  if method == "svd":
    return svd_basis(g, old, side)[0]
  return iterate(lambda basis: gram(g, basis, side), old, iterations)[0]


def svd_basis(
  g: jax.Array, old: jax.Array, side: str
) -> tuple[jax.Array, jax.Array]:
  """Singular vectors, signed so that every backend gives the same ones.

  Args:
    g: One gradient (m, n).
    old: The basis so far.
    side: `left` or `right`.

  Returns:
    The basis, and whether the gradient told anything.
  """
  g = g.astype(jnp.float32)
  largest = jnp.max(jnp.abs(g))
  told = jnp.isfinite(largest) & (largest > 0)
  g = jnp.where(told, g / jnp.where(told, largest, 1), 0)
  rank = old.shape[-1]
  u, _, vh = _svd(g)
  found = u[:, :rank] if side == "left" else vh[:rank].T
  peak = jnp.argmax(jnp.abs(found), axis=0)
  sign = jnp.sign(jnp.take_along_axis(found, peak[None], axis=0))
  found = found * jnp.where(sign == 0, 1, sign)
  return _where_told(told, found, old)


def gram(g: jax.Array, basis: jax.Array, side: str) -> jax.Array:
  r"""A gradient's Gram operator on a basis, but for a positive factor.

  Args:
    g: One gradient (m, n).
    basis: Its basis on that side.
    side: `left`, for :math:`G G^\top P`, or `right`, for :math:`G^\top G Q`.

  Returns:
    The image, float32 of the shape of the basis.
  """
  low = project(g, {side: basis})
  # Scaled, so that the squares of tiny and huge gradients stay in range.
  low = _scaled(low, jnp.sum(jnp.abs(low)))
  spec = "mn,rn->mr" if side == "left" else "mn,mr->nr"
  return _matmul(spec, g, low).astype(jnp.float32)


def iterate(
  gram_of: Callable[[jax.Array], jax.Array],
  old: jax.Array,
  iterations: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  r"""Subspace iteration from a basis, with a shifted Gram operator.

  :math:`P \leftarrow \mathrm{orth}(Y / \|Y\|_F + \epsilon P)` with
  :math:`Y = G G^\top P`. The shift keeps the eigenvectors, gives every iterate
  full rank whatever the gradient is, and bounds its condition number.

  Args:
    gram_of: From a basis to its image, see :func:`gram`.
    old: The basis so far.
    iterations: Number of iterations, int32 scalar.

  Returns:
    The basis, and whether the gradient told anything: one that is zero or not
    finite does not, and leaves the basis `old`.
  """

  def once(_, carry):
    basis, told = carry
    y = gram_of(basis)
    size = jnp.sum(jnp.abs(y))
    y = _scaled(y, size)  # squares must stay in range
    y = _scaled(y, jnp.sqrt(jnp.sum(y * y)))
    told &= (size > 0) & jnp.isfinite(size)
    return _orthonormalize(y + _GRAM_SHIFT * basis), told

  start = (old.astype(jnp.float32), jnp.bool_(True))
  found, told = jax.lax.fori_loop(0, iterations, once, start)
  return _where_told(told, found, old)


def _scaled(x: jax.Array, size: jax.Array) -> jax.Array:
  return x / jnp.where(size > 0, size, 1)


def _where_told(
  told: jax.Array, found: jax.Array, old: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The basis that was found, unless there was nothing to find."""
  told &= jnp.isfinite(jnp.sum(found))
  return jnp.where(told, found, old.astype(jnp.float32)).astype(old.dtype), told


@jax.custom_batching.sequential_vmap
def _svd(g: jax.Array) -> tuple[jax.Array, ...]:
  """An exact decomposition that never becomes a batched one under `vmap`."""
  return tuple(jnp.linalg.svd(g, full_matrices=False))


@jax.custom_batching.sequential_vmap
def _orthonormalize(y: jax.Array) -> jax.Array:
  """Shifted CholeskyQR of (m, r), with the r x r factor inverted.

  Multiplying by the inverse instead of solving against y leaves nothing but
  matrix products of the long dimension: no all-gather when it is sharded.
  Under `vmap` it walks: batched factorisations hang on CPU.
  """

  def one_pass(i, y):
    size = jax.lax.rsqrt(jnp.sum(y * y, axis=0))[None]  # of the columns
    gram = _matmul("mr,ms->rs", y, y) * size * size.T
    shift = sum(jnp.where(i == k, s, 0) for k, s in enumerate(_SHIFTS))
    inverse = jax.lax.platform_dependent(
      gram, len(gram) * shift, cpu=_eliminate, default=_inverse_cholesky
    )
    return _matmul("mr,sr->ms", y, inverse * size)

  return jax.lax.fori_loop(0, len(_SHIFTS), one_pass, y)


def _inverse_cholesky(gram: jax.Array, shift: jax.Array) -> jax.Array:
  """L⁻¹ of L Lᵀ, an (r, r) matrix shifted, by the platform's factorisation."""
  eye = jnp.eye(len(gram), dtype=gram.dtype)
  factor = jax.lax.linalg.cholesky(gram + shift * eye, symmetrize_input=False)
  return jax.lax.linalg.triangular_solve(
    factor, eye, left_side=True, lower=True
  )


def _eliminate(gram: jax.Array, shift: jax.Array) -> jax.Array:
  """L⁻¹ of L Lᵀ, an (r, r) matrix shifted, by elimination of blocks of rows.

  CPU libraries run larger factorisations, and every triangular solve, in
  threads that on a busy machine wait for each other a thousand times longer
  than they work. Here the library sees blocks that it takes in one thread.

  It is written for few kernels, for XLA compiles each in 20 ms: indices count
  from the matrix's corner, so that what they say is not taken out of the loop.
  """
  rank, block = len(gram), min(_BLOCK, len(gram))
  size = -(-rank // block) * block

  def eliminate(i, table):
    # A block of rows of (A, 0), of which the left part becomes zero in all
    # later rows, and the right part L⁻¹.
    first = i * block
    row, column = _indices(block, 2 * size)
    row += first
    pivot = jax.lax.dynamic_slice(table, (first, first), (block, block))
    rows = jax.lax.dynamic_slice_in_dim(table, first, block)
    rows += jnp.where(row + size == column, 1, 0)
    inverse = _inverse_transposed(pivot, shift, first, rank)
    rows = _matmul("ji,jk->ik", inverse, rows)
    # One product changes the later rows, and puts these in their place.
    row, column = row[:, :size], column[:, :size]
    used = jnp.where(column >= first + block, rows[:, :size], 0)
    used -= jnp.where(row == column, 1, 0)
    row, _ = _indices(size, 2 * size)
    others = (row < first) | (row >= first + block)
    return jnp.where(others, table, 0) - _matmul("ij,ik->jk", used, rows)

  table = jnp.pad(gram, ((0, size - rank), (0, 2 * size - rank)))
  table = jax.lax.fori_loop(0, size // block, eliminate, table)
  return table[:rank, size : size + rank]


def _inverse_transposed(
  gram: jax.Array, shift: jax.Array, first: jax.Array, rank: int
) -> jax.Array:
  """The transpose of L⁻¹ of a small L Lᵀ, read off a larger factorisation.

  Below L, the factor of ((L Lᵀ, I), (I, c)) holds it; c only has to be large
  enough for the matrix to be positive definite.
  """
  size = len(gram)
  row, column = _indices(2 * size, 2 * size)
  row, column = row + first, column + first
  diagonal = jnp.where(row < rank, shift, 1)  # there is padding beyond
  diagonal = jnp.where(row < first + size, diagonal, 1e30)
  bordered = jnp.pad(gram, (0, size)) + jnp.where(row == column, diagonal, 0)
  bordered += jnp.where(row == column + size, 1, 0)
  factor = jax.lax.linalg.cholesky(bordered, symmetrize_input=False)
  return factor[size:, :size]


def _indices(*shape: int) -> list[jax.Array]:
  """Number of the row and of the column, everywhere."""
  return [jax.lax.broadcasted_iota(jnp.int32, shape, k) for k in (0, 1)]


def _matmul(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Full-precision product: null directions must stay at rounding noise."""
  dtype = jnp.result_type(a, b, jnp.float32)
  return jnp.einsum(
    spec, a, b, precision=_HIGHEST, preferred_element_type=dtype
  )
