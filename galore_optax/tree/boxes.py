"""Boxes in which Flax keeps an array with its metadata.

The metadata name the axes of the array, which tells where layers are stacked.

Optimizers map over parameters, and so leave a quantized moment in the box of
its parameter (`nnx.Variable`, `nn.Partitioned`). Flax expects an array there:
`nnx.Optimizer` takes anything else apart, and a partition that is meant for one
array does not fit codes and scales. A state therefore has the box inside of the
quantized array, around the codes. These have the parameter's shape, so that its
metadata is right for them.
"""

import dataclasses
from typing import Any

import jax

from galore_optax.quantization import qarray
from galore_optax.tree import paths

_VALUE = jax.tree_util.GetAttrKey("value")
# Keys of the metadata of an `nnx.Variable` that name its axes.
AXES = ("out_sharding", "sharding_names", "sharding")


def is_box(x: Any) -> bool:
  """Whether a node is a box."""
  return _value_of(x) is not None


def take_out(tree: Any) -> Any:
  """The tree with the values of boxes in place of the boxes."""
  return jax.tree.map(
    lambda x: _value_of(x) if is_box(x) else x, tree, is_leaf=is_box
  )


def put_back(old: Any, new: Any) -> Any:
  """Undoes :func:`take_out` for new values.

  Args:
    old: The tree that :func:`take_out` was called with.
    new: A tree like the one that it returned.

  Returns:
    The new values, in the boxes of the old ones.
  """
  put = lambda x, value: (
    jax.tree.map(lambda _: value, x) if is_box(x) else value
  )
  return jax.tree.map(put, old, new, is_leaf=is_box)


def put_inside(tree: Any) -> Any:
  """Moves the boxes of quantized arrays around their codes, for a state.

  Args:
    tree: Any pytree, also one whose boxes are inside already.

  Returns:
    The tree, in which no :class:`galore_optax.QArray` is in a box.
  """

  def move(x: Any) -> Any:
    if not _is_box_of_codes(x):
      return x
    (q,) = jax.tree.leaves(x, is_leaf=qarray.is_quantized)
    box = jax.tree.map(lambda q: q.codes, x, is_leaf=qarray.is_quantized)
    return dataclasses.replace(q, codes=box)

  return jax.tree.map(
    move, tree, is_leaf=lambda x: qarray.is_quantized(x) or _is_box_of_codes(x)
  )


def put_outside(tree: Any) -> Any:
  """Undoes :func:`put_inside`: the result has the parameters' structure.

  Args:
    tree: Any pytree.

  Returns:
    The tree, with each :class:`galore_optax.QArray` in the box of its codes.
  """

  def move(x: Any) -> Any:
    if not qarray.is_quantized(x) or jax.tree.structure(x.codes).num_leaves < 1:
      return x
    return jax.tree.map(
      lambda codes: dataclasses.replace(x, codes=codes), x.codes
    )

  return jax.tree.map(move, tree, is_leaf=qarray.is_quantized)


def put_in_boxes(tree: Any, params: Any) -> Any:
  """A tree of leaves, in boxes where the parameters are.

  Args:
    tree: One leaf for each parameter, in a box or, as Flax makes partition
      specs and shardings, in place of the box.
    params: The parameters.

  Returns:
    The tree in the parameters' structure.
  """

  def put(x: Any, leaf: Any) -> Any:
    if _value_of(x) is None or _value_of(leaf) is not None:
      return leaf
    return jax.tree.map(lambda _: leaf, x, is_leaf=qarray.is_quantized)

  return jax.tree.map(
    put,
    params,
    tree,
    is_leaf=lambda x: qarray.is_quantized(x) or _value_of(x) is not None,
  )


def axis_names(tree: Any) -> dict[str, tuple]:
  """The names that Flax's partition metadata give to the axes of leaves.

  Args:
    tree: Any pytree.

  Returns:
    Path to one entry an axis: a name, several names, or None. Only for leaves
    in a box that names each axis of its array.
  """
  key_paths, names = [], []
  for keys, x in paths.flatten(tree, lambda x: _value_of(x) is not None)[0]:
    for more, leaf in paths.flatten(x)[0]:
      key_paths.append((*keys, *more))
      axes = axes_of(x)
      names.append(axes if len(axes) == len(jax.numpy.shape(leaf)) else ())
  found = zip(paths.paths(key_paths), names, strict=True)
  return {path: axes for path, axes in found if axes}


def axes_of(box: Any) -> tuple:
  """The axes that a box names, or an empty tuple."""
  axes = getattr(box, "names", None)
  if hasattr(box, "get_metadata"):
    metadata = box.get_metadata()
    axes = next((metadata[key] for key in AXES if metadata.get(key)), None)
  return entries(axes)


def entries(axes: Any) -> tuple:
  """The entries of a partition, or an empty tuple if it is none."""
  axes = getattr(axes, "spec", axes)
  return tuple(axes) if isinstance(axes, tuple | list | jax.P) else ()


def _is_box_of_codes(x: Any) -> bool:
  """Whether a node is a box, and the value in it is a quantized array."""
  return qarray.is_quantized(_value_of(x))


def _value_of(x: Any) -> Any:
  """The value in a box; None if a node is no box."""
  if isinstance(x, jax.Array | dict | list | tuple) or qarray.is_quantized(x):
    return None
  children, _ = jax.tree_util.tree_flatten_with_path(
    x, is_leaf=lambda y: y is not x
  )
  if len(children) != 1 or children[0][0] != (_VALUE,):
    return None
  return children[0][1]
