"""Boxes in which Flax keeps an array with its metadata, and quantized arrays.

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


def _is_box_of_codes(x: Any) -> bool:
  """Whether a node is a box, and the value in it is a quantized array."""
  if qarray.is_quantized(x):
    return False
  children, _ = jax.tree_util.tree_flatten_with_path(
    x, is_leaf=lambda y: y is not x
  )
  if len(children) != 1:
    return False
  keys, child = children[0]
  is_value = keys == (jax.tree_util.GetAttrKey("value"),)
  return is_value and qarray.is_quantized(child)
