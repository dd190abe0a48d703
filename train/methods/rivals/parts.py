"""What the rivals share: which leaves they update, and how an update ends."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.methods.leaves import block_matrices, decayed
from train.methods.options import OptimizerConfig

GROWTH = 1.01  # largest growth of a norm from one step to the next


def for_matrices(
  matrices: optax.GradientTransformation, others: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
  """One transformation for the block matrices, another for the other leaves."""

  def labels(params: Any) -> Any:
    named = {True: "matrices", False: "others"}
    return jax.tree.map(named.get, block_matrices(params))

  return optax.partition({"matrices": matrices, "others": others}, labels)


def finished(
  c: OptimizerConfig,
  lr: optax.Schedule,
  *parts: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Chains what makes an update with weight decay and the learning rate."""
  return optax.with_extra_args_support(
    optax.chain(
      *parts,
      optax.add_decayed_weights(c.weight_decay, decayed),
      optax.scale_by_learning_rate(lr),
    )
  )


def map_leaves(rule: Callable, updates: Any, *states: Any) -> tuple[Any, ...]:
  """As `jax.tree.map` with a rule that returns several values.

  Args:
    rule: From the leaves at one place to as many leaves.
    updates: A tree of gradients.
    *states: Trees with the same leaves or with subtrees in their places.

  Returns:
    As many trees.
  """
  leaves, treedef = jax.tree.flatten(updates)
  states = tuple(treedef.flatten_up_to(state) for state in states)
  rows = [rule(*row) for row in zip(leaves, *states, strict=True)]
  columns = zip(*rows, strict=True) if rows else [()] * (1 + len(states))
  return tuple(treedef.unflatten(column) for column in columns)


def limited(x: jax.Array, norm: jax.Array) -> tuple[jax.Array, jax.Array]:
  r"""Limits how much the norm of a matrix grows from step to step.

  .. math::

    \eta = \gamma / \max(\|X\| / \varphi, \gamma), \quad
    X \leftarrow \eta X, \quad \varphi \leftarrow \|\eta X\|

  Args:
    x: Matrices X (..., m, n).
    norm: Their norms φ (...) at the last step; at 0 nothing is limited.

  Returns:
    The limited matrices, and their norms.

  References:
    Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024, section 4.2.
  """
  new = jnp.linalg.norm(x, axis=(-2, -1))
  kept = jnp.where(norm > 0, jnp.minimum(new, GROWTH * norm), new)
  factor = jnp.where(new > 0, kept / jnp.where(new > 0, new, 1), 1)
  return x * factor[..., None, None], kept
