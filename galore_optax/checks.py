"""Checks of arguments. Each error names the value it got and a valid one."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_rank(rank: Any) -> None:
  """Raises unless a rank is None, traced, a positive int or a fraction."""
  if rank is None or isinstance(rank, jax.core.Tracer):
    return
  kinds = (int, float, np.integer, np.floating, np.ndarray, jax.Array)
  if isinstance(rank, bool) or not isinstance(rank, kinds) or np.ndim(rank):
    raise TypeError(
      "`rank` must be a positive int or a fraction of the shorter side in "
      f"(0, 1], got {rank!r}."
    )
  integer = jnp.issubdtype(jnp.result_type(rank), jnp.integer)
  if not rank > 0 or not (integer or rank <= 1):
    raise ValueError(
      "`rank` must be positive, and at most 1.0 if it is a fraction of the "
      f"shorter side (a float), got {rank!r}."
    )


def required(name: str, value: Any) -> Any:
  """The value; raises if it is None."""
  if value is None:
    raise TypeError(f"`{name}` must be given, got None.")
  return value


def check_positive(name: str, value: Any) -> None:
  """Raises unless a value is None, traced or a positive number."""
  if value is None or isinstance(value, jax.core.Tracer):
    return
  check_number(name, value)
  if not value > 0:
    raise ValueError(f"`{name}` must be positive, got {value!r}.")


def check_not_negative(name: str, value: Any) -> None:
  """Raises unless a value is None, traced or a number of 0 or more."""
  check_number(name, value)
  if value is None or isinstance(value, jax.core.Tracer):
    return
  if not value >= 0:
    raise ValueError(f"`{name}` must be 0 or more, got {value!r}.")


def check_number(name: str, value: Any) -> None:
  """Raises unless a value is None, traced or a number."""
  if value is None or isinstance(value, jax.core.Tracer):
    return
  kinds = (int, float, np.number, np.ndarray, jax.Array)
  if isinstance(value, bool) or not isinstance(value, kinds) or np.ndim(value):
    raise TypeError(
      f"`{name}` must be a number, got {value!r}. Schedules go through "
      "`optax.inject_hyperparams`."
    )


def check_choice(name: str, value: str | None, choices: Sequence[str]) -> None:
  """Raises unless a value is None or one of the choices."""
  if value is None or value in choices:
    return
  near = difflib.get_close_matches(str(value), choices, n=1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  raise ValueError(
    f"`{name}` must be one of {', '.join(map(repr, choices))}, got "
    f"{value!r}.{hint}"
  )


def check_float_dtype(
  name: str, value: Any, others: Sequence[str] = ()
) -> None:
  """Raises unless a value is None or names a real floating-point dtype."""
  if value is None:
    return
  try:
    dtype = jnp.dtype(value)
  except TypeError:
    dtype = None
  floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
  if not floating or jnp.finfo(dtype).bits < 16:
    raise TypeError(
      f"`{name}` must be a floating-point dtype such as 'float32' or "
      f"'bfloat16'{''.join(f', or {x!r}' for x in others)}, got {value!r}."
    )


def dtype_name(name: str, value: Any, others: Sequence[str] = ()) -> str:
  """Name of a dtype; raises unless it is floating point or one of `others`.

  Args:
    name: Name of the argument, for the error.
    value: The dtype; None for float32.
    others: Names of dtypes that are valid, too.

  Returns:
    The dtype's name.
  """
  try:
    dtype = "float32" if value is None else jnp.dtype(value).name
  except TypeError:
    dtype = ""
  if dtype not in others:
    check_float_dtype(name, value, others)
  return dtype


def check_eps(eps: Any, state_dtype: Any) -> None:
  """Raises if Adam's ε is 0 in the dtype of the moments: 0 / 0 is NaN."""
  check_float_dtype("state_dtype", state_dtype)
  if state_dtype is None or isinstance(eps, jax.core.Tracer) or not eps:
    return
  dtype = jnp.dtype(state_dtype)
  # NumPy, because an optimizer may be made inside of `jax.jit`.
  if not np.asarray(eps).astype(dtype) > 0:
    raise ValueError(
      f"`eps`={eps!r} is 0 in state_dtype={dtype.name!r}: a gradient of zeros "
      "would make the weights NaN. Use 'bfloat16', or an `eps` of at "
      f"least {float(jnp.finfo(dtype).smallest_subnormal):.0e}."
    )


def check_not_nested(inner_state: Any, kind: type) -> None:
  """Raises if an inner optimizer's state contains a GaLore state.

  Args:
    inner_state: What the inner optimizer's `init` returned.
    kind: The type of a GaLore state.
  """
  is_galore = lambda x: isinstance(x, kind)
  if any(map(is_galore, jax.tree.leaves(inner_state, is_leaf=is_galore))):
    raise ValueError(
      "`inner` contains GaLore already, and a projected gradient cannot be "
      "projected again. Wrap the plain optimizer once, "
      "`galore(optax.adamw(1e-3), rank=128)`; `rules` give some leaves another "
      "rank, gap or scale."
    )


def try_abstractly(f: Callable, *trees: Any) -> None:
  """Traces a function of an inner update, so that it raises its errors now.

  Args:
    f: The function. A TypeError or a KeyError is ignored: the update may need
      extra arguments, which are not known before the first update.
    *trees: Its arguments, of which shapes and dtypes are used.
  """
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), trees
  )
  try:
    jax.eval_shape(f, *abstract)
  except (TypeError, KeyError):
    return
