"""Linear algebra built from matrix products: orthonormal and polar factors."""

import jax
import jax.numpy as jnp

# Shift of each pass of CholeskyQR, relative to the trace. Two shifted passes
# reduce any condition number up to 1e6 so far that the third pass is exact.
_SHIFTS = (1e-6, 1e-7, 0.0)

# Rows in a block of the elimination, which CPUs use.
_BLOCK = 64


@jax.custom_batching.sequential_vmap
def orthonormalize(y: jax.Array) -> jax.Array:
  """Orthonormalizes the columns of a matrix, by shifted CholeskyQR.

  The r x r factor is inverted, and y multiplied by the inverse, instead of
  solving against y. The long dimension then takes part in matrix products only,
  which need no all-gather if it is sharded. `vmap` runs one matrix after
  another, because batched factorizations hang on CPU.

  Args:
    y: Matrix (m, r) of full column rank.

  Returns:
    Matrix (m, r) with orthonormal columns that span those of `y`.
  """

  def one_pass(i, y):
    inverse_norm = jax.lax.rsqrt(jnp.sum(y * y, axis=0))[None]  # of columns
    gram = matmul("mr,ms->rs", y, y) * inverse_norm * inverse_norm.T
    shift = sum(jnp.where(i == k, s, 0) for k, s in enumerate(_SHIFTS))
    inverse = jax.lax.platform_dependent(
      gram, len(gram) * shift, cpu=eliminate, default=inverse_cholesky
    )
    return matmul("mr,sr->ms", y, inverse * inverse_norm)

  return jax.lax.fori_loop(0, len(_SHIFTS), one_pass, y)


def inverse_cholesky(gram: jax.Array, shift: jax.Array) -> jax.Array:
  """Inverse Cholesky factor L⁻¹ of a shifted matrix, by the platform's library.

  Args:
    gram: Matrix (r, r).
    shift: Scalar that is added to its diagonal; the sum is L Lᵀ.

  Returns:
    L⁻¹, (r, r).
  """
  eye = jnp.eye(len(gram), dtype=gram.dtype)
  factor = jax.lax.linalg.cholesky(gram + shift * eye, symmetrize_input=False)
  return jax.lax.linalg.triangular_solve(
    factor, eye, left_side=True, lower=True
  )


def eliminate(gram: jax.Array, shift: jax.Array) -> jax.Array:
  """Inverse Cholesky factor L⁻¹ of a shifted matrix, by block elimination.

  CPU libraries run larger factorizations, and every triangular solve, in
  several threads. On a busy machine these wait for each other a thousand times
  longer than they work. The blocks here are small enough for one thread.

  XLA takes 20 ms to compile a kernel, so there are few: indices count from the
  matrix's corner, which keeps XLA from hoisting work on them out of the loop.

  Args:
    gram: As for :func:`inverse_cholesky`.
    shift: As for :func:`inverse_cholesky`.

  Returns:
    L⁻¹, (r, r).
  """
  rank, block = len(gram), min(_BLOCK, len(gram))
  size = -(-rank // block) * block

  def eliminate(i, table):
    # The table starts as (A, 0). Step i eliminates its i-th block of rows: the
    # left part becomes zero in all later rows, and the right part L⁻¹.
    first = i * block
    row, column = _indices(block, 2 * size)
    row += first
    pivot = jax.lax.dynamic_slice(table, (first, first), (block, block))
    rows = jax.lax.dynamic_slice_in_dim(table, first, block)
    rows += jnp.where(row + size == column, 1, 0)
    inverse = _inverse_transposed(pivot, shift, first, rank)
    rows = matmul("ji,jk->ik", inverse, rows)
    # One product both changes the later rows and writes this block.
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
  """Transpose of L⁻¹ for a small block, read off one larger factorization.

  The Cholesky factor of ((L Lᵀ, I), (I, c)) has it below L. The number c only
  has to be large enough for the matrix to be positive definite.
  """
  size = len(gram)
  row, column = _indices(2 * size, 2 * size)
  row, column = row + first, column + first
  diagonal = jnp.where(row < rank, shift, 1)  # rows beyond are padding
  diagonal = jnp.where(row < first + size, diagonal, 1e30)
  bordered = jnp.pad(gram, (0, size)) + jnp.where(row == column, diagonal, 0)
  bordered += jnp.where(row == column + size, 1, 0)
  factor = jax.lax.linalg.cholesky(bordered, symmetrize_input=False)
  return factor[size:, :size]


def _indices(*shape: int) -> list[jax.Array]:
  """Index of the row and of the column of each entry."""
  return [jax.lax.broadcasted_iota(jnp.int32, shape, k) for k in (0, 1)]


def matmul(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Product of two arrays, in full precision whatever the platform's default.

  In null directions a projected gradient must be rounding noise of float32;
  :func:`galore_optax.subspace.projection.drop_null` relies on it.

  Args:
    spec: The product, as for `jnp.einsum`.
    a: Left operand.
    b: Right operand.

  Returns:
    The product, at least float32.
  """
  dtype = jnp.result_type(a, b, jnp.float32)
  return jnp.einsum(
    spec,
    a,
    b,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=dtype,
  )


# Singular values from this fraction of the Frobenius norm on become 1.
_TOLERANCE = 1e-5

# Largest scaling at which the iteration is stable. A larger one would map the
# largest singular value to almost 0, and rounding would lose its direction.
_MAX_SCALING = 1.6977


def _scalings(lowest: float) -> list[float]:
  """The scaling of each iteration, until all singular values are 1.

  Args:
    lowest: Smallest singular value, where the largest is at most 1.
  """
  scalings = []
  image = lambda x, rho: 0.5 * rho * x * (3 - (rho * x) ** 2)
  while 1 - lowest > 1e-7:
    rho = min(_MAX_SCALING, (3 / (1 + lowest + lowest**2)) ** 0.5)
    lowest = min(image(lowest, rho), image(1.0, rho))
    scalings.append(rho)
  return scalings


def polar_factor(x: jax.Array) -> jax.Array:
  r"""The polar factor :math:`U V^\top` of matrices :math:`U S V^\top`.

  The scaled Newton-Schulz iteration is run 16 times on the matrix divided by
  its Frobenius norm,

  .. math::

    X \leftarrow \tfrac{3}{2} \rho X - \tfrac{1}{2} \rho^3 X X^\top X,

  with the ρ for which singular values between 1e-5 and 1 approach 1 fastest.
  The error is that of float32 rounding: about 1e-6 for a well conditioned
  matrix, and below 1e-7 κ for a condition number κ up to 1e5, as much as
  rounding the matrix itself costs. Singular values of less than 1e-5 of the
  Frobenius norm end below 1; those that are rounding noise, as of a
  rank-deficient matrix, end at about 0.01 or below. A matrix of zeros stays
  zero.

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
  # Division by the largest entry first keeps the squares in range.
  for size in (_largest, _norm):
    scale = size(y)
    y = y / jnp.where(scale > 0, scale, 1)

  def once(y: jax.Array, rho: jax.Array) -> tuple[jax.Array, None]:
    gram = matmul("...mn,...kn->...mk", y, y)
    cubic = matmul("...mk,...kn->...mn", gram, y)
    return 1.5 * rho * y - 0.5 * rho**3 * cubic, None

  y, _ = jax.lax.scan(once, y, jnp.asarray(_scalings(_TOLERANCE), y.dtype))
  return (y if wide else jnp.swapaxes(y, -1, -2)).astype(x.dtype)


def _largest(x: jax.Array) -> jax.Array:
  return jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0)


def _norm(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
