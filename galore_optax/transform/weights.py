"""What the inner optimizer sees of the weights, and what it adds for them."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax.inner import extra_args, separate
from galore_optax.subspace import moments, projection
from galore_optax.transform.call import Call
from galore_optax.transform.settings import Settings
from galore_optax.tree import paths
from galore_optax.tree import plan as plan_lib


def check_inner(
  settings: Settings,
  params: optax.Params,
  low: Any,
  inner_state: Any,
  sites: Mapping[str, plan_lib.Site],
) -> None:
  """Refuses at `init` an inner optimizer that cannot run in a subspace."""
  if settings.refresh.moments == "ldadam":
    moments.check_adam(inner_state)
  if settings.params_mode == "split":
    extra_args.check(
      functools.partial(terms, settings, sites), inner_state, params
    )
    return
  if sites:
    extra_args.check(
      lambda g, s, p, extra: settings.inner.update(g, s, p, **extra),
      *(low, inner_state, low),
    )
  try:
    separate.check_initial_state(settings.inner, low, sites)
  except separate.CoupledError as error:
    raise ValueError(_REMEMBERS.format(error)) from error


def terms(
  settings: Settings,
  sites: Mapping[str, plan_lib.Site],
  inner_state: Any,
  params: optax.Params | None,
  extra_args: Mapping[str, Any],
) -> dict[str, jax.Array]:
  """The part of each full-size update that depends on parameters alone."""
  if params is None or not sites or settings.params_mode == "project":
    return {}
  # Reshaped as the inner optimizer sees them: it may tell axes apart.
  inner_params = paths.map_with_path(
    lambda path, x: (
      sites[path].view.as_stack(settings.cast(x))
      if path in sites
      else settings.cast(x)
    ),
    params,
  )
  try:
    found = separate.param_term(
      settings.inner, inner_state, inner_params, sites, extra_args
    )
  except separate.CoupledError as error:
    raise ValueError(_COUPLED.format(error)) from error
  return {path: sites[path].view.from_stack(x) for path, x in found.items()}


def as_seen(
  settings: Settings, call: Call, bases: Mapping[str, projection.Bases]
) -> optax.Params | None:
  """The parameters as the inner optimizer sees them.

  A projected leaf is zero, since its term is added at full size; with
  `params_mode="project"` it is the projected weight.
  """
  if call.params is None:
    return None

  def convert(path: str, x: jax.Array) -> jax.Array:
    if path not in call.sites:
      return settings.cast(x)
    site = call.sites[path]
    if settings.params_mode == "split":
      return jnp.zeros(site.low_shape, settings.dtype(x.dtype))
    low = projection.project(site.view.as_stack(x), bases[path])
    return low.astype(settings.dtype(x.dtype))

  return paths.map_with_path(convert, call.params)


_COUPLED = """\
`inner` cannot run in a subspace as it is: {}, and that part of the update has
no exact low-rank form. Put the parts that need the weights behind GaLore, where
they see full-size updates and keep no state, for instance
  optax.chain(
    galore(optax.scale_by_adam(), rank=128),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_trust_ratio(),
    optax.scale_by_learning_rate(learning_rate),
  )
or pass `params_mode="project"` to let `inner` see the projected weights, with
which for example `optax.contrib.momo` runs.
`optax.adafactor` only needs `multiply_by_parameter_scale=False`. An
`inner` whose state begins with the weights cannot use those either: put
`optax.contrib.schedule_free` and similar optimizers around GaLore."""

_REMEMBERS = """\
`inner` keeps where the weights began: {}. With `params_mode="project"` it sees
projected weights, and their basis changes. Put it around GaLore, as in
  optax.contrib.schedule_free(galore(optax.sgd(rate), rank=128), rate)"""
