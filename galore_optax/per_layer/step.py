"""Updates weights layer by layer, inside the backward pass.

A usual step holds the gradients of all layers before it updates the first
weight. Here the backward pass goes through the layers from the last to the
first. As soon as the gradient of a layer is known, the layer's weights and
optimizer state are updated, so that at any time only one layer's gradient is in
memory.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks, quantized_params
from galore_optax import context as context_lib
from galore_optax.per_layer.model import Layered, check_layers
from galore_optax.projected import projecting
from galore_optax.quantization import qarray
from galore_optax.tree import paths, slices


class LayerwiseState(NamedTuple):
  """State of :func:`layerwise`.

  Attributes:
    count: Steps so far; also used as a seed of the rounding.
    first: The optimizer's state for the parameters that `first` reads, an
      :class:`EndState`.
    layers: Its state for the layers; every leaf has a leading layer axis.
    last: Its state for the parameters that only `last` reads, an
      :class:`EndState`.
  """

  count: Any  # shape=(), dtype=jnp.int32
  first: Any  # EndState
  layers: optax.OptState
  last: Any  # EndState


class EndState(NamedTuple):
  """State of the parameters at one end of the model.

  Attributes:
    whole: The optimizer's state for the leaves that are not updated in chunks.
    chunked: Path of a leaf that is updated in chunks to its state, of which
      every leaf has a leading axis that counts chunks.
  """

  whole: optax.OptState
  chunked: dict[str, optax.OptState]


class Layerwise(NamedTuple):
  """The two pure functions that :func:`layerwise` returns.

  Attributes:
    init: `params -> state`.
    step: `(params, state, batch) -> (params, state, metrics)`.
  """

  init: Callable
  step: Callable


def layerwise(
  tx: optax.GradientTransformation,
  model: Layered,
  *,
  dtype: Any = None,
  clip_norm: float | None = None,
  chunks: Mapping[str, int] | None = None,
  stochastic_rounding: bool = True,
  seed: int = 0,
  projected: bool = False,
) -> Layerwise:
  r"""A training step that updates each layer inside the backward pass.

  The forward pass stores the input of each layer. The backward pass recomputes
  one layer at a time from it, and updates the layer's weights and state in
  place before it goes on to the next. The results are those of a usual step,
  with the memory of one layer's gradients and activations. `tx` may be any
  optimizer that treats every leaf by itself, such as
  :func:`galore_optax.galore`, which also refreshes its bases there.

  An operation of `tx` on several leaves sees one layer, or one end of the
  model, at a time: `optax.clip_by_global_norm` clips each layer's gradient, and
  `optax.clip_by_block_rms` each matrix's. `clip_norm` clips exactly by the
  global norm of the whole gradient, with a second backward pass.

  A layer whose gradient is not finite is not updated, and neither is its state;
  with `clip_norm` no layer is then updated. If no matrix outside of the layers
  is projected, staggered refreshes come at the same steps as in a usual step,
  otherwise at other steps.

  For gradient accumulation give GaLore its `accumulation_steps`, and call
  `step` with one micro-batch after the other. (A layer that skips a micro-batch
  with a non-finite gradient is behind the others from then on; with `clip_norm`
  all skip it.) Masks in `tx` may be functions or trees in the parameters'
  structure.

  Args:
    tx: The optimizer.
    model: The model in three parts. Its layers must be stacked.
    dtype: Dtype in which quantized weights are read, None for float32.
    clip_norm: Largest global norm of the gradient; None for no clipping.
    chunks: Path of a leaf outside of the layers to the number of chunks of rows
      in which it is updated, one after the other. An embedding of 32,000 rows
      has as many elements as a whole layer; in chunks its update takes no more
      memory than a layer's. The optimizer sees each chunk as a leaf of that
      path, which gives the same result for elementwise ones such as Adam.
    stochastic_rounding: Whether quantized weights are rounded at random.
    seed: Seed of the rounding.
    projected: Whether gradients of projected weights in the layers are computed
      at rank r, without the full ones, see
      :func:`galore_optax.projected_value_and_grad`. Norms are then those of
      projected gradients.

  Returns:
    `init` and `step`, to be jitted; give `step` `donate_argnums=(0, 1)`. Its
    metrics are float32 scalars: `loss`, and `grad_norm` before clipping, which
    is not finite if any part of the gradient was not.

  Raises:
    TypeError: If `tx` is not a gradient transformation.
    ValueError: If `clip_norm` is not positive. `init` raises it, too, if the
      parameters have no layers.

  Example:
    >>> from galore_optax import galore
    >>> toy = Layered(
    ...   first=lambda params, batch: batch @ params["inner"],
    ...   layer=lambda w, x: x + jnp.tanh(x @ w),
    ...   last=lambda params, x, batch: jnp.mean((x @ params["outer"]) ** 2),
    ... )
    >>> params = {
    ...   "inner": jnp.ones((8, 16)),
    ...   "layers": jnp.ones((3, 16, 16)) / 64,
    ...   "outer": jnp.ones((16, 1)),
    ... }
    >>> init, step = layerwise(galore(optax.adam(0.1), rank=4), toy)
    >>> state = init(params)
    >>> new, state, metrics = jax.jit(step)(params, state, jnp.ones((2, 8)))
    >>> new["layers"].shape, int(state.count)
    ((3, 16, 16), 1)

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, section
    4.3; Lv et al., `Full Parameter Fine-tuning for Large Language Models with
    Limited Resources <https://arxiv.org/abs/2306.09782>`_, 2023.
  """
  if not isinstance(tx, optax.GradientTransformation):
    raise TypeError(f"`tx` must be a gradient transformation, got {tx!r}.")
  checks.check_positive("clip_norm", clip_norm)
  run = _Run(
    optax.with_extra_args_support(tx),
    model,
    functools.partial(quantized_params.dequantize_params, dtype=dtype),
    clip_norm,
    dict(chunks or {}),
    seed if stochastic_rounding else None,
    dtype,
    projected,
  )
  return Layerwise(run.init, run.step)


class _Run(NamedTuple):
  """The settings of :func:`layerwise`, with `init` and `step` as methods."""

  tx: optax.GradientTransformationExtraArgs
  model: Layered
  read: Callable
  clip_norm: float | None
  chunks: Mapping[str, int]
  seed: int | None
  dtype: Any
  projected: bool

  def init(self, params: Any) -> LayerwiseState:
    """The initial state. Jitted, it makes no full-size copies of weights."""
    check_layers(self.model, params)
    arrays = self.read(params)
    init_part = lambda part: self.tx.init(_only(arrays, part))
    lower, upper = self._end_leaves(arrays)
    _check_chunks(self.chunks, {**lower, **upper}, params)

    def init_end(end: Mapping[str, Any]) -> EndState:
      # An end may well have no matrix that is projected; the layers have.
      with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "galore projects none")
        return init_leaves(end)

    def init_leaves(end: Mapping[str, Any]) -> EndState:
      chunked = {p: x for p, x in end.items() if p in self.chunks}
      return EndState(
        init_part({p: x for p, x in end.items() if p not in chunked}),
        {
          p: jax.vmap(lambda x, p=p: init_part({p: x}))(self._in_chunks(p, x))
          for p, x in chunked.items()
        },
      )

    init_layer = lambda layer: init_part(self._layer_leaves(layer))
    return LayerwiseState(
      count=jnp.zeros([], jnp.int32),
      first=init_end(lower),
      layers=_with_distinct_keys(jax.vmap(init_layer)(arrays[self.model.key])),
      last=init_end(upper),
    )

  def step(
    self, params: Any, state: LayerwiseState, batch: Any
  ) -> tuple[Any, LayerwiseState, dict[str, jax.Array]]:
    """One training step."""
    check_layers(self.model, params)
    forward = self._forward(params, batch)
    scale = self._clip_scale(params, state, forward)
    return self._backward(params, state, forward, scale)

  def _forward(self, params: Any, batch: Any) -> "_Forward":
    """Runs the forward pass; keeps what the backward pass needs."""
    model = self.model
    ends = self.read(model.ends(params))
    x, first_vjp = jax.vjp(
      lambda lower: model.first(lower, batch), model.lower(ends)
    )
    x, inputs = jax.lax.scan(
      lambda x, layer: (model.layer(self.read(layer), x), x),
      x,
      params[model.key],
    )

    def last(upper: Any, x: Any) -> tuple[jax.Array, Any]:
      result = model.last(upper, x, batch)
      return result if model.has_aux else (result, None)

    loss, last_vjp, aux = jax.vjp(last, model.upper(ends), x, has_aux=True)
    return _Forward(loss, aux, inputs, first_vjp, last_vjp)

  def _layer_gradient(
    self, params: Any, opt: Any, layer: tuple[Any, Any], x: Any, dx: Any
  ) -> tuple[dict[str, jax.Array], Any, Any]:
    """The gradients of one layer.

    Args:
      params: All parameters, of the layers only this one.
      opt: The layer's optimizer state.
      layer: Number of the layer, and number of layers.
      x: Its input.
      dx: Gradient of its output.

    Returns:
      Path to gradient, for the layer's leaves; the gradient of its input; and
      the optimizer state, with bases that fit the gradients.
    """
    key = self.model.key
    if not self.projected:
      _, vjp = jax.vjp(self.model.layer, self.read(params[key]), x)
      grads, dx = vjp(dx)
      return self._layer_leaves(grads), dx, opt
    here = projecting.prepare(
      self.tx,
      _only(params, self._layer_leaves(params[key])),
      opt,
      context_lib.UpdateContext(layer=layer[0], layers=layer[1]),
      dtype=self.dtype,
    )
    call, _ = here.trace(lambda part, x: self.model.layer(part[key], x), x)
    _, vjp = jax.vjp(call, here.rest, here.slots, x)
    rest, found, dx = vjp(dx)
    return here.gradients(rest, found), dx, here.refreshed(found)

  def _clip_scale(
    self, params: Any, state: LayerwiseState, forward: "_Forward"
  ) -> Any:
    """The factor by which global-norm clipping scales the gradients."""
    if self.clip_norm is None:
      return None
    ends, dx = forward.last_gradient()
    layers = params[self.model.key]
    count = _count(layers)

    def body(j: jax.Array, carry: tuple) -> tuple:
      dx, total = carry
      i = count - 1 - j
      x = slices.take_layer(forward.inputs, i)
      layer, opt = slices.take_layer((layers, state.layers), i)
      grads, dx, _ = self._layer_gradient(
        {**params, self.model.key: layer}, opt, _numbers(i, count), x, dx
      )
      return dx, total + _squares(grads)

    dx, total = jax.lax.fori_loop(0, count, body, (dx, jnp.float32(0)))
    norm = jnp.sqrt(total + _squares(forward.whole_gradient(ends, dx)))
    # A non-finite entry makes the whole gradient non-finite. Then nothing is
    # updated, as in a usual step.
    scale = jnp.minimum(1.0, self.clip_norm / norm)
    return jnp.where(jnp.isfinite(norm), scale, jnp.nan)

  def _backward(
    self,
    params: Any,
    state: LayerwiseState,
    forward: "_Forward",
    scale: Any,
  ) -> tuple[Any, LayerwiseState, dict[str, jax.Array]]:
    """Runs the backward pass, and updates each part of the model in it."""
    key, layers = self.model.key, params[self.model.key]
    count, keys = _count(layers), self._keys(state.count)
    ends, dx = forward.last_gradient()
    _, upper = self._end_leaves(ends)
    params, last = self._update_end(params, upper, state.last, scale, keys[0])

    def body(j: jax.Array, carry: tuple) -> tuple:
      dx, total, stack, states = carry
      i = count - 1 - j
      layer, opt = _read_barrier(slices.take_layer((stack, states), i))
      part = {**params, key: layer}
      grads, dx, refreshed = self._layer_gradient(
        part,
        opt,
        _numbers(i, count),
        slices.take_layer(forward.inputs, i),
        dx,
      )
      new, opt = self._update(
        part, grads, opt, scale, keys[1], (i, count), refreshed
      )
      stack, states = slices.put_layer((stack, states), (new[key], opt), i)
      return dx, total + _squares(grads), stack, states

    dx, total, stack, states = jax.lax.fori_loop(
      0, count, body, (dx, _squares(upper), layers, state.layers)
    )
    grads = forward.whole_gradient(ends, dx)
    lower, _ = self._end_leaves(grads)
    params, first = self._update_end(params, lower, state.first, scale, keys[2])
    norm = jnp.sqrt(total + _squares(lower))
    metrics = {"loss": forward.loss.astype(jnp.float32), "grad_norm": norm}
    if self.model.has_aux:
      metrics["aux"] = forward.aux
    return (
      {**params, key: stack},
      LayerwiseState(optax.safe_increment(state.count), first, states, last),
      metrics,
    )

  def _update_end(
    self,
    params: Any,
    grads: Mapping[str, jax.Array],
    state: EndState,
    scale: Any,
    key: jax.Array | None,
  ) -> tuple[Any, EndState]:
    """Updates one end; returns all parameters, and the end's new state."""
    whole = {p: g for p, g in grads.items() if p not in state.chunked}
    params, new = self._update(params, whole, state.whole, scale, key)
    chunked = {}
    for path, states in state.chunked.items():
      params, chunked[path] = self._update_chunks(
        params, path, grads[path], states, scale, key
      )
    return params, EndState(new, chunked)

  def _update_chunks(
    self,
    params: Any,
    path: str,
    grad: jax.Array,
    states: optax.OptState,
    scale: Any,
    key: jax.Array | None,
  ) -> tuple[Any, optax.OptState]:
    """Updates one leaf in chunks; returns all parameters, and its state."""
    old = paths.leaves_by_path(params)[path]
    grad = self._in_chunks(path, grad)
    replace = lambda x: paths.map_with_path(
      lambda p, y: x if p == path else y, params
    )

    def body(i: jax.Array, carry: tuple) -> tuple:
      leaf, states = carry
      part, state = _read_barrier(slices.take_layer((leaf, states), i))
      chunk_key = None if key is None else jax.random.fold_in(key, i)
      tree, state = self._update(
        replace(part), {path: grad[i]}, state, scale, chunk_key
      )
      part = paths.leaves_by_path(tree)[path]
      return slices.put_layer((leaf, states), (part, state), i)

    leaf, states = jax.lax.fori_loop(
      0, self.chunks[path], body, (self._in_chunks(path, old), states)
    )
    return replace(leaf.reshape(old.shape)), states

  def _in_chunks(self, path: str, x: jax.Array) -> jax.Array:
    """A leaf with a leading axis that counts its chunks of rows."""
    return x.reshape(self.chunks[path], -1, *x.shape[1:])

  def _update(
    self,
    params: Any,
    grads: Mapping[str, jax.Array],
    state: optax.OptState,
    scale: Any,
    key: jax.Array | None,
    layer: tuple[Any, Any] = (0, 1),
    refreshed: Any = None,
  ) -> tuple[Any, optax.OptState]:
    """Updates some leaves; returns all parameters and the leaves' state.

    Args:
      params: All parameters. Of the layers only one may be there.
      grads: Path to gradient, of the leaves to update.
      state: The optimizer's state for these leaves.
      scale: Factor on the gradients, or None.
      key: Random key of the rounding, or None.
      layer: Number of the layer that is updated, and number of layers.
      refreshed: The state with bases that fit projected gradients; None for
        `state`.
    """
    if scale is not None:
      grads = {p: (g * scale).astype(g.dtype) for p, g in grads.items()}
    layer = _numbers(*layer)
    leaves = paths.leaves_by_path(params)
    part = {p: leaves[p] for p in grads}
    finite, old = jnp.isfinite(_squares(grads)), state
    updates, state = context_lib.update_with(
      self.tx,
      context_lib.UpdateContext(layer=layer[0], layers=layer[1]),
      _only(params, grads),
      old if refreshed is None else refreshed,
      _only(params, self.read(part)),
    )
    by_path = paths.leaves_by_path(updates)
    key = None if key is None else jax.random.fold_in(key, layer[0])
    new: Any = quantized_params.apply_updates(
      part, {p: by_path[p] for p in part}, key
    )
    new, state = jax.tree.map(
      lambda x, y: jnp.where(finite, x, y), (new, state), (part, old)
    )
    return paths.map_with_path(lambda p, x: new.get(p, x), params), state

  def _layer_leaves(self, layer: Any) -> dict[str, Any]:
    """A layer's leaves by the paths of its stack in the parameters."""
    return paths.leaves_by_path({self.model.key: layer})

  def _end_leaves(self, tree: Mapping[str, Any]) -> tuple[dict, dict]:
    """Leaves of the ends, by path: those that `first` gets, and the others."""
    ends = self.model.ends(tree)
    keys = ends if self.model.first_keys is None else self.model.first_keys
    lower = {k: v for k, v in ends.items() if k in keys}
    upper = {k: v for k, v in ends.items() if k not in keys}
    return paths.leaves_by_path(lower), paths.leaves_by_path(upper)

  def _keys(self, count: jax.Array) -> Any:
    """Random keys of a step: for the last end, the layers and the first end."""
    if self.seed is None:
      return (None, None, None)
    step = jax.random.fold_in(jax.random.key(self.seed), count)
    return jax.random.split(step, 3)


class _Forward(NamedTuple):
  """What the backward pass needs from the forward pass."""

  loss: jax.Array
  aux: Any  # the auxiliary value of `last`
  inputs: Any  # inputs of the layers, with a leading layer axis
  first_vjp: Callable
  last_vjp: Callable

  def last_gradient(self) -> tuple[dict, Any]:
    """Gradients, through `last`, of the ends and of the last layer's output."""
    return self.last_vjp(jnp.ones_like(self.loss))

  def whole_gradient(self, ends: dict, dx: Any) -> dict:
    """Gradients of the ends, through `last` and through `first`.

    Args:
      ends: Gradients through `last`.
      dx: Gradient of the first layer's input.
    """
    (lower,) = self.first_vjp(dx)
    both = {
      k: jax.tree.map(jnp.add, lower[k], ends[k]) for k in ends if k in lower
    }
    return {**ends, **lower, **both}


def _only(tree: Any, part: Mapping[str, Any]) -> Any:
  """A tree with the leaves of a part, and masked everywhere else."""
  return paths.map_with_path(
    lambda path, _: part.get(path, optax.MaskedNode()), tree
  )


def _numbers(layer: Any, layers: Any) -> tuple[jax.Array, jax.Array]:
  """Number of a layer, and number of layers, as int32."""
  return jnp.int32(layer), jnp.int32(layers)


def _count(layers: Any) -> int:
  return jax.tree.leaves(layers)[0].shape[0]


def _with_distinct_keys(tree: Any) -> Any:
  """A stack of states in which each layer has its own random keys.

  `vmap` of `init` gives all layers the same key.
  """

  def fold_in(x: Any) -> Any:
    if not slices.is_key(x):
      return x
    numbers = jnp.arange(len(x), dtype=jnp.uint32)
    fold = lambda keys, i: jax.vmap(
      functools.partial(jax.random.fold_in, data=i)
    )(keys.reshape(-1)).reshape(keys.shape)
    return jax.vmap(fold)(x, numbers)

  return jax.tree.map(fold_in, tree)


def _read_barrier(tree: Any) -> Any:
  """Keeps the TPU compiler from copying a stack to read a slice of it.

  It would otherwise move the read after a write to the same stack, which takes
  a copy of the stack.
  """
  return jax.lax.platform_dependent(
    tree, tpu=jax.lax.optimization_barrier, default=lambda tree: tree
  )


def _squares(tree: Any) -> jax.Array:
  """Sum of the squares of all entries of a tree, float32."""
  return sum(
    (jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)),
    start=jnp.float32(0),
  )


def _check_chunks(
  chunks: Mapping[str, int], ends: Mapping[str, Any], params: Any
) -> None:
  """Raises unless each chunked leaf is an array whose rows divide evenly."""
  leaves = paths.leaves_by_path(params)
  for path, count in chunks.items():
    if path not in ends:
      raise ValueError(
        f"`chunks` names {path!r}, which is not a leaf outside of the layers; "
        f"those are {', '.join(ends)}."
      )
    if qarray.is_quantized(leaves[path]):
      raise ValueError(
        f"`chunks` divides {path!r}, which is quantized: its blocks may lie "
        "across rows. Take it out of `chunks`, or do not quantize it."
      )
    shape = jnp.shape(ends[path])
    if count < 1 or not shape or shape[0] % count:
      raise ValueError(
        f"`chunks` divides {path!r} of shape {shape} into {count} chunks; give "
        "a divisor of its number of rows."
      )
