"""Describes a model as a stack of equal layers between two ends."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_optax import quantized_params
from galore_optax.quantization import qarray
from galore_optax.tree import paths


class Layered(NamedTuple):
  """A model as a stack of equal layers between two ends, by pure functions.

  Attributes:
    first: `(params, batch) -> x`, the input of the first layer; any pytree.
    layer: `(layer_params, x) -> x`, one layer.
    last: `(params, x, batch) -> loss`, a scalar, or `(loss, aux)` if `has_aux`.
    key: Entry of the parameters, a dict, that holds the parameters of the
      layers. They are stacked: every leaf has a leading layer axis. `first` and
      `last` get the parameters without this entry.
    first_keys: The other entries of the parameters that `first` gets; None for
      all. Entries it does not get are updated before the layers, which frees
      the memory of their gradients early.
    last_keys: The other entries that `last` gets; None for all. Entries it does
      not get have no gradient until all layers are done.
    has_aux: Whether `last` returns an auxiliary value with the loss. It is then
      in the metrics of a step as `aux`.

  Example:
    >>> toy = Layered(
    ...   first=lambda params, batch: batch @ params["inner"],
    ...   layer=lambda w, x: x + jnp.tanh(x @ w),
    ...   last=lambda params, x, batch: jnp.mean((x @ params["outer"]) ** 2),
    ... )
    >>> toy.key
    'layers'
  """

  first: Callable
  layer: Callable
  last: Callable
  key: str = "layers"
  first_keys: tuple[str, ...] | None = None
  last_keys: tuple[str, ...] | None = None
  has_aux: bool = False

  def loss(self, params: Any, batch: Any, dtype: Any = None) -> Any:
    """The loss as one differentiable function, for a usual step.

    Args:
      params: Parameters with stacked layers, or with a list of single layers.
        Gradients have the same structure. From a list, a compiler may update
        each layer as soon as its gradient is known.
      batch: The batch that `first` and `last` take.
      dtype: Dtype in which quantized weights are read.

    Returns:
      The value of `last`.
    """
    read: Any = functools.partial(
      quantized_params.dequantize_params, dtype=dtype
    )
    ends, layers = self.ends(params), params[self.key]
    x = self.first(self.lower(read(ends)), batch)
    if _is_list_of_layers(layers):
      for layer in layers:
        x = self.layer(read(layer), x)
    else:
      x, _ = jax.lax.scan(
        lambda x, layer: (self.layer(read(layer), x), None), x, layers
      )
    return self.last(self.upper(read(ends)), x, batch)

  def ends(self, params: Any) -> dict:
    """The parameters outside of the layers."""
    return {k: v for k, v in params.items() if k != self.key}

  def lower(self, ends: Mapping[str, Any]) -> dict:
    """The parameters outside of the layers that `first` gets."""
    keys = ends if self.first_keys is None else self.first_keys
    return {k: ends[k] for k in keys}

  def upper(self, ends: Mapping[str, Any]) -> dict:
    """The parameters outside of the layers that `last` gets."""
    keys = ends if self.last_keys is None else self.last_keys
    return {k: ends[k] for k in keys}


def unstack(params: Any, key: str = "layers") -> Any:
  """Splits stacked layers into a list of single layers.

  Args:
    params: A dict whose entry `key` has a leading layer axis on every leaf.
    key: Name of the entry.

  Returns:
    The dict, with a list of trees as that entry.

  Example:
    >>> len(unstack({"layers": {"w": jnp.ones((3, 4, 4))}})["layers"])
    3
  """
  layers = params[key]
  count = jax.tree.leaves(layers)[0].shape[0]
  take = lambda i: jax.tree.map(lambda x: x[i], layers)
  return {**params, key: [take(i) for i in range(count)]}


def stack(params: Any, key: str = "layers") -> Any:
  """Undoes :func:`unstack`.

  Args:
    params: A dict whose entry `key` is a list of equal trees.
    key: Name of the entry.

  Returns:
    The dict, with one tree as that entry that has a leading layer axis on every
    leaf.
  """
  layers = jax.tree.map(lambda *x: jnp.stack(x), *params[key])
  return {**params, key: layers}


def _check_keys(model: Layered, params: Mapping[str, Any]) -> None:
  """Raises unless `first_keys` and `last_keys` fit the parameters."""
  ends = [k for k in params if k != model.key]
  for name in ("first_keys", "last_keys"):
    for key in getattr(model, name) or ():
      if key not in ends:
        raise ValueError(
          f"`{name}` names {key!r}, which is not an entry of the parameters "
          f"outside of the layers; those are {', '.join(map(repr, ends))}."
        )
  if model.first_keys is not None and model.last_keys is not None:
    unused = [k for k in ends if k not in (*model.first_keys, *model.last_keys)]
    if unused:
      raise ValueError(
        f"The entry {unused[0]!r} of the parameters is in neither `first_keys` "
        "nor `last_keys`; name it in the one whose function reads it."
      )


def _is_list_of_layers(layers: Any) -> bool:
  """Whether this is a list of equal layers, as :func:`unstack` makes.

  A tuple is not: it is a stack whose layers have several parts.
  """
  if not isinstance(layers, list):
    return False
  shapes = lambda layer: tuple(map(jnp.shape, jax.tree.leaves(layer)))
  kinds = {(jax.tree.structure(layer), shapes(layer)) for layer in layers}
  return len(kinds) == 1


def check_layers(model: Layered, params: Any) -> None:
  """Raises unless the parameters are a dict with a stack of layers.

  Args:
    model: The model.
    params: Its parameters.
  """
  # The updates are plain dicts, and would not fit another kind of mapping.
  if type(params) is not dict or model.key not in params:
    raise ValueError(
      f"`params` must be a dict with the stacked layers at {model.key!r}, got "
      f"{list(params) if type(params) is dict else type(params)}."
    )
  _check_keys(model, params)
  leaves = paths.leaves_by_path(params[model.key])
  if not leaves:
    raise ValueError(f"`params[{model.key!r}]` has no leaves.")
  if _is_list_of_layers(params[model.key]):
    raise ValueError(
      f"`params[{model.key!r}]` is a list of single layers; stack them with "
      "`galore_optax.stack`. If they are the parts of one stack, make the list "
      "a tuple."
    )
  for path, x in leaves.items():
    if qarray.is_quantized(x) and x.ndim < 3:
      raise ValueError(
        f"The leaf {path!r} of `params[{model.key!r}]` is a quantized stack of "
        f"vectors, of shape {x.shape}, whose blocks may cross layers. Quantize "
        "matrices only."
      )
  counts = {path: jnp.shape(x)[:1] for path, x in leaves.items()}
  if len(set(counts.values())) != 1 or () in counts.values():
    raise ValueError(
      f"All leaves of `params[{model.key!r}]` must have the same leading layer "
      f"axis, got {counts}."
    )
