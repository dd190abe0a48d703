"""Gives every recipe the same GaLore options, without writing them again."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, TypeVar

from jax.typing import ArrayLike, DTypeLike

from galore_optax import old_spellings
from galore_optax._galore import galore
from galore_optax.subspace import refresh_settings
from galore_optax.subspace.refresh_settings import Refresh
from galore_optax.tree import plan, sharding
from galore_optax.tree import rules as rules_lib

_Make = TypeVar("_Make", bound=Callable[..., Any])


# Reasons why a recipe refuses an option.
OTHER_PAPER = "it is the algorithm of another paper"
WHOLE_GRADIENT = (
  "it needs the whole gradient of a step; use `optax.MultiSteps` around it"
)


class GaLoreOptions(TypedDict, total=False):
  """The keyword arguments of `galore` that recipes share, for type checkers."""

  rank: ArrayLike
  update_proj_gap: ArrayLike
  scale: ArrayLike
  proj_type: str
  rules: rules_lib.Rules
  refresh: Refresh | str
  residual: str | None
  residual_factor: ArrayLike | None
  residual_decay: ArrayLike | None
  residual_growth: ArrayLike | None
  basis_dtype: DTypeLike
  state_dtype: DTypeLike | None
  accumulation_steps: int | None
  param_shardings: Any
  seed: ArrayLike
  faithful: bool


def recipe(
  defaults: GaLoreOptions | None = None,
  *,
  refused: Mapping[str, str] | None = None,
) -> Callable[[_Make], _Make]:
  """Decorates a recipe that takes `**options: Unpack[GaLoreOptions]`.

  `help`, `inspect.signature` and `optax.inject_hyperparams` see the options as
  explicit keyword arguments. The recipe is called with all of them, and with a
  `refresh` in which its own defaults are filled in.

  Args:
    defaults: Defaults that differ from those of `galore`.
    refused: Option to the reason why it must keep its default.

  Returns:
    The decorator.
  """
  defaults, refused = defaults or {}, refused or {}

  def decorate(make: _Make) -> _Make:
    signature = _signature(make, defaults)
    own_refresh = signature.parameters["refresh"].default
    own_refresh = own_refresh.or_defaults(refresh_settings.DEFAULTS)

    @functools.wraps(make)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
      try:
        bound = signature.bind(*args, **kwargs)
      except TypeError as error:
        raise TypeError(f"{make.__name__}() {error}") from None
      bound.apply_defaults()
      options = bound.arguments
      for name, why in refused.items():
        _check_default(make.__name__, name, options[name], signature, why)
      options["refresh"] = refresh_settings.complete(
        options["refresh"], own_refresh
      )
      return make(*bound.args, **bound.kwargs)

    wrapped.__signature__ = signature  # pyrefly: ignore[missing-attribute]
    return old_spellings.refuse(wrapped)  # pyrefly: ignore[bad-return]

  return decorate


def plan_of(rules: rules_lib.Rules, options: GaLoreOptions) -> plan.Plan:
  """The plan of a GaLore with these rules and options.

  Args:
    rules: Checked rules, see :func:`galore_optax.tree.rules_lib.check_rules`.
    options: All other options of a recipe.

  Returns:
    Which leaves are projected, and how.
  """
  default = rules_lib.Projection(
    rank=options.get("rank"),
    update_proj_gap=options.get("update_proj_gap"),
    scale=options.get("scale"),
    proj_type=options.get("proj_type"),
  )
  partitions = sharding.partitions(options.get("param_shardings"))
  return plan.Plan(tuple(rules), default, partitions=partitions)


def check_no_burst(recipe_name: str, refresh: Any) -> None:
  """Raises where a recipe's own state belongs to a refresh of one step.

  Args:
    recipe_name: Name of the recipe, for the message.
    refresh: Its option `refresh`, with the defaults filled in.
  """
  if refresh.burst is not None:
    raise ValueError(
      f"`{recipe_name}` finds a basis in one step, got burst="
      f"{refresh.burst!r}. Leave it out."
    )


def check_finder(recipe_name: str, refresh: Any) -> None:
  """Raises if bases are random in a recipe that updates in the subspace.

  Args:
    recipe_name: The recipe.
    refresh: Its option `refresh`, with the defaults filled in.
  """
  if refresh.finder == "random":
    raise ValueError(
      f'finder="random" only measures gradients, but {recipe_name} updates in '
      'the subspace. Use "subspace" or "svd".'
    )


def _signature(
  make: Callable, defaults: Mapping[str, Any]
) -> inspect.Signature:
  """A recipe's signature with `**options` spelled out."""
  signature = inspect.signature(make)
  own = [
    parameter
    for parameter in signature.parameters.values()
    if parameter.kind is not parameter.VAR_KEYWORD
  ]
  shared = inspect.signature(galore).parameters
  return signature.replace(
    parameters=own
    + [
      shared[name].replace(default=defaults.get(name, shared[name].default))
      for name in GaLoreOptions.__annotations__
    ]
  )


def _check_default(
  recipe_name: str,
  name: str,
  value: Any,
  signature: inspect.Signature,
  why: str,
) -> None:
  """Raises if an option that a recipe decides is not the recipe's default."""
  default = signature.parameters[name].default
  one_step = name == "accumulation_steps" and value == 1
  if value != default and not one_step:
    raise ValueError(
      f"`{name}={value!r}` has no meaning for {recipe_name}: {why}. Leave it "
      f"at {default!r}."
    )
