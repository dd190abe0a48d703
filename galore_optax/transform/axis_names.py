"""Names for the axes of a state's arrays, where the parameters' have them.

Flax NNX keeps the names of an array's axes in the box that the array is in.
Frameworks read from them how to shard an optimizer's state. An array of rank r
is not of its parameter's shape, so that its parameter's box is wrong for it,
and it gets a box of its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from galore_optax.quantization import qarray
from galore_optax.subspace import projection
from galore_optax.transform.state import GaLoreState
from galore_optax.tree import boxes, named_boxes, plan, split


def named(
  state: GaLoreState, params: optax.Params, sites: Mapping[str, plan.Site]
) -> GaLoreState:
  """Puts bases and moments of rank r in boxes that name their axes.

  The axis of the rank has the name of the side that is projected, unless it is
  known that the mesh does not divide the rank. Scales, and means that have one
  number for each row or column, stay without names: they are small.

  Args:
    state: The state.
    params: The parameters.
    sites: Path to site of the projected leaves.

  Returns:
    The state; the same if no parameter is in a box of Flax NNX that names its
    axes.
  """
  found = named_boxes.find(params)

  def put(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {
      path: _named(sites[path], found[path], x) if path in found else x
      for path, x in leaves.items()
    }

  return _map_leaves(put, state) if found else state


def _named(site: plan.Site, box: named_boxes.NamedBox, x: Any) -> Any:
  """A leaf's bases by side, or one of its moments, in boxes."""
  if isinstance(x, dict):
    return {side: _named_basis(site, side, box, y) for side, y in x.items()}
  if jax.numpy.shape(x) != site.low_shape:
    return x
  return _put(box, x, site.view.spec(box.names))


def _named_basis(
  site: plan.Site, side: str, box: named_boxes.NamedBox, basis: Any
) -> Any:
  """A basis in a box; one that is drawn from a seed has no axes."""
  if isinstance(basis, projection.RandomBasis):
    return basis
  *stack, rows, rank = site.basis_spec(side, box.names)
  is_transposed = qarray.is_quantized(basis)
  names = (*stack, rank, rows) if is_transposed else (*stack, rows, rank)
  return _put(box, basis, names)


def _put(box: named_boxes.NamedBox, x: Any, names: tuple) -> Any:
  """An array in a box with these names; of a quantized one, its codes."""
  if qarray.is_quantized(x):
    return dataclasses.replace(x, codes=box.around(x.codes, names))
  return box.around(x, names)


def unnamed(update: Callable) -> Callable:
  """Makes an update function take the state of :func:`named`, and return one.

  Args:
    update: The update function of a gradient transformation, in whose state
      there are any number of GaLore's.

  Returns:
    A function of the same arguments.
  """

  @functools.wraps(update)
  def update_unnamed(updates, state, params=None, **extra_args):
    if not _has_names(state):
      return update(updates, state, params, **extra_args)
    plain = without_names(state)
    updates, new = update(updates, plain, params, **extra_args)
    return updates, with_names_of(state, new)

  return update_unnamed


def without_names(state: Any) -> Any:
  """A state whose arrays that belong to projected leaves are in no boxes.

  Args:
    state: State of any optimizer, with or without GaLore anywhere in it.
  """
  return _map_states(functools.partial(_map_leaves, boxes.take_out), state)


def with_names_of(old: Any, new: Any) -> Any:
  """Undoes :func:`without_names` for a state that has become another.

  Args:
    old: The state that :func:`without_names` was called with.
    new: A state like the one that it returned.

  Returns:
    The new state, with its arrays in the boxes of the old one's.
  """
  return _map_states(functools.partial(_map_leaves, boxes.put_back), old, new)


def _has_names(state: Any) -> bool:
  """Whether any array that belongs to a projected leaf is in a box."""
  found: list[bool] = []

  def look(tree: Any) -> Any:
    found.extend(map(boxes.is_box, jax.tree.leaves(tree, is_leaf=boxes.is_box)))
    return tree

  _map_states(functools.partial(_map_leaves, look), state)
  return any(found)


def _map_states(f: Callable, *states: Any) -> Any:
  """Maps a function over the states of GaLore in optimizers' states."""
  is_state = lambda x: isinstance(x, GaLoreState)
  return jax.tree.map(
    lambda x, *others: f(x, *others) if is_state(x) else (others or (x,))[-1],
    *states,
    is_leaf=is_state,
  )


def _map_leaves(f: Callable, *states: GaLoreState) -> GaLoreState:
  """Maps a function over the bases and moments of projected leaves.

  Returns:
    The last state, with what the function returns in place of these dicts.
  """

  def of_split(*trees: Any) -> Any:
    if not split.is_split(trees[-1]):
      return trees[-1]
    return trees[-1]._replace(low=f(*(x.low for x in trees)))

  def of_splits(*trees: Any) -> Any:
    return jax.tree.map(of_split, *trees, is_leaf=split.is_split)

  return states[-1]._replace(
    projector=f(*(x.projector for x in states)),
    inner_state=of_splits(*(x.inner_state for x in states)),
    accumulator=of_splits(*(x.accumulator for x in states)),
  )
