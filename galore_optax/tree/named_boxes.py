"""Boxes of Flax NNX that name the axes of their arrays, for a state.

An optimizer's state has arrays of other shapes than the parameters. They get
boxes of their own, with the names of their axes.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from galore_optax.tree import boxes, paths

# The key under which a parameter has other names for its optimizer's state.
_STATE_AXES = "optimizer_sharding"
# Keys of what an array of another shape has in common with its parameter.
_SHARED = ("hijax", "mesh", "sharding_rules", "eager_sharding")


@dataclasses.dataclass(frozen=True)
class NamedBox:
  """The box of a parameter, an `nnx.Variable` that names each of its axes.

  Attributes:
    box: The box.
    names: One entry an axis, for the optimizer's state: a name, several names,
      or None.
  """

  box: Any
  names: tuple

  def around(self, x: jax.Array, names: Sequence) -> Any:
    """A box of the same class around another array.

    Args:
      x: The array.
      names: One entry for each of its axes. A name is left out if the mesh in
        context is known not to divide the axis.

    Returns:
      The box.
    """
    metadata = self.box.get_metadata()
    old = metadata[_key_of_axes(metadata)]
    new: Any = tuple(
      name if size % _devices(metadata, old, name) == 0 else None
      for name, size in zip(names, x.shape, strict=False)
    )
    if isinstance(old, jax.NamedSharding):
      new = jax.NamedSharding(old.mesh, jax.P(*new))
    elif isinstance(old, jax.P):
      new = jax.P(*new)
    kept = {key: metadata[key] for key in _SHARED if key in metadata}
    return type(self.box).from_metadata(
      x, {**kept, "ref": False, "out_sharding": new}
    )


def find(params: Any) -> dict[str, NamedBox]:
  """The boxes of Flax NNX that name each axis of their array.

  Args:
    params: Any pytree.

  Returns:
    Path to box.
  """
  key_paths, found = [], []
  for keys, x in paths.flatten(params, boxes.is_box)[0]:
    for more, leaf in paths.flatten(x)[0]:
      key_paths.append((*keys, *more))
      names = _state_axes_of(x)
      is_named = names and len(names) == len(jax.numpy.shape(leaf))
      found.append(NamedBox(x, names) if is_named else None)
  by_path = zip(paths.paths(key_paths), found, strict=True)
  return {path: box for path, box in by_path if box is not None}


def _state_axes_of(box: Any) -> tuple:
  """The axes that an `nnx.Variable` names for the optimizer's state."""
  if not hasattr(box, "get_metadata"):
    return ()
  return boxes.entries(box.get_metadata().get(_STATE_AXES)) or boxes.axes_of(
    box
  )


def _key_of_axes(metadata: Mapping[str, Any]) -> str:
  """The key under which metadata name the axes of the optimizer's state."""
  keys = (_STATE_AXES, *boxes.AXES)
  return next(key for key in keys if boxes.entries(metadata.get(key)))


def _devices(metadata: Mapping[str, Any], sharding: Any, name: Any) -> int:
  """Among how many devices an axis is divided; 1 if that is not known here."""
  meshes = getattr(sharding, "mesh", None), metadata.get("mesh")
  mesh = next(filter(None, meshes), jax.sharding.get_abstract_mesh())
  rules = [*(metadata.get("sharding_rules") or ()), *_rules_in_context()]
  axes = []
  for alias in name if isinstance(name, tuple | list) else (name,):
    axis = next((axis for other, axis in rules if other == alias), alias)
    axes += axis if isinstance(axis, tuple | list) else (axis,)
  return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def _rules_in_context() -> Sequence[tuple[str, Any]]:
  """Flax's rules from names to mesh axes, if it is imported and has any."""
  module: Any = sys.modules.get("flax.core.spmd")
  return module.get_logical_axis_rules() if module else ()
