"""`projected_value_and_grad`: gradients of rank r, and refreshed bases."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from galore_optax.projected import projecting
from galore_optax.tree import paths


def projected_value_and_grad(
  loss_fn: Callable,
  tx: optax.GradientTransformation,
  *,
  has_aux: bool = False,
  dtype: Any = None,
  axis_name: Any = None,
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
    axis_name: Name, or tuple of names, of the mesh axes that divide the batch
      in `jax.shard_map` with `check_vma=False` or in `jax.pmap`. Gradients are
      then each device's own, and the caller sums or averages them over these
      axes before `tx.update`. Bases are refreshed from the sum, and are the
      same on all devices.

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
  run = deferred_value_and_grad(
    loss_fn, tx, has_aux=has_aux, dtype=dtype, axis_name=axis_name
  )

  def value_and_grad(
    params: optax.Params, state: optax.OptState, *args: Any, **kwargs: Any
  ) -> tuple[Any, Any, optax.OptState]:
    value, grads, refreshed = run(params, state, None, *args, **kwargs)
    return value, grads, refreshed()

  return value_and_grad


def deferred_value_and_grad(
  loss_fn: Callable,
  tx: optax.GradientTransformation,
  *,
  has_aux: bool = False,
  dtype: Any = None,
  axis_name: Any = None,
) -> Callable:
  """As :func:`projected_value_and_grad`, for steps that may be skipped.

  In place of the refreshed state it returns a function that makes it. A step
  that is skipped unless its gradient is finite calls that function where it has
  decided: with False the state stays as it is, to the bit. So a skipped step
  can select that state in place, where the old state would need memory of its
  own. A step on several parts of a batch lets the first part alone refresh
  bases, so that the projected gradients of all parts can be added up.

  Args:
    loss_fn: As for :func:`projected_value_and_grad`.
    tx: As for :func:`projected_value_and_grad`.
    has_aux: As for :func:`projected_value_and_grad`.
    dtype: As for :func:`projected_value_and_grad`.
    axis_name: As for :func:`projected_value_and_grad`.

  Returns:
    A function of `(params, state, active, *args, **kwargs)`, where `active` is
    a bool scalar that says whether bases may be refreshed, or None for yes. It
    returns the value, the gradients and a function that returns the state. Its
    argument is whether the step is taken, bool scalar, True if it is left out.

  Raises:
    ValueError: As :func:`projected_value_and_grad`.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from galore_optax import deferred_value_and_grad, galore
    >>> params = {"w": jnp.ones((64, 256))}
    >>> tx = galore(optax.adam(1e-2), rank=8)
    >>> loss_fn = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    >>> value_and_grad = deferred_value_and_grad(loss_fn, tx)
    >>> @jax.jit
    ... def step(params, state, x):
    ...   loss, grads, refreshed = value_and_grad(params, state, None, x)
    ...   finite = jnp.isfinite(loss)
    ...   state = refreshed(finite)
    ...   updates, new_state = tx.update(grads, state, params)
    ...   new = optax.apply_updates(params, updates), new_state
    ...   select = lambda new, old: jnp.where(finite, new, old)
    ...   return jax.tree.map(select, new, (params, state))
    >>> state = tx.init(params)
    >>> _, skipped = step(params, state, jnp.full((4, 64), jnp.nan))
    >>> _, taken = step(params, state, jnp.ones((4, 64)))
    >>> int(skipped.step), int(taken.step)
    (0, 1)
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
  ) -> tuple[Any, Any, Callable[..., optax.OptState]]:
    here = projecting.prepare(
      tx, params, state, active=active, dtype=dtype, axis_name=axis_name
    )
    call, shapes = here.trace(lambda p: loss_fn(p, *args, **kwargs))
    _check_result(shapes, has_aux)

    def differentiable(arrays: tuple) -> tuple[jax.Array, Any]:
      result = call(*arrays)
      return result if has_aux else (result, None)

    (value, aux), (rest, found) = jax.value_and_grad(
      differentiable, has_aux=True
    )((here.rest, here.slots))
    grads = here.gradients(rest, found)
    return (
      (value, aux) if has_aux else value,
      paths.map_with_path(lambda path, _: grads[path], here.params),
      lambda is_taken=True: here.refreshed(found, is_taken),
    )

  return value_and_grad


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
