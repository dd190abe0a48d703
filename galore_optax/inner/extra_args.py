"""Finds at `init` which extra arguments an inner optimizer's update needs.

Optax's optimizers name them in the error of an update without them. An update
can be traced with numbers in their place, which shows whether the optimizer can
run in a subspace. What is computed from the whole parameters cannot be replaced
so: an optimizer in a subspace would apply it to projected parameters.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.inner import separate

# Optax's extra arguments that belong to parameters of full size.
_OF_WHOLE_PARAMS = ("grad",)
_FUNCTION = re.compile(r"\b\w+_fn\b")
_MISSING = re.compile(r"missing \d+ required .*arguments?: (.*)")


def check(update: Callable, *trees: Any) -> None:
  """Traces a function of an inner update, so that it raises its errors now.

  Args:
    update: The function. Its last argument is a dict of extra arguments.
    *trees: Its other arguments, of which shapes and dtypes are used.

  Raises:
    ValueError: If the update needs a function or a gradient of the whole
      parameters. Also what `update` raises without extra arguments, except for
      a TypeError, and what it raises with them because of a
      :class:`galore_optax.inner.separate.CoupledError`. Other errors do not
      count: the extra arguments are not known.
  """
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), trees
  )
  number = jax.ShapeDtypeStruct((), jnp.float32)
  given: list[str] = []
  while True:
    try:
      jax.eval_shape(
        lambda trees, x: update(*trees, dict.fromkeys(given, x)),
        abstract,
        number,
      )
      return
    except Exception as error:
      is_refusal = isinstance(error.__cause__, separate.CoupledError)
      missing = None if is_refusal else _missing_argument(error)
      if missing in _OF_WHOLE_PARAMS or _FUNCTION.fullmatch(missing or ""):
        raise ValueError(_NEEDS_WHOLE_PARAMS.format(missing)) from error
      if missing is None or missing in given:
        if is_refusal or not (given or isinstance(error, TypeError)):
          raise
        return
      given.append(missing)


def _missing_argument(error: Exception) -> str | None:
  """The extra argument that an error of an optimizer says is missing."""
  if isinstance(error, KeyError):
    return str(error.args[0])
  missing = _MISSING.search(str(error))
  if isinstance(error, TypeError) and missing:
    return re.findall(r"'(\w+)'", missing[1])[0]
  function = _FUNCTION.search(str(error))
  return function[0] if function else None


_NEEDS_WHOLE_PARAMS = """\
`inner` cannot run in a subspace: each of its updates needs `{}`, which belongs
to the whole parameters, and a subspace only has projected ones. Take an
optimizer that needs nothing but gradients, as in
  galore(optax.adamw(1e-3), rank=128)
An optimizer that wraps another one goes around GaLore, as in
  sam(galore(optax.sgd(rate), rank=128), optax.sgd(radius), opaque_mode=True)"""
