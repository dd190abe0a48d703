"""Errors that show how an argument of version 0.1 is spelled now."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_Make = TypeVar("_Make", bound=Callable[..., Any])

# Arguments that became fields of `Refresh`, and arguments with a new name.
FIELDS = {
  "projector": "finder",
  "iterations": "iterations",
  "moments": "moments",
  "null_tolerance": "null_tolerance",
  "random_from": "random_from",
  "adaptive": "adaptive",
  "share_refresh": "share",
}
RENAMED = {"recovery": "residual"}


def refuse(make: _Make) -> _Make:
  """Wraps a factory so that old spellings raise with the new ones.

  The wrapper keeps the factory's signature, which `help` and
  `optax.inject_hyperparams` read.

  Args:
    make: A function that makes an optimizer.

  Returns:
    The function, which raises TypeError for arguments of version 0.1.
  """

  @functools.wraps(make)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    if not kwargs.keys().isdisjoint(FIELDS | RENAMED):
      raise TypeError(_message(make.__name__, kwargs))
    return make(*args, **kwargs)

  return wrapped  # pyrefly: ignore[bad-return]


def _message(name: str, kwargs: Mapping[str, Any]) -> str:
  old = [k for k in kwargs if k in FIELDS or k in RENAMED]
  fields = {FIELDS[k]: kwargs[k] for k in old if k in FIELDS}
  if fields and isinstance(kwargs.get("refresh"), str):
    fields = {"policy": kwargs["refresh"], **fields}
  new = []
  if fields:
    inside = ", ".join(f"{k}={v!r}" for k, v in fields.items())
    new.append(f"refresh=Refresh({inside})")
  new += [f"{RENAMED[k]}={kwargs[k]!r}" for k in old if k in RENAMED]
  gone = ", ".join(f"`{k}`" for k in old)
  return (
    f"{name}() no longer takes {gone}. Write {name}(..., {', '.join(new)})"
    + (", with galore_optax.Refresh." if fields else ".")
  )
