"""Small linear algebra out of matrix products."""

import jax
import jax.numpy as jnp

# Passes of CholeskyQR, and their shifts relative to the trace: two shifted
# passes bring any condition number up to 1e6 down to where the third is exact.
_SHIFTS = (1e-6, 1e-7, 0.0)

# Rows that are eliminated together on CPU.
_BLOCK = 64

HIGHEST = jax.lax.Precision.HIGHEST


@jax.custom_batching.sequential_vmap
def orthonormalize(y: jax.Array) -> jax.Array:
  """Shifted CholeskyQR of (m, r), with the r x r factor inverted.

  Multiplying by the inverse instead of solving against y leaves nothing but
  matrix products of the long dimension: no all-gather when it is sharded.
  Under `vmap` it walks: batched factorisations hang on CPU.
  """

  def one_pass(i, y):
    size = jax.lax.rsqrt(jnp.sum(y * y, axis=0))[None]  # of the columns
    gram = matmul("mr,ms->rs", y, y) * size * size.T
    shift = sum(jnp.where(i == k, s, 0) for k, s in enumerate(_SHIFTS))
    inverse = jax.lax.platform_dependent(
      gram, len(gram) * shift, cpu=eliminate, default=inverse_cholesky
    )
    return matmul("mr,sr->ms", y, inverse * size)

  return jax.lax.fori_loop(0, len(_SHIFTS), one_pass, y)


def inverse_cholesky(gram: jax.Array, shift: jax.Array) -> jax.Array:
  """L⁻¹ of L Lᵀ, an (r, r) matrix shifted, by the platform's factorisation."""
  eye = jnp.eye(len(gram), dtype=gram.dtype)
  factor = jax.lax.linalg.cholesky(gram + shift * eye, symmetrize_input=False)
  return jax.lax.linalg.triangular_solve(
    factor, eye, left_side=True, lower=True
  )


def eliminate(gram: jax.Array, shift: jax.Array) -> jax.Array:
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
    rows = matmul("ji,jk->ik", inverse, rows)
    # One product changes the later rows, and puts these in their place.
    row, column = row[:, :size], column[:, :size]
    used = jnp.where(column >= first + block, rows[:, :size], 0)
    used -= jnp.where(row == column, 1, 0)
    row, _ = _indices(size, 2 * size)
    others = (row < first) | (row >= first + block)
    return jnp.where(others, table, 0) - matmul("ij,ik->jk", used, rows)

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


def matmul(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Full-precision product: null directions must stay at rounding noise."""
  dtype = jnp.result_type(a, b, jnp.float32)
  return jnp.einsum(spec, a, b, precision=HIGHEST, preferred_element_type=dtype)


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
    gram = matmul("...mn,...kn->...mk", y, y)
    cubic = matmul("...mk,...kn->...mn", gram, y)
    return 1.5 * rho * y - 0.5 * rho**3 * cubic, None

  y, _ = jax.lax.scan(once, y, jnp.asarray(_scalings(TOLERANCE), y.dtype))
  return (y if wide else jnp.swapaxes(y, -1, -2)).astype(x.dtype)


def _largest(x: jax.Array) -> jax.Array:
  return jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0)


def _norm(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
