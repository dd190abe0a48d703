"""Paths of the leaves of a pytree, by which rules and states name them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from galore_optax.quantization import qarray

# Path of the leaf of a tree that is just one array.
_ROOT = "param"


def leaves_by_path(tree: Any) -> dict[str, Any]:
  """Path to leaf, for all leaves of a pytree.

  Keys of dicts, attributes and indices are joined by '/'. The box in which Flax
  keeps an array (`nnx.Variable`, `nn.Partitioned`) adds nothing to the path.

  Args:
    tree: Any pytree.

  Returns:
    Path to leaf, in the sequence in which JAX flattens the tree.

  Example:
    >>> leaves_by_path({"attn": {"q": 1.0, "k": 2.0}, "mlp": [3.0]})
    {'attn/k': 2.0, 'attn/q': 1.0, 'mlp/0': 3.0}
  """
  flat = flatten(tree)[0]
  return dict(
    zip(paths([keys for keys, _ in flat]), (x for _, x in flat), strict=False)
  )


def check_arrays(leaves: Mapping[str, Any], advice: str) -> None:
  """Raises if a leaf is a quantized array.

  Args:
    leaves: Path to leaf.
    advice: What to do instead, for the error.
  """
  for path, x in leaves.items():
    if qarray.is_quantized(x):
      raise TypeError(
        f"The leaf {path!r} is a QArray ({x.kind}, shape {x.shape}), not an "
        f"array. {advice}"
      )


def flatten(tree: Any, is_leaf: Callable = lambda _: False) -> tuple:
  """Flattens with key paths; a quantized array is one leaf."""
  return jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=lambda x: qarray.is_quantized(x) or is_leaf(x)
  )


def map_with_path(f: Callable[[str, Any], Any], tree: Any) -> Any:
  """Maps a function of path and leaf over a tree.

  Args:
    f: From a path, see :func:`leaves_by_path`, and a leaf to a leaf.
    tree: Any pytree; a quantized array is one leaf.

  Returns:
    The tree of the results.
  """
  flat, treedef = flatten(tree)
  names = paths([keys for keys, _ in flat])
  return treedef.unflatten(
    [f(p, x) for p, (_, x) in zip(names, flat, strict=False)]
  )


def paths(key_paths: Sequence[tuple]) -> list[str]:
  """A distinct path for each leaf, see :func:`leaves_by_path`.

  Args:
    key_paths: JAX's key paths of the leaves.

  Returns:
    The paths, in the same sequence.

  Raises:
    ValueError: If two leaves have the same path.
  """
  for unbox in (True, False):
    names = [_join(keys, unbox) for keys in key_paths]
    if len(set(names)) == len(names):
      return names
  duplicate = next(path for path in names if names.count(path) > 1)
  raise ValueError(
    f"Two leaves have the path {duplicate!r}, by which states and rules name "
    "leaves. Rename a key that has a '/' in it."
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
