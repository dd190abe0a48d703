"""Optimizer state in host memory, of which a device holds one layer at a time.

Nothing here decides where the state lives: it stays where the caller has put
it. What is in host memory is copied to the device before it is used, and its
new value is copied back.
"""

from typing import Any

import jax

from galore_optax.per_layer.step import EndState, LayerwiseState
from galore_optax.tree import slices

HOST = "pinned_host"


def host_shardings(state: Any, shardings: Any) -> Any:
  """Shardings that put a layer-by-layer state into host memory.

  :func:`galore_optax.layerwise` copies the state of one layer at a time to the
  device, and its new value back. So the device holds the weights, one layer's
  state and one layer's gradient. What counts steps, and the state of the leaves
  outside of the layers that are not updated in chunks, stays on the device.

  Args:
    state: A state of :func:`galore_optax.layerwise`, or its shapes.
    shardings: A tree of `jax.sharding.Sharding` in the structure of `state`,
      such as that of :func:`galore_optax.state_shardings`.

  Returns:
    The same tree, with the memory kind `pinned_host` at the matrices of the
    layers and of the chunks. Vectors, and matrices smaller than a tile of a
    TPU's memory, stay on the device.

  Raises:
    TypeError: If `state` is none of :func:`galore_optax.layerwise`.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from galore_optax import Layered, galore, host_shardings, layerwise
    >>> toy = Layered(
    ...   first=lambda params, batch: batch,
    ...   layer=lambda w, x: x + jnp.tanh(x @ w),
    ...   last=lambda params, x, batch: jnp.mean(x**2),
    ... )
    >>> params = {"layers": jnp.ones((3, 16, 16)) / 64}
    >>> init, step = layerwise(galore(optax.adam(0.1), rank=8), toy)
    >>> here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    >>> state = init(params)
    >>> where = host_shardings(state, jax.tree.map(lambda x: here, state))
    >>> where.layers.projector["layers"]["left"].memory_kind
    'pinned_host'

    The state is put there once, and the step returns it there:

    >>> state = jax.device_put(state, where)
    >>> step = jax.jit(step, out_shardings=(here, where, here))
  """
  if not isinstance(state, LayerwiseState):
    raise TypeError(
      "`state` must be a state of `layerwise`, whose step reads one layer at a "
      f"time; got {type(state).__name__}."
    )

  def move(states: Any, shardings: Any) -> Any:
    return jax.tree.map(
      lambda x, where: where.with_memory_kind(HOST) if _is_large(x) else where,
      states,
      shardings,
    )

  def move_end(end: EndState, where: EndState) -> EndState:
    return EndState(where.whole, move(end.chunked, where.chunked))

  return LayerwiseState(
    count=shardings.count,
    first=move_end(state.first, shardings.first),
    layers=move(state.layers, shardings.layers),
    last=move_end(state.last, shardings.last),
  )


def _is_large(x: Any) -> bool:
  if x.ndim < 3 or slices.is_key(x):
    return False
  # A TPU moves tiles with 32 bytes of each column. Of what is smaller, a tile
  # holds several layers, and they cannot be moved one by one.
  return min(x.shape[-2:]) * x.dtype.itemsize >= 32
