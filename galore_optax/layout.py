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

from galore_optax import paths

# Fields of the states of Optax (and its contrib) that hold running means of
# gradients, order 1, and of their squares, order 2.
_FIRST = ("mu", "trace", "ema", "momentum", "exp_avg", "grad_sum")
_SECOND = ("nu", "nu_max", "sum_of_squares", "exp_avg_sq")
# What is not yet a moment: sums for a step that is still to come, those of
# `optax.MultiSteps` and of `optax.apply_every`.
SUMS = ("acc_grads", "grad_acc")
_ORDERS = {
  **dict.fromkeys((*_FIRST, *SUMS), 1),
  **dict.fromkeys(_SECOND, 2),
}
# States that call them otherwise.
_ORDERS_IN = {
  "FactoredState": {"v": 2},
  "ScaleByAdanState": {"m": 1, "v": 1, "g": 1, "n": 2},
  "ScaleBySM3State": {"nu": 1},
  "ScaleByAdemamixState": {"m1": 1, "m2": 1, "nu": 2},
  "ScaleBySimplifiedAdEMAMixState": {"m": 1, "n": 2},
  "MadgradState": {"s": 1, "grad_sum_sq": 2},
  "ScaleByAdaDeltaState": {"e_g": 2, "e_x": 2},
  "ScaleByOptimisticGradientState": {"previous_gradient": 1},
  "ScaleByRpropState": {"prev_updates": 1},
}


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
    low: Mapping whose keys are paths, see :func:`galore_optax.paths.paths`.

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


def moments(state: Any) -> dict[str, tuple[int, Split]]:
  """The trees of a kept inner state that can be carried over to new bases.

  Moments are known by the names of their fields in Optax's states: a first
  moment is linear in the gradient, a second one a mean of its squares.

  Args:
    state: An inner state as it is kept.

  Returns:
    Place in the state to the order of the moment, 1 or 2, and its tree.
  """
  flat = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_split)[0]
  found = [(keys, _order(state, keys), x) for keys, x in flat if is_split(x)]
  return {
    jax.tree_util.keystr(keys): (order, x)
    for keys, order, x in found
    if order is not None
  }


def is_sum(place: str) -> bool:
  """Whether a place of :func:`moments` is of gradients that are added up.

  They belong to a step that is still to come, so they are neither kept in
  another basis nor given up.
  """
  return place.rpartition(".")[2] in SUMS


def _order(state: Any, keys: tuple) -> int | None:
  """The order of a tree in a state; None: it is no moment."""
  field = str(getattr(keys[-1], "name", ""))
  for key in keys[:-1]:
    if isinstance(key, jax.tree_util.FlattenedIndexKey):
      return _ORDERS.get(field)  # nothing leads to what it is a part of
    if hasattr(key, "name"):
      state = getattr(state, key.name)
    else:
      state = state[key.idx if hasattr(key, "idx") else key.key]
  return _ORDERS_IN.get(type(state).__name__, _ORDERS).get(field)


def update_low(state: Any, new: Mapping[str, Mapping[str, jax.Array]]) -> Any:
  """Replaces low-rank leaves of a kept inner state.

  Args:
    state: An inner state as it is kept.
    new: Place in the state, see :func:`moments`, to path to new leaf.

  Returns:
    The state with these leaves replaced.
  """

  def replace(keys: tuple, x: Any) -> Any:
    leaves = new.get(jax.tree_util.keystr(keys), {})
    return x._replace(low={**x.low, **leaves}) if leaves else x

  return jax.tree_util.tree_map_with_path(replace, state, is_leaf=is_split)


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
