"""Bytes of the gradients that a method is given."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import galore_optax as go
from train.architectures import loop, optimizers, tables
from train.architectures.catalog import Entry


@functools.cache  # each method is compared with the first one
def size(entry: Entry, method: str) -> int:
  """Bytes of one step's gradients.

  GaLore's are counted at rank r, as `projected_value_and_grad` returns them.
  That is without the residual, which needs whole gradients.

  Args:
    entry: The architecture.
    method: One of `optimizers.METHODS`.
  """
  config = entry.module().Config()
  rates = loop.Rates(method, tables.RATES.start, tables.MULTIPLIERS.start)
  trainer = loop.build(entry, config, rates)
  params = jax.eval_shape(lambda: trainer.params(trainer.start(0)))
  if not method.startswith("galore"):
    return go.state_bytes(params)
  options = loop.options(entry, config)._replace(residual=None)
  tx = optimizers.METHODS[method](*rates[1:], options)
  grads_of = go.projected_value_and_grad(_total, tx)
  state = jax.eval_shape(tx.init, params)
  return go.state_bytes(jax.eval_shape(grads_of, params, state)[1])


def _total(params: Any) -> jax.Array:
  """A loss that uses every leaf: only the shapes of its gradients count."""
  return sum((jnp.sum(x) for x in jax.tree.leaves(params)), jnp.zeros(()))
