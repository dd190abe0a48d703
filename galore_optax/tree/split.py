"""Stores an inner optimizer's state with its low-rank leaves set apart.

The inner optimizer is given trees in the parameters' structure, so that its
masks and labels fit. The state stores each such tree as a :class:`Split`:
tools take a leaf in the parameters' structure for an array of the parameter's
shape, for instance when they copy the parameters' shardings or read the
metadata of the box that it is in, and a low-rank leaf is not of that shape.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from galore_optax.tree import boxes, paths


class Split(NamedTuple):
  """A tree in the parameters' structure, with its projected leaves set apart.

  Attributes:
    low: Path to low-rank leaf.
    full: The tree, with `optax.MaskedNode` in place of the low-rank leaves.
  """

  low: dict[str, Any]
  full: Any


def split(tree: Any, low: Mapping[str, Any]) -> Split:
  """Splits a tree into the leaves at the paths of `low` and all others.

  Args:
    tree: A tree in the parameters' structure; parts may be masked.
    low: Mapping whose keys are paths, see
      :func:`galore_optax.tree.paths.paths`.

  Returns:
    The split tree.
  """
  flat, treedef = paths.flatten(boxes.put_outside(tree))
  names = paths.paths([keys for keys, _ in flat])
  leaves = [leaf for _, leaf in flat]
  low_leaves = {
    name: x for name, x in zip(names, leaves, strict=False) if name in low
  }
  rest = [
    optax.MaskedNode() if name in low else x
    for name, x in zip(names, leaves, strict=False)
  ]
  return Split(low_leaves, boxes.put_inside(treedef.unflatten(rest)))


def merge(tree: Split) -> Any:
  """Undoes :func:`split`.

  Args:
    tree: The split tree.

  Returns:
    The tree in the parameters' structure, with the low-rank leaves in it.
  """
  flat, treedef = paths.flatten(boxes.put_outside(tree.full), is_masked)
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


def split_state(
  inner: optax.GradientTransformationExtraArgs,
  state: Any,
  low: Mapping[str, Any],
) -> Any:
  """Splits every tree in the parameters' structure of an inner state.

  Args:
    inner: The inner optimizer, whose `init` shows which trees those are.
    state: Its state.
    low: Mapping whose keys are the paths of the low-rank leaves.

  Returns:
    The state with a :class:`Split` in place of these trees.
  """
  return _map_trees(inner, lambda tree: split(tree, low), state)


def merge_state(
  inner: optax.GradientTransformationExtraArgs, state: Any
) -> Any:
  """Undoes :func:`split_state`.

  Args:
    inner: The inner optimizer.
    state: The split state.

  Returns:
    The state as the inner optimizer made it.
  """
  return _map_trees(inner, merge, state)


def is_split(x: Any) -> bool:
  """Whether a node is a :class:`Split`."""
  return isinstance(x, Split)


def placeholder_state(
  inner: optax.GradientTransformationExtraArgs, params: Any
) -> Any:
  """The inner state that `init` returns when Optax probes it.

  `optax.tree.map_params` calls `init` with a placeholder to find the trees in
  the parameters' structure. A GaLore state has none, because all of them are
  split; a plain leaf in place of each says so.

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
  """Maps a function over the trees in the parameters' structure of a state."""
  try:
    return optax.tree.map_params(inner.init, f, state, is_leaf=lambda _: True)
  except (IndexError, TypeError, ValueError) as error:
    raise ValueError(
      "The inner optimizer cannot be wrapped: `optax.tree.map_params`, which "
      f"finds the moments in its state, fails ({error}). Wrap its parts "
      "instead, e.g. `chain(galore(optax.scale_by_adam(), rank=128), ...)`."
    ) from error


def _placeholder_type() -> type:
  """The type of the node with which `optax.tree.map_params` calls `init`."""
  nodes = []
  optax.tree.map_params(lambda x: nodes.append(x) or x, lambda x: x, 0)
  return type(nodes[0])


_PLACEHOLDER = _placeholder_type()


def is_placeholder(x: Any) -> bool:
  """Whether a node is the one with which Optax probes `init`."""
  return isinstance(x, _PLACEHOLDER)
