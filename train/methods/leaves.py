"""Which leaves of a model a method treats how, by their paths."""

from typing import Any

import jax

# Ends of the paths of kernels, and of the factors that are trained for them.
KERNEL_ENDS = ("/kernel", "/kernel/a", "/kernel/b")


def path_of(path: tuple) -> str:
  """A key path as `layers/attn/q/kernel`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def is_block_matrix(path: tuple, leaf: Any) -> bool:
  """Whether a leaf is a kernel of the blocks, or a factor of one."""
  del leaf
  name = path_of(path)
  return name.startswith("layers/") and name.endswith(KERNEL_ENDS)


def block_matrices(params: Any) -> Any:
  """True for the kernels of the blocks: the leaves that GaLore projects."""
  return jax.tree_util.tree_map_with_path(is_block_matrix, params)


def decayed(params: Any) -> Any:
  """True for every leaf but norms and biases: by path, as stacks are 2-D."""

  def is_decayed(path: tuple, leaf: Any) -> bool:
    del leaf
    name = path_of(path)
    return "norm" not in name and not name.endswith("/bias")

  return jax.tree_util.tree_map_with_path(is_decayed, params)
