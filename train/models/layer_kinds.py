"""How the layers of a model differ: in their rotations and their windows.

The layers are one stack, which one traced layer walks. What differs is an array
with a number for each layer, and what is the same in all is a constant.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.config.schema import ModelConfig


class LayerKind(NamedTuple):
  """How a layer differs from others; for all layers (L,), for one ()."""

  rotates: Any  # bool: whether queries and keys are rotated
  windowed: Any  # bool: whether it has the sliding window


def stacked(config: ModelConfig) -> LayerKind | None:
  """The kinds of all layers; None if they are all alike."""
  windowed, still = config.layers_with_window, config.layers_without_rope
  count = config.n_layers
  if not still and len(windowed) in (0, count):
    return None
  numbers = np.arange(count)
  return LayerKind(~np.isin(numbers, still), np.isin(numbers, windowed))


def one(config: ModelConfig, number: Any) -> LayerKind | None:
  """The kind of one layer, whose number may be traced."""
  found = stacked(config)
  if found is None:
    return None
  return LayerKind(*(jnp.asarray(x)[number] for x in found))


def window(
  config: ModelConfig, length: int, kind: LayerKind | None
) -> int | jax.Array | None:
  """Positions that a position attends to, with itself; None: all before it.

  Args:
    config: of the model.
    length: of a row.
    kind: of the layer, if layers differ.

  Returns:
    An array where the layer decides.
  """
  size = config.sliding_window
  if not 0 < size < length:
    return None
  if len(config.layers_with_window) == config.n_layers:
    return size
  assert kind is not None
  return jnp.where(kind.windowed, size, length)
