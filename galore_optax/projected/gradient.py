r"""A matrix's gradient as it is used: formed, or as its two factors.

The gradient of a weight that multiplies T vectors is a product over them,
:math:`G = A^\top B`, with A of shape (T, m) and B of shape (T, n). All that
GaLore does with G is to multiply it by thin matrices,

.. math::

  P^\top G = (A P)^\top B, \quad G Q = A^\top (B Q), \quad
  G R^\top = A^\top (B R^\top),

which takes :math:`2 T r (m + n)` operations instead of the :math:`2 T m n` that
form it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from galore_optax import linalg
from galore_optax.quantization import carried
from galore_optax.subspace import find, projection


class Gradient(Protocol):
  """The gradient of one matrix, (m, n)."""

  def project(self, bases: projection.Bases) -> jax.Array:
    """The projected gradient, float32."""
    ...

  def times(self, low: jax.Array, side: str) -> jax.Array:
    """The product with a projected gradient: of `left` G R^T, else G^T R."""
    ...


class Formed(NamedTuple):
  """A gradient as one array.

  Attributes:
    array: (m, n).
  """

  array: jax.Array

  def project(self, bases: projection.Bases) -> jax.Array:
    """The projected gradient, float32."""
    return projection.project(self.array, bases)

  def times(self, low: jax.Array, side: str) -> jax.Array:
    """The product with a projected gradient: of `left` G R^T, else G^T R."""
    spec = "mn,rn->mr" if side == "left" else "mn,mr->nr"
    return linalg.matmul(spec, self.array, low).astype(jnp.float32)


class Factored(NamedTuple):
  """A gradient as a product over tokens that is never computed.

  Sums over tokens are in float32. The thin products are rounded to the dtype of
  the factors, as activations are.

  Attributes:
    rows: A, (T, m).
    cols: B, (T, n).
    axes: Mesh axes of `jax.shard_map` that divide the tokens.
  """

  rows: jax.Array
  cols: jax.Array
  axes: tuple[str, ...]

  def project(self, bases: projection.Bases) -> jax.Array:
    """The projected gradient, float32."""
    rows = _thin(self.rows, bases.get("left"))
    cols = _thin(self.cols, bases.get("right"))
    return self._sum(rows, cols)

  def times(self, low: jax.Array, side: str) -> jax.Array:
    """The product with a projected gradient: of `left` G R^T, else G^T R."""
    if side == "left":
      return self._sum(self.rows, _thin(self.cols, low.T))
    return self._sum(self.cols, _thin(self.rows, low))

  def _sum(self, a: jax.Array, b: jax.Array) -> jax.Array:
    """The sum over all tokens of the outer products of rows of a and b."""
    # On CPU the product is faster if the wider operand is the left one.
    if a.shape[1] < b.shape[1]:
      total = linalg.matmul("tj,ti->ji", b, a).T
    else:
      total = linalg.matmul("ti,tj->ij", a, b)
    return jax.lax.psum(total, self.axes) if self.axes else total


def _thin(x: jax.Array, basis: jax.Array | None) -> jax.Array:
  """The product x P in the dtype of x; x itself if there is no basis."""
  if basis is None:
    return x
  return linalg.matmul("ti,ir->tr", x, basis.astype(x.dtype)).astype(x.dtype)


class Found(NamedTuple):
  """What a backward pass finds for one leaf.

  Attributes:
    low: Projected gradients (..., r, n), (..., m, r) or (..., r, r).
    bases: Side to the bases of this step: (..., m, r) or (..., n, r); or their
      codes, as the state stores them or as
      :class:`galore_optax.quantization.carried.Carried`.
    valid: 1 where a basis was due, and its gradient finite and not zero;
      (..., 1, 1), float32.
  """

  low: Any
  bases: Any
  valid: Any

  def astype(self, gradient_dtype: Any, basis_dtype: Any) -> "Found":
    """The same, in the dtypes in which it is handed out."""
    bases = {
      side: carried.pack(x) if carried.fits(x) else x.astype(basis_dtype)
      for side, x in self.bases.items()
    }
    return Found(self.low.astype(gradient_dtype), bases, self.valid)


def _image(
  gradient: Gradient, basis: jax.Array, side: str, axis_name: Any
) -> jax.Array:
  """The image of a basis under the Gram operator; see `find.gram`.

  It is that of the sum over devices: the image is linear in the gradient once
  the projected gradient has been summed.
  """
  total = lambda x: x if axis_name is None else jax.lax.psum(x, axis_name)
  low = find.scaled(total(gradient.project({side: basis})))
  return total(gradient.times(low, side))


def find_and_project(
  gradient: Gradient,
  stored: Mapping[str, Any],
  due: jax.Array,
  iterations: Any,
  axis_name: Any = None,
) -> Found:
  """Refreshes the bases of one matrix if they are due, and projects.

  Args:
    gradient: The gradient.
    stored: Side to basis (m, r) or (n, r), as the state stores it.
    due: Whether the bases are due, bool scalar.
    iterations: Subspace iterations of a refresh.
    axis_name: Mesh axes over whose devices gradients are summed later; None if
      this one is a sum already.

  Returns:
    The projected gradient and the bases it was projected on: arrays in
    float32, or codes if a derivative can carry them.
  """

  def refresh(stored: dict) -> tuple[dict, jax.Array]:
    new, valid = {}, jnp.bool_(True)
    for side, basis in _read(stored).items():
      image = lambda basis, side=side: _image(gradient, basis, side, axis_name)
      new[side], ok = find.iterate(image, basis, iterations)
      valid &= ok
    return projection.write(new, stored), valid

  def keep(stored: dict) -> tuple[dict, jax.Array]:
    return stored, jnp.zeros_like(due)

  arrays = _read(stored)
  stored = {
    side: x if carried.fits(x) else arrays[side] for side, x in stored.items()
  }
  bases, valid = jax.lax.cond(due, refresh, keep, stored)
  valid = valid.astype(jnp.float32)[None, None]
  return Found(gradient.project(_read(bases)), bases, valid)


def _read(stored: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Side to basis as an array, float32."""
  return {
    side: x.astype(jnp.float32) for side, x in projection.read(stored).items()
  }
