r"""What the subspace leaves out of an update, and how it is put back.

GaLore drops the part of a gradient that its basis does not span. Fira adds that
part, and APOLLO takes the whole gradient, each scaled column by column to the
size that the inner optimizer gives to the projected gradient. One number a
matrix is kept for it: the norm that this update had, which may grow slowly.
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
from galore_optax.tree import plan, sharding

METHODS = ("fira", "apollo", "apollo_mini")

# Largest growth of a residual's norm from one step to the next, and the number
# that keeps quotients finite, as in the code of both papers.
_GROWTH = 1.01
_EPS = 1e-8


@dataclasses.dataclass(frozen=True)
class Step:
  """What is known of one leaf when its update is put together.

  Attributes:
    site: The leaf's plan.
    grad: Gradients (..., m, n).
    low: Projected gradients R, as the inner optimizer saw them.
    new: The inner optimizer's updates of them.
    gain: Their last factor, see :mod:`galore_optax.inner.gain`; None for 1.
    bases: The leaf's bases.
    norm: Norm of each residual before, 0 where there was none.
  """

  site: plan.Site
  grad: jax.Array
  low: jax.Array
  new: jax.Array
  gain: Any
  bases: projection.Bases
  norm: jax.Array


def check(
  method: str | None, how: Any, accumulation_steps: int, params_mode: str
) -> None:
  """Raises unless a recovery goes with the other arguments.

  Args:
    method: One of `METHODS`, or None.
    how: The refresh's :class:`galore_optax.subspace.refresh.Refresh`.
    accumulation_steps: As for :func:`galore_optax.galore`.
    params_mode: Likewise.
  """
  checks.check_choice("recovery", method, METHODS)
  if how.method == "random":
    _check_random(method, how, params_mode)
  if method is not None and accumulation_steps > 1:
    raise ValueError(
      f"`recovery={method!r}` needs the whole gradient of a step, of which "
      f"accumulation_steps={accumulation_steps} keeps only the projection. "
      "Accumulate at full size, with `optax.MultiSteps` around the optimizer."
    )


def check_basis(how: Any, basis_dtype: Any) -> None:
  """Raises where a format is asked for of a basis that is not kept."""
  if how.method == "random" and basis_dtype != "float32":
    raise ValueError(
      'projector="random" keeps no basis, of which basis_dtype='
      f"{basis_dtype!r} could be the format. Leave one of the two out."
    )


def _check_random(method: str | None, how: Any, params_mode: str) -> None:
  if method not in ("apollo", "apollo_mini"):
    raise ValueError(
      'projector="random" only measures gradients, for recovery="apollo" or '
      f'"apollo_mini", got recovery={method!r}. Updates would be random too.'
    )
  if how.policy == "adaptive":
    raise ValueError(
      'projector="random" has no subspace that could settle, got '
      'refresh="adaptive". Leave one of the two out.'
    )
  if how.moments in ("reset", "ldadam"):
    raise ValueError(
      'projector="random" keeps the moments when it is drawn anew, got '
      f'moments="{how.moments}". Leave one of the two out.'
    )
  if params_mode == "project":
    raise ValueError(
      'projector="random" does not project weights, got params_mode="project". '
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
  """Norms before the first step, zero.

  Args:
    method: One of `METHODS`.
    inner: The inner optimizer.
    sites: Path to site.
    leaves: Path to parameter; norms are placed on its mesh.
    low: What the inner optimizer was initialised with.
    inner_state: Its state.

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
        "`recovery='apollo'` scales the columns along one side, but the leaf "
        f'{path!r} is projected on both. Use proj_type="std", or '
        "recovery='apollo_mini', which has one scale a matrix."
      )


def _check_inner(inner_state: Any) -> None:
  waits = lambda x: isinstance(x, optax.MultiStepsState | optax.ApplyEvery)
  if any(map(waits, jax.tree.leaves(inner_state, is_leaf=waits))):
    raise ValueError(
      "`recovery` needs the whole gradient of a step, which an `inner` with "
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
  """The gain of each projected leaf, by `gain.of_updates`.

  Raises:
    ValueError: If there may be one that cannot be told.
  """
  try:
    return gain_lib.find_gains(inner, updates, state, params, sites, extra_args)
  except gain_lib.UnknownGainError as error:
    raise ValueError(_HIDDEN.format(str(error))) from error


_HIDDEN = """\
`recovery` needs the update of the leaf {!r} without its learning rate and sign,
and `inner` does more after them than multiply. Put that behind GaLore, e.g.
  optax.chain(
    galore(optax.scale_by_adam(), rank=128, recovery="fira"),
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
  """The inner optimizer's updates at full size, see :func:`recover`.

  Args:
    method: One of `METHODS`.
    gain_of: Path to gain, see :func:`gains`.
    sites: Path to site.
    bases: Path to bases.
    grads: Path to gradient, of the leaf's shape.
    low: Path to projected gradient.
    new: Path to the inner optimizer's update of it.
    norms: Path to norms of the residuals before.

  Returns:
    Path to update, of the leaf's shape, and path to norms.
  """
  lifted, after = {}, {}
  for path, site in sites.items():
    grad = site.view.as_matrix(grads[path])
    step = Step(
      site, grad, low[path], new[path], gain_of[path], bases[path], norms[path]
    )
    update, after[path] = recover(method, step)
    lifted[path] = site.view.from_matrix(update)
  return lifted, after


def recover(method: str, step: Step) -> tuple[jax.Array, jax.Array]:
  r"""One leaf's update, with what the subspace leaves out.

  With the inner optimizer's direction N of the projected gradient R, and

  .. math::

    \phi_j = \frac{\|N_{:,j}\|}{\|R_{:,j}\| + 10^{-8}}

  Fira's update is :math:`\alpha P N + S` with the residual :math:`S = (G -
  \alpha P R)\, \mathrm{diag}(\phi)`, and APOLLO's is :math:`\sqrt{\alpha}\, S`
  with :math:`S = G\, \mathrm{diag}(\phi)`. S is scaled down wherever its norm
  would be more than 1.01 times that of the step before. If both sides are
  projected, and for APOLLO-Mini, one φ is that of the whole matrix.

  Args:
    method: One of `METHODS`.
    step: What is known.

  Returns:
    Updates (..., m, n), and the norms of S.
  """
  direction, rate = _direction(step)
  grad = _clean(step)
  if method == "fira":
    known = projection.lift(step.site.scale * step.low, step.bases)
    grad = grad - known
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

  Where the gain is zero, as in the first step of a warm-up, nothing is known of
  the direction, nor needed.
  """
  new = step.new.astype(jnp.promote_types(step.new.dtype, jnp.float32))
  if step.gain is None:
    return new, 1.0
  rate = jnp.asarray(step.gain, new.dtype)
  return jnp.where(rate == 0, 0, new / jnp.where(rate == 0, 1, rate)), rate


def _clean(step: Step) -> jax.Array:
  """The gradient, 0 where it is not finite, as its projection is then."""
  grad = step.grad.astype(jnp.promote_types(step.grad.dtype, jnp.float32))
  return jnp.where(jnp.isfinite(grad).all((-2, -1), keepdims=True), grad, 0)


def _limit(
  residual: jax.Array, before: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Lets the norm of a residual grow by one hundredth a step.

  A residual that is zero says nothing of the size of the next one, which would
  otherwise take thousands of steps to grow.
  """
  norm = _norm(residual, (-2, -1))[..., 0, 0]
  told = jnp.isfinite(norm) & (norm > 0)
  growth = jnp.maximum(norm / (before + _EPS), _GROWTH) / _GROWTH
  growth = jnp.where(told & (before > 0), growth, 1)
  residual = jnp.where(told[..., None, None], residual, 0)
  after = jnp.where(told, norm / growth, before).astype(before.dtype)
  return residual / growth[..., None, None], after


def _norm(x: jax.Array, axis: tuple[int, ...]) -> jax.Array:
  """Norm along axes that are kept; its slope at zero is zero."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.sum(x * x, axis=axis, keepdims=True)
  positive = square > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
