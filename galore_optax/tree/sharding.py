"""Shardings of the optimizer's state, which follow the parameters'."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.quantization import blocks, qarray
from galore_optax.tree import boxes, paths


def shard_like(
  x: jax.Array, like: Any, spec: Callable[[tuple], tuple]
) -> jax.Array:
  """Shards a new array over the mesh of a parameter.

  Args:
    x: The new array.
    like: The parameter: an array, a traced one, or a `jax.ShapeDtypeStruct`.
    spec: From the parameter's partition to the array's.

  Returns:
    The array, sharded if the parameter's sharding is known here.
  """
  sharding = _known_sharding(like)
  if sharding is None:
    return x
  target = jax.NamedSharding(sharding.mesh, jax.P(*spec(tuple(sharding.spec))))
  if isinstance(like, jax.core.Tracer):
    return jax.sharding.reshard(x, target)
  return jax.device_put(x, target)


def shard_quantized_like(
  q: qarray.QArray, like: Any, spec: Callable[[tuple], tuple]
) -> qarray.QArray:
  """As :func:`shard_like`, for codes and their scales.

  Args:
    q: The new quantized array.
    like: The parameter.
    spec: From the parameter's partition to the array's.

  Returns:
    The quantized array, sharded if the parameter's sharding is known here.
  """

  def scales(parts: tuple) -> tuple:
    return blocks.scale_spec(spec(parts), q.shape)

  zero = q.zero
  return dataclasses.replace(
    q,
    codes=shard_like(q.codes, like, spec),
    scale=shard_divisible_like(q.scale, like, scales),
    zero=None if zero is None else shard_divisible_like(zero, like, scales),
  )


def shard_divisible_like(
  x: jax.Array, like: Any, spec: Callable[[tuple], tuple]
) -> jax.Array:
  """As :func:`shard_like`, but an axis the mesh does not divide stays whole."""
  sharding = _known_sharding(like)
  if sharding is None:
    return x
  return shard_like(
    x, like, lambda parts: _divisible(sharding.mesh, spec(parts), x.shape)
  )


def _divisible(mesh: Any, spec: tuple, shape: tuple[int, ...]) -> tuple:
  """A partition in which axes that the mesh does not divide are whole."""
  sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))

  def shards(names: Any) -> int:
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(sizes[name] for name in names)

  return tuple(
    axis if size % shards(axis) == 0 else None
    for axis, size in zip(spec, shape, strict=False)
  )


def _known_sharding(like: Any) -> jax.NamedSharding | None:
  """The sharding of an array, if it is known and shards any axis.

  Of a traced array only the Explicit axes of its mesh are known.
  """
  if isinstance(like, jax.core.Tracer):
    sharding = jax.typeof(like).sharding
  else:
    sharding = getattr(like, "sharding", None)
  if not isinstance(sharding, jax.NamedSharding) or sharding.mesh.empty:
    return None
  return sharding if any(sharding.spec) else None


def with_auto_axes(update: Callable) -> Callable:
  """Makes an update function work on a mesh with Explicit axes.

  Inside, the compiler partitions the operations, as on a mesh with Auto axes.
  Outside, each update is sharded like its gradient, or like its parameter if
  the gradient is projected, and the new state like the old one.

  Args:
    update: The update function of a gradient transformation.

  Returns:
    A function of the same arguments.
  """

  def wrapped(updates, state, params=None, **extra_args):
    if not is_explicit(updates):
      return update(updates, state, params, **extra_args)
    arrays = {k: v for k, v in extra_args.items() if _is_arrays(v)}
    others = {k: v for k, v in extra_args.items() if k not in arrays}
    run: Callable = jax.sharding.auto_axes(
      lambda g, s, p, kwargs: update(g, s, p, **kwargs, **others),
      out_sharding=jax.tree.map(
        lambda x: jax.typeof(x).sharding, (_full(updates, params), state)
      ),
    )
    return run(updates, state, params, arrays)

  return wrapped


def _full(updates: Any, params: Any) -> Any:
  """The gradients, with the parameter in place of a projected gradient."""
  if params is None:
    return updates
  return jax.tree.map(
    lambda g, x: g if g.shape == x.shape else x, updates, params
  )


def vary_together(tree: Any) -> Any:
  """Makes all arrays vary over the same axes of `shard_map`.

  A loop's carry and the branches of a conditional must have fixed types, and
  inside of `shard_map` a type says over which mesh axes an array varies.

  Args:
    tree: Pytree of arrays.

  Returns:
    The same arrays, each varying over all axes that any of them varies over.
  """
  axes_of = lambda x: jax.typeof(x).manual_axis_type.varying
  union = frozenset().union(*map(axes_of, jax.tree.leaves(tree)))

  def vary(x: jax.Array) -> jax.Array:
    missing = tuple(sorted(union - axes_of(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(vary, tree) if union else tree


def run_auto(f: Callable, like: Any, *args: Any) -> Any:
  """Calls a function with Auto axes, whatever the axes of its arguments.

  Args:
    f: A function whose operations are not written for Explicit axes.
    like: Arrays in the structure of its result, sharded as the result shall be.
    *args: Its arguments, pytrees of arrays.

  Returns:
    `f(*args)`.
  """
  if not is_explicit((like, args)):
    return f(*args)
  out = jax.tree.map(lambda x: jax.typeof(x).sharding, like)
  run: Callable = jax.sharding.auto_axes(f, out_sharding=out)
  return run(*args)


def is_explicit(tree: Any) -> bool:
  """Whether any array of a tree is on a mesh with Explicit axes."""
  return any(
    kind == jax.sharding.AxisType.Explicit
    for x in jax.tree.leaves(tree)
    for kind in jax.typeof(x).sharding.mesh.axis_types
  )


def _is_arrays(tree: Any) -> bool:
  return all(isinstance(x, jax.Array) for x in jax.tree.leaves(tree))


def partitions(param_shardings: Any) -> dict[str, tuple]:
  """Path to partition of each parameter.

  Args:
    param_shardings: `jax.NamedSharding` for each parameter, or None.

  Returns:
    Path to one entry an axis: names of mesh axes, or None where the axis is
    whole on every device. Empty if `param_shardings` is None.
  """
  if param_shardings is None:
    return {}
  _common_mesh(param_shardings)
  leaves = paths.leaves_by_path(param_shardings)
  return {path: _without_trivial_axes(x) for path, x in leaves.items()}


def _without_trivial_axes(sharding: jax.NamedSharding) -> tuple:
  """A partition without the mesh axes of size one, which divide nothing."""
  sizes = sharding.mesh.shape
  entries = [x if isinstance(x, tuple) else (x,) for x in sharding.spec]
  axes = [
    tuple(axis for axis in entry if sizes.get(axis, 1) > 1) for entry in entries
  ]
  return tuple(entry or None for entry in axes)


def on_mesh(x: Any) -> bool:
  """Whether the compiler divides work on an array among several devices.

  In the body of `jax.shard_map` each device works for itself on its part. This
  is also known of a traced array, unless nothing but the `in_shardings` of
  `jax.jit` gives it its sharding.
  """
  mesh = jax.typeof(x).sharding.mesh
  manual = jax.sharding.AxisType.Manual
  axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
  return math.prod(size for size, kind in axes if kind != manual) > 1


def quantized_shardings(params: Any, param_shardings: Any) -> Any:
  """Shardings for parameters of which some are quantized.

  Codes are sharded like the weights they stand for. Scales are, too, except
  that an axis that the mesh does not divide stays whole.

  Args:
    params: Parameters with :class:`galore_optax.QArray` leaves, or their
      `jax.ShapeDtypeStruct`.
    param_shardings: `jax.NamedSharding` for each weight.

  Returns:
    `jax.NamedSharding` for each array, in the structure of `params`.
  """

  def shard(x: Any, sharding: jax.NamedSharding) -> Any:
    if not qarray.is_quantized(x):
      return sharding
    spec = blocks.scale_spec(tuple(sharding.spec), x.shape)
    spec = _divisible(sharding.mesh, spec, x.scale.shape)
    scales = jax.NamedSharding(sharding.mesh, jax.P(*spec))
    zero = None if x.zero is None else scales
    scale = shard(x.scale, scales)  # which may be quantized itself
    return dataclasses.replace(x, codes=sharding, scale=scale, zero=zero)

  return jax.tree.map(
    shard, params, param_shardings, is_leaf=qarray.is_quantized
  )


def _common_mesh(shardings: Any) -> Any:
  """The one mesh of all shardings."""
  leaves = jax.tree.leaves(shardings)
  meshes = {x.mesh for x in leaves if isinstance(x, jax.NamedSharding)}
  named = all(isinstance(x, jax.NamedSharding) for x in leaves)
  if not named or len(meshes) != 1:
    raise ValueError(
      "`param_shardings` must hold one jax.NamedSharding for each parameter, "
      f"all on one mesh, got {shardings!r}."
    )
  return meshes.pop()


def state_shardings(tx: Any, params: Any, param_shardings: Any) -> Any:
  """Shardings for an optimizer's state that follow the parameters'.

  Moments are sharded like their parameters. Those of rank r have r in place of
  the projected side, and its mesh axes if they divide r. A basis is sharded
  along the side it spans. Both are sharded along the axes that stack layers.

  Args:
    tx: Any optimizer, with or without GaLore anywhere in it, or what
      :func:`galore_optax.layerwise` returns.
    params: Parameters, or their `jax.ShapeDtypeStruct`. Where they are
      quantized, `tx` is given the weights that they stand for.
    param_shardings: `jax.NamedSharding` for each parameter; for a quantized one
      that of the weight, or one for each of its arrays.

  Returns:
    `jax.NamedSharding` for each leaf of `tx.init(params)`, to be given to
    `jax.jit(tx.init, out_shardings=...)` or to a checkpoint.

  Raises:
    ValueError: If `param_shardings` are not one `jax.NamedSharding` for each
      parameter, all on one mesh.

  Example:
    >>> import optax
    >>> from galore_optax import galore, state_shardings
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> params = {"w": jax.ShapeDtypeStruct((64, 256), "float32")}
    >>> shardings = {"w": jax.NamedSharding(mesh, jax.P(None, "data"))}
    >>> tx = galore(optax.adam(1e-3), rank=8)
    >>> state = state_shardings(tx, params, shardings)
    >>> optax.tree.get(state, "mu").low["w"].spec
    P(None, 'data')
  """
  mesh = _common_mesh(param_shardings)
  param_shardings = boxes.put_in_boxes(param_shardings, params)
  # With Explicit axes, shardings are part of the types: the types of what the
  # optimizer's `init` returns say how it shards its state.
  explicit = jax.sharding.AbstractMesh(
    mesh.axis_sizes,
    mesh.axis_names,
    axis_types=(jax.sharding.AxisType.Explicit,) * len(mesh.axis_names),
  )

  def typed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    dtype = jnp.float32 if qarray.is_quantized(x) else x.dtype
    spec = (sharding.codes if qarray.is_quantized(sharding) else sharding).spec
    return jax.ShapeDtypeStruct(
      x.shape, dtype, sharding=jax.NamedSharding(explicit, spec)
    )

  like = jax.tree.map(
    typed, params, param_shardings, is_leaf=qarray.is_quantized
  )
  with jax.sharding.use_abstract_mesh(explicit):
    state = jax.eval_shape(tx.init, like)
  return jax.tree.map(
    lambda x: jax.NamedSharding(
      mesh, x.sharding.spec if x.sharding is not None else jax.P()
    ),
    state,
  )
