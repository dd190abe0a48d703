"""`projected_value_and_grad`: gradients of rank r, and refreshed bases."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax._galore import GaLoreState
from galore_optax.projected import probe, rewrite
from galore_optax.projected.gradient import Found
from galore_optax.projected.weight import Form, Weight
from galore_optax.quantization import qarray
from galore_optax.quantized_params import dequantize_params
from galore_optax.tree import paths, plan, sharding


def projected_value_and_grad(
  loss_fn: Callable,
  tx: optax.GradientTransformation,
  *,
  has_aux: bool = False,
  dtype: Any = None,
) -> Callable:
  r"""Like `jax.value_and_grad`, but gradients of projected weights have rank r.

  GaLore uses of a gradient :math:`G = X^\top \delta Y` only its projection,

  .. math::

    R = P^\top G = (X P)^\top \delta Y,

  so that G need not be computed, kept or summed over devices. The loss function
  is traced. Where it multiplies by a projected weight, the backward pass
  computes R as on the right. Any other use of a weight is right as well; G then
  exists for as long as that use takes (one layer's, in a loop over layers).

  Bases that are due are refreshed in the same backward pass, from this
  gradient, as `tx.update` does. The new bases, with the moments carried into
  them, are in the state that is returned::

    value_and_grad = projected_value_and_grad(loss_fn, tx)
    loss, grads, state = value_and_grad(params, state, batch)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)

  That is the usual step to rounding errors. What is before GaLore in `tx` sees
  projected gradients: :func:`optax.clip_by_global_norm` clips by their norm,
  which is the smaller one.

  Args:
    loss_fn: From parameters and any further arguments to a scalar, or to a
      scalar and an auxiliary value if `has_aux`.
    tx: The optimizer: :func:`galore_optax.galore` or anything around it that
      hands extra arguments on, such as `optax.chain` or
      `optax.inject_hyperparams`.
    has_aux: Whether `loss_fn` returns an auxiliary value, too.
    dtype: Dtype in which quantized weights are read; None for float32.

  Returns:
    A function of `(params, state, *args, **kwargs)`. It returns the value (with
    the auxiliary value, `(value, aux)`, if `has_aux`), the gradients and the
    state. The gradients have the structure of the parameters. That of a
    projected leaf (..., m, n) has the shape (..., r, n), (..., m, r) or
    (..., r, r), and the dtype of the parameter. Weights may be a
    :class:`galore_optax.QArray`, which is read one layer at a time; gradients
    of other ones are those of the array.

  Raises:
    ValueError: When it is called, if `tx` has no GaLore in it, or one that
      needs the whole gradient: with `residual`, with `finder="svd"`, in
      :func:`galore_optax.gum`; or if an optimizer around it conceals its state.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from galore_optax import galore, projected_value_and_grad
    >>> params = {"w": jnp.ones((64, 256))}
    >>> tx = galore(optax.adam(1e-2), rank=8)
    >>> loss_fn = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    >>> value_and_grad = projected_value_and_grad(loss_fn, tx)
    >>> state, x = tx.init(params), jnp.ones((4, 64))
    >>> loss, grads, state = jax.jit(value_and_grad)(params, state, x)
    >>> grads["w"].shape
    (8, 256)
    >>> updates, state = jax.jit(tx.update)(grads, state, params)
    >>> updates["w"].shape
    (64, 256)
  """
  run = deferred(loss_fn, tx, has_aux=has_aux, dtype=dtype)

  def value_and_grad(
    params: optax.Params, state: optax.OptState, *args: Any, **kwargs: Any
  ) -> tuple[Any, Any, optax.OptState]:
    value, grads, refreshed = run(params, state, None, *args, **kwargs)
    return value, grads, refreshed()

  return value_and_grad


def deferred(
  loss_fn: Callable,
  tx: optax.GradientTransformation,
  *,
  has_aux: bool = False,
  dtype: Any = None,
) -> Callable:
  """As :func:`projected_value_and_grad`, but the state is refreshed later.

  A step that may be skipped refreshes the state within its condition, so that
  there are no two states at once. A step in several parts refreshes bases in
  its first part.

  Args:
    loss_fn: As for :func:`projected_value_and_grad`.
    tx: As for :func:`projected_value_and_grad`.
    has_aux: As for :func:`projected_value_and_grad`.
    dtype: As for :func:`projected_value_and_grad`.

  Returns:
    A function of `(params, state, active, *args, **kwargs)`, where `active`
    says whether bases may be refreshed (None for yes). In place of the state it
    returns a function without arguments that gives it.
  """
  if not isinstance(tx, optax.GradientTransformation):
    raise TypeError(f"`tx` must be a gradient transformation, got {tx!r}.")
  tx = optax.with_extra_args_support(tx)

  def value_and_grad(
    params: optax.Params,
    state: optax.OptState,
    active: Any,
    *args: Any,
    **kwargs: Any,
  ) -> tuple[Any, Any, Callable[[], optax.OptState]]:
    arrays = dequantize_params(params, dtype)
    galores = _describe(tx, arrays, state, active)
    weights: dict[str, Weight] = {}
    for galore in galores:
      weights |= _weights(galore, paths.leaves_by_path(params), dtype)
    rest = {
      path: x
      for path, x in paths.leaves_by_path(arrays).items()
      if path not in weights
    }
    call = _with_weights(lambda p: loss_fn(p, *args, **kwargs), arrays, has_aux)
    (value, aux), (grads, found) = jax.value_and_grad(
      lambda x: call(x[0], weights, x[1]), has_aux=True
    )((rest, {path: x.slot for path, x in weights.items()}))
    grads |= {path: x.low for path, x in found.items()}
    return (
      (value, aux) if has_aux else value,
      paths.map_with_path(lambda path, _: grads[path], params),
      lambda: _with_refreshed(state, galores, found),
    )

  return value_and_grad


def _describe(
  tx: optax.GradientTransformationExtraArgs,
  params: Any,
  state: Any,
  active: Any,
) -> list[probe.Described]:
  """Every GaLore in an optimizer; raises if there is none, or it is hidden."""
  # Nothing is computed from the zeros, and a compiler removes them.
  zeros = jax.tree.map(jnp.zeros_like, params)
  galores = probe.describe(tx, zeros, state, params, active)
  if not galores:
    raise ValueError(
      "`tx` has no `galore(...)` that gradients of rank r could be given to: "
      "either there is none, or an optimizer around it does not hand extra "
      "arguments on, such as `optax.MultiSteps`. (To accumulate gradients give "
      "`galore` its `accumulation_steps`.) Use jax.value_and_grad instead."
    )
  states = [id(x.step) for x in _states(state)]
  if any(id(galore.step) not in states for galore in galores):
    raise ValueError(
      "An optimizer around `galore(...)` runs it within a condition, as "
      "`optax.MultiSteps` does, where its bases cannot be refreshed. To "
      "accumulate gradients give `galore` its `accumulation_steps`."
    )
  return galores


def _states(state: Any) -> list[GaLoreState]:
  is_galore = lambda x: isinstance(x, GaLoreState)
  return [x for x in jax.tree.leaves(state, is_leaf=is_galore) if is_galore(x)]


def _with_refreshed(
  state: Any, galores: list[probe.Described], found: Mapping[str, Found]
) -> Any:
  """The optimizer's state with refreshed GaLore states in it."""
  new = {
    id(galore.step): galore.refreshed(
      {path: found[path] for path in galore.sites if path in found}
    )
    for galore in galores
  }
  is_galore = lambda x: isinstance(x, GaLoreState)
  return jax.tree.map(
    lambda x: new.get(id(x.step), x) if is_galore(x) else x,
    state,
    is_leaf=is_galore,
  )


def _weights(
  galore: probe.Described, leaves: Mapping[str, Any], dtype: Any
) -> dict[str, Weight]:
  """Path to weight, for the leaves whose gradient is projected."""
  return {
    path: _weight(galore, site, leaves[path], dtype)
    for path, site in galore.sites.items()
    # Otherwise the shape would not tell whether a gradient is projected.
    if site.low_shape != site.view.shape
  }


def _weight(
  galore: probe.Described, site: plan.Site, leaf: Any, dtype: Any
) -> Weight:
  """One leaf with all that its gradient is projected with."""
  view, bases = site.view, galore.bases[site.path]
  if qarray.is_quantized(leaf):
    gradient_dtype = jnp.dtype(dtype or jnp.float32)
  else:
    gradient_dtype = leaf.dtype
  basis_dtype = jnp.promote_types(gradient_dtype, _stored_dtype(bases))
  form = Form(
    batch=view.batch,
    rows=view.rows,
    cols=view.cols,
    axes=tuple(range(len(view.shape))),
    dtype=gradient_dtype,
    gradient_dtype=gradient_dtype,
    basis_dtype=basis_dtype,
    iterations=None if _is_traced(galore.iterations) else galore.iterations,
  )
  weight = Weight(
    leaf,
    bases,
    galore.due[site.path],
    galore.iterations if form.iterations is None else None,
    _slot(site, leaf, form),
    form,
  )
  return sharding.vary_together(weight)


def _stored_dtype(bases: Mapping[str, Any]) -> Any:
  """The dtype of bases; bfloat16 for codes, which hold no more digits."""
  dtypes = {
    jnp.bfloat16 if qarray.is_quantized(x) else x.dtype for x in bases.values()
  }
  return jnp.result_type(*dtypes)


def _slot(site: plan.Site, leaf: Any, form: Form) -> Found:
  """Zeros for what a backward pass finds, sharded as the state is."""
  like = leaf.codes if qarray.is_quantized(leaf) else leaf
  zeros = lambda shape, dtype, spec: sharding.shard_divisible_like(
    jnp.zeros(shape, dtype), like, spec
  )

  def of_side(side: str) -> jax.Array:
    keep = -2 if side == "left" else -1

    def spec(parts: tuple) -> tuple:
      parts = site.view.spec(parts)
      return (*parts[:-2], parts[keep], None)

    return zeros(site.basis_shape(side), form.basis_dtype, spec)

  return Found(
    zeros(site.low_shape, form.gradient_dtype, site.view.spec),
    {side: of_side(side) for side in site.sides},
    zeros(
      (*site.view.stack, 1, 1),
      jnp.float32,
      lambda parts: (*site.view.spec(parts)[:-2], None, None),
    ),
  )


def _is_traced(x: Any) -> bool:
  return isinstance(x, jax.core.Tracer)


def _with_weights(f: Callable, params: Any, has_aux: bool) -> Callable:
  """A function of parameters, as one of arrays and projected weights.

  Args:
    f: From parameters to a scalar, or to a scalar and an auxiliary value.
    params: Parameters, of which only structure and types are used.
    has_aux: Whether there is an auxiliary value.

  Returns:
    A function of path to array, path to weight, and path to slot; together
    the paths are those of the parameters. It returns the scalar and the
    auxiliary value, or None.
  """
  closed, shapes = jax.make_jaxpr(f, return_shape=True)(params)
  _check_result(shapes, has_aux)
  _check_devices([*jax.tree.leaves(params), *closed.consts], closed.out_avals)
  names = list(paths.leaves_by_path(params))

  def call(
    arrays: Mapping[str, jax.Array],
    weights: Mapping[str, Weight],
    slots: Mapping[str, Found],
  ) -> tuple[jax.Array, Any]:
    values: dict[str, Any] = dict(arrays)
    for path, weight in weights.items():
      values[path] = dataclasses.replace(weight, slot=slots[path])
    results = rewrite.run(closed, [values[name] for name in names])
    result = jax.tree.unflatten(jax.tree.structure(shapes), results)
    return result if has_aux else (result, None)

  return call


def _check_devices(arrays: Sequence[Any], results: Sequence[Any]) -> None:
  """Raises where nothing says over which devices the gradient is summed."""
  axes = jax.sharding.get_abstract_mesh().manual_axes
  types = [*map(jax.typeof, arrays), *results]
  if axes and not any(x.manual_axis_type.varying for x in types):
    raise ValueError(
      f"Within the mesh axes {axes}, each device would refresh the bases from "
      "its own gradient, and they would differ. `jax.shard_map` with "
      "check_vma=True knows what the devices share, and sums over them; "
      "`jax.pmap` and check_vma=False do not. Use jax.value_and_grad there."
    )


def _check_result(shapes: Any, has_aux: bool) -> None:
  """Raises unless a loss function returned a scalar, or one with a value."""
  value = shapes
  if has_aux:
    if not isinstance(shapes, tuple) or len(shapes) != 2:
      raise TypeError(
        "With has_aux=True `loss_fn` must return a pair, the loss and an "
        f"auxiliary value, got {shapes!r}."
      )
    value = shapes[0]
  if jax.tree.structure(value) != jax.tree.structure(0) or value.shape != ():
    raise TypeError(
      f"`loss_fn` must return a scalar{' first' if has_aux else ''}, got "
      f"{value!r}. If it returns an auxiliary value too, pass has_aux=True."
    )
