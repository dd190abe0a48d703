"""Lets `flax.serialization` write and read the nodes of our states.

The library does not need Flax, and does not import it. Nodes are registered
once `flax.serialization` is imported, by whomever.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

# Classes to register, with the field and the function given to `serializable`.
_waiting: dict[type, tuple[str, Callable[[Any], str]]] = {}


def serializable(field: str, label: Callable[[Any], str]) -> Callable[[T], T]:
  """Class decorator: makes the nodes of a dataclass known to Flax.

  In a state dict, the value of one field is stored under a label that says what
  it means, as in `{"codes": {"int8": ...}, "scale": ...}`. The state dict holds
  nothing but arrays, and cannot be read as something else.

  Args:
    field: Name of that field.
    label: From a node to the label.

  Returns:
    The decorator.
  """

  def decorate(cls: T) -> T:
    _waiting[cls] = field, label
    register()
    return cls

  return decorate


def register() -> None:
  """Registers the nodes that are not registered yet, if Flax is imported."""
  if not _waiting:
    return
  module: Any = sys.modules.get("flax.serialization")
  if not hasattr(module, "register_serialization_state"):
    return
  while _waiting:
    cls, (field, label) = _waiting.popitem()
    _register(module, cls, field, label)


def _register(
  module: Any, cls: type, field: str, label: Callable[[Any], str]
) -> None:
  """Registers one class."""

  def to_state_dict(node: Any) -> dict[str, Any]:
    state = {
      name: module.to_state_dict(getattr(node, name))
      for name in _fields(cls)
      if getattr(node, name) is not None
    }
    return {**state, field: {label(node): state[field]}}

  def from_state_dict(node: Any, state: dict[str, Any]) -> Any:
    wanted = label(node)
    found = list(state.get(field, {}))
    names = {x for x in _fields(cls) if getattr(node, x) is not None}
    if found != [wanted] or set(state) != names:
      raise ValueError(
        f"The state dict at {module.current_path()!r} holds {sorted(state)}, "
        f"with {field!r} as {found}, but the target is a {cls.__name__} of "
        f"{sorted(names)}, with {field!r} as [{wanted!r}]. Restore it into the "
        "state of an optimizer with the same settings."
      )
    state = {**state, field: state[field][wanted]}
    new = {
      name: module.from_state_dict(getattr(node, name), x, name=name)
      for name, x in state.items()
    }
    _check_shapes(module.current_path(), node, new)
    return dataclasses.replace(node, **new)

  module.register_serialization_state(
    cls, to_state_dict, from_state_dict, override=True
  )


def _fields(cls: Any) -> list[str]:
  """Names of the fields that are not static."""
  return [
    x.name for x in dataclasses.fields(cls) if not x.metadata.get("static")
  ]


def _check_shapes(path: str, node: Any, new: dict[str, Any]) -> None:
  """Raises if a restored array has another shape than the target's.

  Flax restores arrays of any shape without a word.
  """
  for name, x in new.items():
    wanted = getattr(getattr(node, name), "shape", None)
    found = getattr(x, "shape", None)
    if wanted is None or found is None:
      continue
    if tuple(found) != tuple(wanted):
      raise ValueError(
        f"The state dict at {path!r} has {name!r} of shape {tuple(found)}, but "
        f"the target's is {tuple(wanted)}. Restore it into the state of an "
        "optimizer with the same settings, for the same parameters."
      )
