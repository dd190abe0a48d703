"""The leaves of a pytree by path: the names that rules and states go by."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from galore_optax.quantization import qarray

# A leaf of a tree that is a bare array has no path of its own.
_ROOT = "param"


def leaves_by_path(tree: Any) -> dict[str, Any]:
  """The leaves of a pytree by their paths.

  Keys of dicts, attributes and positions are joined by '/'. The box in which
  Flax keeps an array (`nnx.Variable`, `nn.Partitioned`) adds nothing.

  Args:
    tree: Any pytree.

  Returns:
    Path to leaf, in the tree's order.

  Example:
    >>> leaves_by_path({"attn": {"q": 1.0, "k": 2.0}, "mlp": [3.0]})
    {'attn/k': 2.0, 'attn/q': 1.0, 'mlp/0': 3.0}
  """
  flat = flatten(tree)[0]
  return dict(
    zip(paths([keys for keys, _ in flat]), (x for _, x in flat), strict=False)
  )


def check_arrays(leaves: Mapping[str, Any], advice: str) -> None:
  """Raises where a leaf is a quantised array, and says what to do instead."""
  for path, x in leaves.items():
    if qarray.is_quantized(x):
      raise TypeError(
        f"The leaf {path!r} is a QArray ({x.kind}, shape {x.shape}), not an "
        f"array. {advice}"
      )


def flatten(tree: Any, is_leaf: Callable = lambda _: False) -> tuple:
  """Flattens with key paths; a quantised array is one leaf."""
  return jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=lambda x: qarray.is_quantized(x) or is_leaf(x)
  )


def map_with_path(f: Callable[[str, Any], Any], tree: Any) -> Any:
  """Maps a function of path and leaf over a tree, see `leaves_by_path`."""
  flat, treedef = flatten(tree)
  names = paths([keys for keys, _ in flat])
  return treedef.unflatten(
    [f(p, x) for p, (_, x) in zip(names, flat, strict=False)]
  )


def paths(key_paths: Sequence[tuple]) -> list[str]:
  """One distinct path a leaf, see :func:`leaves_by_path`.

  Raises:
    ValueError: If two leaves have the same.
  """
  for unbox in (True, False):
    found = [_join(keys, unbox) for keys in key_paths]
    if len(set(found)) == len(found):
      return found
  twice = next(path for path in found if found.count(path) > 1)
  raise ValueError(
    f"Two leaves have the path {twice!r}, and states and rules go by paths. "
    "Rename a key that has a '/' in it."
  )


def _join(keys: tuple, unbox: bool) -> str:
  boxed = keys and keys[-1] == jax.tree_util.GetAttrKey("value")
  keys = keys[:-1] if unbox and boxed else keys
  return "/".join(_name(key) for key in keys) or _ROOT


def _name(key: Any) -> str:
  for attribute in ("key", "name", "idx"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)
