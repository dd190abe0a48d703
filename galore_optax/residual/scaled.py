r"""Fira and APOLLO: updates with the part of the gradient outside the subspace.

GaLore drops the part of a gradient that its basis does not span, the residual.
Fira adds it to the update; APOLLO updates with the whole gradient. Both scale
it column by column to the size that the inner optimizer gives to the projected
gradient, and limit how fast its norm grows. The state holds that norm: one
number for each matrix.
"""

from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.residual import limiter
from galore_optax.residual.step import Step
from galore_optax.subspace import projection
from galore_optax.tree import plan, sharding

METHODS = ("fira", "apollo", "apollo_mini")

_EPS = 1e-8  # keeps quotients finite, as in the papers' code


def start(site: plan.Site, like: Any) -> jax.Array:
  """The norms before the first step: zero.

  Args:
    site: The leaf's plan.
    like: The parameter; norms are put on its mesh.

  Returns:
    float32 of the shape of the axes that stack matrices.
  """
  return sharding.shard_like(
    jnp.zeros(site.view.stack, jnp.float32),
    like,
    lambda spec: site.view.spec(spec)[:-2],
  )


def lift_leaf(
  method: str, step: Step, last_norm: jax.Array
) -> tuple[jax.Array, jax.Array]:
  r"""One leaf's update at full size, with the residual in it.

  With the inner optimizer's direction N of the projected gradient R, and

  .. math::

    \phi_j = \frac{\|N_{:,j}\|}{\|R_{:,j}\| + 10^{-8}}

  Fira's update is :math:`\alpha P N + S` with the residual :math:`S = (G -
  \alpha P R)\, \mathrm{diag}(\phi)`, and APOLLO's is :math:`\sqrt{\alpha}\, S`
  with :math:`S = G\, \mathrm{diag}(\phi)`. S is scaled down wherever its norm
  would be more than 1.01 times that of the step before. APOLLO-Mini, and Fira
  on two sides, have one φ for the whole matrix.

  Args:
    method: One of `METHODS`.
    step: The leaf's arrays.
    last_norm: Norm of each residual at the last step, 0 before the first.

  Returns:
    Updates (..., m, n), and the norms of S.
  """
  direction, rate = _direction(step)
  grad = _clean(step)
  if method == "fira":
    grad = grad - projection.lift(step.site.scale * step.low, step.bases)
  whole = method == "apollo_mini" or len(step.site.sides) > 1
  axis = (-2, -1) if whole else (-2,) if "left" in step.site.sides else (-1,)
  phi = _norm(direction, axis) / (_norm(step.low, axis) + _EPS)
  residual, norm = _limit(grad * phi, last_norm)
  if method == "fira":
    lifted = projection.lift(step.site.scale * step.new, step.bases)
    return lifted + rate * residual, norm
  return jnp.sqrt(step.site.scale) * rate * residual, norm


def _direction(step: Step) -> tuple[jax.Array, Any]:
  """The inner update without its gain, and the gain.

  Where the gain is zero, as in the first step of a warm-up, the direction is
  unknown, and zero is returned.
  """
  new = step.new.astype(jnp.promote_types(step.new.dtype, jnp.float32))
  if step.gain is None:
    return new, 1.0
  rate = jnp.asarray(step.gain, new.dtype)
  return jnp.where(rate == 0, 0, new / jnp.where(rate == 0, 1, rate)), rate


def _clean(step: Step) -> jax.Array:
  """The gradient, with 0 in place of matrices that are not finite.

  Their projected gradients are 0 too.
  """
  grad = step.grad.astype(jnp.promote_types(step.grad.dtype, jnp.float32))
  return jnp.where(jnp.isfinite(grad).all((-2, -1), keepdims=True), grad, 0)


def _limit(
  residual: jax.Array, last_norm: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Scales a residual down so that its norm grows by at most 1% a step."""
  norm = _norm(residual, (-2, -1))
  excess, new_norm = limiter.limit(norm[..., 0, 0], last_norm)
  residual = jnp.where(jnp.isfinite(norm), residual, 0)
  return residual / excess[..., None, None], new_norm


def _norm(x: jax.Array, axis: tuple[int, ...]) -> jax.Array:
  """Norm along axes, which stay with size 1; its derivative at zero is zero."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return limiter.root(jnp.sum(x * x, axis=axis, keepdims=True))
