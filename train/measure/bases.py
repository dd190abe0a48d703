"""How far a basis is from having orthonormal columns."""

import jax
import jax.numpy as jnp


def orthogonality_error(basis: jax.Array) -> float:
  r"""The largest entry of :math:`|P^\top P - I|` over a stack of bases.

  Args:
    basis: Bases (..., m, r) of any float dtype.
  """
  return float(_largest_error(basis))


@jax.jit
def _largest_error(basis: jax.Array) -> jax.Array:
  basis = basis.astype(jnp.float32)
  gram = jnp.einsum("...mr,...ms->...rs", basis, basis, precision="highest")
  return jnp.max(jnp.abs(gram - jnp.eye(basis.shape[-1])))
