r"""Fira and APOLLO: updates with the part of the gradient outside the subspace.

GaLore drops the part of a gradient that its basis does not span, the residual.
Fira adds it to the update; APOLLO updates with the whole gradient. Both scale
it column by column to the size that the inner optimizer gives to the projected
gradient, and limit how fast its norm grows. The state holds that norm: one
number for each matrix.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks
from galore_optax.inner import gain as gain_lib
from galore_optax.subspace import projection
from galore_optax.subspace.refresh_settings import Refresh
from galore_optax.tree import plan, sharding

METHODS = ("fira", "apollo", "apollo_mini")

# Largest growth of a residual's norm from one step to the next, and the term
# that keeps quotients finite. Both are those of the papers' code.
_GROWTH = 1.01
_EPS = 1e-8


@dataclasses.dataclass(frozen=True)
class Step:
  """The arrays that one leaf's update is computed from.

  Attributes:
    site: The leaf's plan.
    grad: Gradients (..., m, n).
    low: Projected gradients R, as the inner optimizer saw them.
    new: The inner optimizer's updates of them.
    gain: The last factor of `new`, see :mod:`galore_optax.inner.gain`; None
      for 1.
    bases: The leaf's bases.
    norm: Norm of each residual at the last step, 0 before the first.
  """

  site: plan.Site
  grad: jax.Array
  low: jax.Array
  new: jax.Array
  gain: Any
  bases: projection.Bases
  norm: jax.Array


def check(
  method: str | None,
  refresh: Refresh,
  accumulation_steps: int,
  params_mode: str,
) -> None:
  """Raises unless `residual` goes with the other arguments of `galore`.

  Args:
    method: One of `METHODS`, or None.
    refresh: When and how bases are recomputed.
    accumulation_steps: As for :func:`galore_optax.galore`.
    params_mode: As for :func:`galore_optax.galore`.
  """
  checks.check_choice("residual", method, METHODS)
  if refresh.finder == "random":
    _check_random(method, params_mode)
  if method is not None and accumulation_steps > 1:
    raise ValueError(
      f"`residual={method!r}` needs the whole gradient of a step, of which "
      f"accumulation_steps={accumulation_steps} keeps only the projection. "
      "Accumulate at full size, with `optax.MultiSteps` around the optimizer."
    )


def check_basis(refresh: Refresh, basis_dtype: str) -> None:
  """Raises if a basis is given a dtype although none is stored."""
  if refresh.finder == "random" and basis_dtype != "float32":
    raise ValueError(
      'finder="random" stores no basis, so that '
      f"basis_dtype={basis_dtype!r} has no effect. Leave one of the two out."
    )


def _check_random(method: str | None, params_mode: str) -> None:
  if method not in ("apollo", "apollo_mini"):
    raise ValueError(
      'finder="random" only measures gradients, for residual="apollo" or '
      f'"apollo_mini", got residual={method!r}. Updates would be random too.'
    )
  if params_mode == "project":
    raise ValueError(
      'finder="random" does not project weights, got params_mode="project". '
      "Leave one of the two out."
    )


def start(
  method: str,
  inner: optax.GradientTransformationExtraArgs,
  sites: Mapping[str, plan.Site],
  leaves: Mapping[str, Any],
  low: Any,
  inner_state: Any,
) -> dict[str, jax.Array]:
  """The norms that the state holds before the first step: zero.

  Args:
    method: One of `METHODS`.
    inner: The inner optimizer.
    sites: Path to site.
    leaves: Path to parameter; norms are put on its mesh.
    low: The tree that the inner optimizer was initialized with.
    inner_state: The inner optimizer's state.

  Returns:
    Path to float32 of the shape of the axes that stack matrices.

  Raises:
    ValueError: If the method does not go with a leaf or the inner optimizer.
  """
  _check_sides(method, sites)
  _check_inner(inner_state)
  checks.try_abstractly(
    lambda g, s: gains(inner, g, s, g, sites, {}), low, inner_state
  )
  return {
    path: sharding.shard_like(
      jnp.zeros(site.view.stack, jnp.float32),
      leaves[path],
      lambda spec, site=site: site.view.spec(spec)[:-2],
    )
    for path, site in sites.items()
  }


def _check_sides(method: str, sites: Mapping[str, plan.Site]) -> None:
  for path, site in sites.items():
    if method == "apollo" and len(site.sides) > 1:
      raise ValueError(
        "`residual='apollo'` scales the columns along one side, but the leaf "
        f'{path!r} is projected on both. Use proj_type="std", or '
        "residual='apollo_mini', which has one scale for each matrix."
      )


def _check_inner(inner_state: Any) -> None:
  sums = lambda x: isinstance(x, optax.MultiStepsState | optax.ApplyEvery)
  if any(map(sums, jax.tree.leaves(inner_state, is_leaf=sums))):
    raise ValueError(
      "`residual` needs the whole gradient of a step, which an `inner` with "
      "`optax.MultiSteps` or `optax.apply_every` does not see. Put "
      "`optax.MultiSteps` around the whole optimizer."
    )


def gains(
  inner: optax.GradientTransformationExtraArgs,
  updates: Any,
  state: Any,
  params: Any,
  sites: Mapping[str, plan.Site],
  extra_args: Mapping[str, Any],
) -> dict[str, Any]:
  """The gain of each projected leaf, see `gain.find_gains`.

  Raises:
    ValueError: If a gain cannot be read off the inner optimizer.
  """
  try:
    return gain_lib.find_gains(inner, updates, state, params, sites, extra_args)
  except gain_lib.UnknownGainError as error:
    raise ValueError(_HIDDEN.format(str(error))) from error


_HIDDEN = """\
`residual` needs the update of the leaf {!r} without its learning rate and sign,
and `inner` does more than multiply after them. Put those parts behind GaLore:
  optax.chain(
    galore(optax.scale_by_adam(), rank=128, residual="fira"),
    optax.scale_by_learning_rate(learning_rate),
    optax.ema(0.9),
  )
"""


def lift(
  method: str,
  gain_of: Mapping[str, Any],
  sites: Mapping[str, plan.Site],
  bases: Mapping[str, projection.Bases],
  grads: Mapping[str, jax.Array],
  low: Mapping[str, jax.Array],
  new: Mapping[str, jax.Array],
  norms: Mapping[str, jax.Array],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """The inner optimizer's updates at full size, see :func:`lift_leaf`.

  Args:
    method: One of `METHODS`.
    gain_of: Path to gain, see :func:`gains`.
    sites: Path to site.
    bases: Path to bases.
    grads: Path to gradient, of the leaf's shape.
    low: Path to projected gradient.
    new: Path to the inner optimizer's update of it.
    norms: Path to norms of the last residuals.

  Returns:
    Path to update, of the leaf's shape, and path to the new norms.
  """
  lifted, new_norms = {}, {}
  for path, site in sites.items():
    grad = site.view.as_matrix(grads[path])
    step = Step(
      site, grad, low[path], new[path], gain_of[path], bases[path], norms[path]
    )
    update, new_norms[path] = lift_leaf(method, step)
    lifted[path] = site.view.from_matrix(update)
  return lifted, new_norms


def lift_leaf(method: str, step: Step) -> tuple[jax.Array, jax.Array]:
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
  residual, norm = _limit(grad * phi, step.norm)
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
  """Scales a residual down so that its norm grows by at most 1% a step.

  After a residual of zero, the next one is not limited: from zero it would take
  thousands of steps to grow.
  """
  norm = _norm(residual, (-2, -1))[..., 0, 0]
  is_valid = jnp.isfinite(norm) & (norm > 0)
  growth = jnp.maximum(norm / (last_norm + _EPS), _GROWTH) / _GROWTH
  growth = jnp.where(is_valid & (last_norm > 0), growth, 1)
  residual = jnp.where(is_valid[..., None, None], residual, 0)
  new_norm = jnp.where(is_valid, norm / growth, last_norm)
  return residual / growth[..., None, None], new_norm.astype(last_norm.dtype)


def _norm(x: jax.Array, axis: tuple[int, ...]) -> jax.Array:
  """Norm along axes, which stay with size 1; its derivative at zero is zero."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.sum(x * x, axis=axis, keepdims=True)
  positive = square > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
