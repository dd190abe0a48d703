"""The methods by name: which arguments they go with, and their state.

The residual is the part of a gradient that the bases do not span. GaLore drops
it. :mod:`.scaled` holds Fira and APOLLO, :mod:`.normalized` the two ways to
add the residual divided by its own size.
"""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from galore_optax import checks
from galore_optax.inner import gain as gain_lib
from galore_optax.residual import normalized, scaled
from galore_optax.residual.step import Settings, Step
from galore_optax.subspace import projection
from galore_optax.subspace.refresh_settings import Refresh
from galore_optax.tree import plan
from galore_optax.tree import rules as rules_lib

METHODS = (*normalized.METHODS, *scaled.METHODS)


def settings(
  method: str | None, factor: Any, decay: Any, growth: Any, basis_dtype: str
) -> Settings | None:
  """The arguments of `galore` in one object; None for no residual.

  Args:
    method: The argument `residual`.
    factor: The argument `residual_factor`.
    decay: The argument `residual_decay`.
    growth: The argument `residual_growth`.
    basis_dtype: Name of the dtype in which bases are stored.

  Raises:
    ValueError: If one is out of its range or has no meaning for the method.
    TypeError: If a number has the wrong type.
  """
  checks.check_choice("residual", method, METHODS)
  numbers = {
    "residual_factor": factor,
    "residual_decay": decay,
    "residual_growth": growth,
  }
  for name, value in numbers.items():
    checks.check_not_negative(name, value)
    if value is not None and method not in normalized.METHODS:
      raise ValueError(
        f"`{name}` is for residual='normalized' and residual='factored', got "
        f"residual={method!r}. Leave it out."
      )
  if _is_known(decay) and not decay < 1:
    raise ValueError(
      f"`residual_decay` must be at least 0 and below 1, got {decay!r}."
    )
  if _is_known(growth) and not growth >= 1:
    raise ValueError(
      f"`residual_growth` must be 1 or more, got {growth!r}. Infinity sets no "
      "limit."
    )
  if method is None:
    return None
  return Settings(method, factor, decay, growth, basis_dtype == "float32")


def _is_known(number: Any) -> bool:
  return number is not None and not isinstance(number, jax.core.Tracer)


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
  if refresh.finder == "random":
    _check_random(method, params_mode)
  if method is not None and accumulation_steps > 1:
    raise ValueError(
      f"`residual={method!r}` needs the whole gradient of a step, of which "
      f"accumulation_steps={accumulation_steps} keeps only the projection. "
      "Accumulate at full size, with `optax.MultiSteps` around the optimizer."
    )


def check_rules(
  method: str | None, refresh: Refresh, rules: rules_lib.Rules
) -> None:
  """Raises if a rule gives tensors factors, and the method is for matrices.

  Args:
    method: One of `METHODS`, or None.
    refresh: When and how bases are recomputed.
    rules: The rules.
  """
  if refresh.finder == "random":
    rules_lib.refuse_tensors(rules, 'finder="random" is for matrices')
  if method in scaled.METHODS:
    rules_lib.refuse_tensors(
      rules,
      f"residual={method!r} is for matrices ('normalized' takes tensors too)",
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
  settings: Settings,
  inner: optax.GradientTransformationExtraArgs,
  sites: Mapping[str, plan.Site],
  leaves: Mapping[str, Any],
  low: Any,
  inner_state: Any,
) -> dict[str, Any]:
  """What the state holds for the residual before the first step.

  Args:
    settings: The method and its numbers.
    inner: The inner optimizer.
    sites: Path to site.
    leaves: Path to parameter; the state is put on its mesh.
    low: The tree that the inner optimizer was initialized with.
    inner_state: The inner optimizer's state.

  Returns:
    Path to the norm of each residual, float32 in the shape of the axes that
    stack matrices, or to a :class:`normalized.State`.

  Raises:
    ValueError: If the method does not go with a leaf or the inner optimizer.
  """
  _check_sides(settings.method, sites)
  _check_inner(inner_state)
  checks.try_abstractly(
    lambda g, s: gains(inner, g, s, g, sites, {}), low, inner_state
  )
  if settings.method in normalized.METHODS:
    return {
      path: normalized.start(settings, site, leaves[path])
      for path, site in sites.items()
    }
  return {p: scaled.start(site, leaves[p]) for p, site in sites.items()}


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
  settings: Settings,
  gain_of: Mapping[str, Any],
  sites: Mapping[str, plan.Site],
  bases: Mapping[str, projection.Bases],
  grads: Mapping[str, jax.Array],
  low: Mapping[str, jax.Array],
  new: Mapping[str, jax.Array],
  state: Mapping[str, Any],
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
  """The inner optimizer's updates at full size, with the residuals in them.

  Args:
    settings: The method and its numbers.
    gain_of: Path to gain, see :func:`gains`.
    sites: Path to site.
    bases: Path to bases.
    grads: Path to gradient, of the leaf's shape.
    low: Path to projected gradient.
    new: Path to the inner optimizer's update of it.
    state: Path to what :func:`start` returned, or the last call of this.

  Returns:
    Path to update, of the leaf's shape, and path to the new state.
  """
  lifted, after = {}, {}
  for path, site in sites.items():
    grad = site.view.as_stack(grads[path])
    step = Step(site, grad, low[path], new[path], gain_of[path], bases[path])
    if settings.method in normalized.METHODS:
      update, after[path] = normalized.lift_leaf(settings, step, state[path])
    else:
      update, after[path] = scaled.lift_leaf(settings.method, step, state[path])
    lifted[path] = site.view.from_stack(update)
  return lifted, after
