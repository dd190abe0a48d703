"""How an inner optimizer's state is kept: its low-rank leaves set apart.

The inner optimizer sees trees in the parameters' structure, so that its masks
and labels fit. In the state such a tree is kept as a :class:`Split`: a low-rank
leaf must not lie where tools expect an array of the parameter's shape, be it a
sharding copied from the parameters or a box with the parameter's metadata.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from galore_optax.tree import paths


class Split(NamedTuple):
  """A tree in the parameters' structure, with its projected leaves set apart.

  Attributes:
    low: Path to low-rank leaf.
    full: The tree, with `optax.MaskedNode` in place of the low-rank leaves.
  """

  low: dict[str, Any]
  full: Any


def split(tree: Any, low: Mapping[str, Any]) -> Split:
  """Sets the leaves at the paths of `low` apart.

  Args:
    tree: A tree in the parameters' structure; parts may be masked.
    low: Mapping whose keys are paths, see
      :func:`galore_optax.tree.paths.paths`.

  Returns:
    The split tree.
  """
  flat, treedef = paths.flatten(tree)
  names = paths.paths([keys for keys, _ in flat])
  leaves = [leaf for _, leaf in flat]
  low_leaves = {
    name: x for name, x in zip(names, leaves, strict=False) if name in low
  }
  rest = [
    optax.MaskedNode() if name in low else x
    for name, x in zip(names, leaves, strict=False)
  ]
  return Split(low_leaves, treedef.unflatten(rest))


def merge(tree: Split) -> Any:
  """Undoes :func:`split`.

  Args:
    tree: The split tree.

  Returns:
    The tree in the parameters' structure, low-rank leaves in their places.
  """
  flat, treedef = paths.flatten(tree.full, is_masked)
  names = paths.paths([keys for keys, _ in flat])
  leaves = [leaf for _, leaf in flat]
  return treedef.unflatten(
    [
      tree.low.get(name, x) if is_masked(x) else x
      for name, x in zip(names, leaves, strict=False)
    ]
  )


def is_masked(x: Any) -> bool:
  """Whether a node is `optax.MaskedNode`."""
  return isinstance(x, optax.MaskedNode)


def masked_paths(tree: Any) -> list[str]:
  """Paths of the masked leaves of a tree."""
  flat, _ = paths.flatten(tree, is_masked)
  names = paths.paths([keys for keys, _ in flat])
  return [
    name for name, (_, x) in zip(names, flat, strict=False) if is_masked(x)
  ]


def stow(
  inner: optax.GradientTransformationExtraArgs,
  state: Any,
  low: Mapping[str, Any],
) -> Any:
  """Splits every tree in the parameters' structure of an inner state.

  Args:
    inner: The inner optimizer, whose `init` tells which trees those are.
    state: Its state.
    low: Mapping whose keys are the paths of the low-rank leaves.

  Returns:
    The state as it is kept.
  """
  return _map_trees(inner, lambda tree: split(tree, low), state)


def unstow(inner: optax.GradientTransformationExtraArgs, state: Any) -> Any:
  """Undoes :func:`stow`.

  Args:
    inner: The inner optimizer.
    state: Its state as it is kept.

  Returns:
    The state as the inner optimizer knows it.
  """
  return _map_trees(inner, merge, state)


def is_split(x: Any) -> bool:
  """Whether a node is a :class:`Split`."""
  return isinstance(x, Split)


def skeleton(inner: optax.GradientTransformationExtraArgs, params: Any) -> Any:
  """The inner state of the placeholder with which Optax probes `init`.

  Nothing in a GaLore state has the parameters' structure, which is what one
  plain leaf in place of every split tree says to `optax.tree.map_params`.

  Args:
    inner: The inner optimizer.
    params: The placeholder.

  Returns:
    The inner state with 0 in place of every split tree.
  """
  return jax.tree.map(
    lambda x: 0 if is_placeholder(x) else x,
    inner.init(params),
    is_leaf=is_placeholder,
  )


def _map_trees(
  inner: optax.GradientTransformationExtraArgs, f: Callable, state: Any
) -> Any:
  try:
    return optax.tree.map_params(inner.init, f, state, is_leaf=lambda _: True)
  except (IndexError, TypeError, ValueError) as error:
    raise ValueError(
      "The inner optimizer cannot be wrapped: which parts of its state are "
      "moments is found with `optax.tree.map_params`, which fails for it "
      f"({error}). Wrap its parts instead, e.g. "
      "`chain(galore(optax.scale_by_adam(), rank=128), ...)`."
    ) from error


def _placeholder_type() -> type:
  """The type of the node with which `optax.tree.map_params` calls `init`."""
  seen = []
  optax.tree.map_params(lambda x: seen.append(x) or x, lambda x: x, 0)
  return type(seen[0])


_PLACEHOLDER = _placeholder_type()


def is_placeholder(x: Any) -> bool:
  """Whether a node is the one with which Optax probes `init`."""
  return isinstance(x, _PLACEHOLDER)
