"""An optimizer's GaLores at one step, and the weights that they project.

It runs a function of parameters with projected weights in place of arrays.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax.context import UpdateContext
from galore_optax.projected import probe, rewrite
from galore_optax.projected.gradient import Found
from galore_optax.projected.weight import Form, Weight
from galore_optax.quantization import blocks, carried, qarray
from galore_optax.quantized_params import dequantize_params
from galore_optax.tree import paths, plan, sharding


@dataclasses.dataclass(frozen=True)
class Projecting:
  """How the gradients of parameters are projected at one step.

  Attributes:
    params: The parameters, read as arrays.
    state: The optimizer's state.
    galores: The GaLores in the optimizer.
    weights: Path to weight, for the leaves whose gradient is projected.
    axis_name: Mesh axes over whose devices the caller sums gradients.
  """

  params: Any
  state: Any
  galores: Sequence[probe.Described]
  weights: Mapping[str, Weight]
  axis_name: Any = None

  @property
  def rest(self) -> dict[str, jax.Array]:
    """Path to array, for all other leaves."""
    leaves = paths.leaves_by_path(self.params)
    return {p: x for p, x in leaves.items() if p not in self.weights}

  @property
  def slots(self) -> dict[str, Found]:
    """Path to slot, for the projected leaves."""
    return {path: x.slot for path, x in self.weights.items()}  # type: ignore

  def trace(self, f: Callable, *args: Any) -> tuple[Callable, Any]:
    """A function of parameters, as one of arrays and slots.

    Args:
      f: From parameters and further arguments to a tree of arrays.
      *args: The further arguments, of which only the types are used.

    Returns:
      A function of path to array, path to slot, and the further arguments, that
      returns what `f` does; and the shapes of that.

    Raises:
      ValueError: If devices would refresh the bases each from their own
        gradient.
    """
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(self.params, *args)
    types = [*jax.tree.leaves((self.params, args)), *closed.consts]
    _check_devices(types, closed.out_avals, self.axis_name)
    names = list(paths.leaves_by_path(self.params))

    def call(rest: Mapping, slots: Mapping, *args: Any) -> Any:
      values: dict[str, Any] = dict(rest)
      for path, weight in self.weights.items():
        values[path] = dataclasses.replace(weight, slot=slots[path])
      inputs = [*(values[name] for name in names), *jax.tree.leaves(args)]
      results = rewrite.run(closed, inputs)
      return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return call, shapes

  def gradients(
    self, rest: Mapping[str, jax.Array], found: Mapping[str, Found]
  ) -> dict[str, jax.Array]:
    """Path to gradient: projected, or as `rest` has it."""
    return {**rest, **{path: x.low for path, x in found.items()}}

  def refreshed(self, found: Mapping[str, Found], is_taken: Any = True) -> Any:
    """The optimizer's state with the bases that a backward pass found.

    Args:
      found: Path to what it found.
      is_taken: Whether the step is taken, bool scalar; the state stays as it
        is if not.
    """
    new: dict[int | None, Any] = {
      id(galore.step): galore.refreshed(
        {path: found[path] for path in galore.sites if path in found}, is_taken
      )
      for galore in self.galores
    }
    return jax.tree.map(
      lambda x: new.get(_identity(x), x),
      self.state,
      is_leaf=lambda x: _identity(x) in new,
    )


def prepare(
  tx: optax.GradientTransformationExtraArgs,
  params: Any,
  state: Any,
  context: UpdateContext = UpdateContext(),  # noqa: B008
  active: Any = None,
  dtype: Any = None,
  axis_name: Any = None,
) -> Projecting:
  """Finds what of a step's gradients is projected, and how.

  Args:
    tx: The optimizer.
    params: The parameters; some may be quantized.
    state: The optimizer's state.
    context: The circumstances of the update that follows.
    active: Whether bases may be refreshed, bool scalar; None for True.
    dtype: Dtype in which quantized weights are read; None for float32.
    axis_name: Mesh axes over whose devices the caller sums gradients.

  Raises:
    ValueError: If there is no GaLore, or one that needs whole gradients, or an
      optimizer around it conceals its state.
  """
  arrays = dequantize_params(params, dtype)
  # Nothing is computed from the zeros, and a compiler removes them.
  zeros = jax.tree.map(jnp.zeros_like, arrays)
  galores = probe.describe(tx, zeros, state, arrays, context, active)
  _check_found(galores, state)
  leaves = paths.leaves_by_path(params)
  weights: dict[str, Weight] = {}
  for galore in galores:
    weights |= _weights(galore, leaves, dtype)
  weights = {k: x.with_form(axis_name=axis_name) for k, x in weights.items()}
  return Projecting(arrays, state, galores, weights, axis_name)


def _identity(x: Any) -> int | None:
  """Identifies a GaLore's state by the array that counts its steps."""
  is_state = hasattr(x, "step") and hasattr(x, "projector")
  return id(x.step) if is_state else None


def _check_found(galores: list[probe.Described], state: Any) -> None:
  """Raises if there is no GaLore, or if its state is not to be found."""
  if not galores:
    raise ValueError(
      "`tx` has no `galore(...)` that gradients of rank r could be given to: "
      "either there is none, or an optimizer around it does not hand extra "
      "arguments on, such as `optax.MultiSteps`. (To accumulate gradients give "
      "`galore` its `accumulation_steps`.) Use jax.value_and_grad instead."
    )
  is_state = lambda x: _identity(x) is not None
  nodes = jax.tree.leaves(state, is_leaf=is_state)
  states = [_identity(x) for x in nodes]
  if any(id(galore.step) not in states for galore in galores):
    raise ValueError(
      "An optimizer around `galore(...)` runs it within a condition, as "
      "`optax.MultiSteps` does, where its bases cannot be refreshed. To "
      "accumulate gradients give `galore` its `accumulation_steps`."
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
    # Gradients of tensors are formed: they are no products of two matrices.
    and not site.is_tensor
  }


def _weight(
  galore: probe.Described, site: plan.Site, leaf: Any, dtype: Any
) -> Weight:
  """One leaf with all that its gradient is projected with."""
  view, bases = site.matrix, galore.bases[site.path]
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
    _slot(site, bases, leaf, form),
    form,
  )
  return sharding.vary_together(weight)


def _stored_dtype(bases: Mapping[str, Any]) -> Any:
  """The dtype of bases; bfloat16 for codes, which hold no more digits."""
  dtypes = {
    jnp.bfloat16 if qarray.is_quantized(x) else x.dtype for x in bases.values()
  }
  return jnp.result_type(*dtypes)


def _slot(
  site: plan.Site, bases: Mapping[str, Any], leaf: Any, form: Form
) -> Found:
  """Zeros for what a backward pass finds, sharded as the state is."""
  like = leaf.codes if qarray.is_quantized(leaf) else leaf
  zeros = lambda shape, dtype, spec: sharding.shard_divisible_like(
    jnp.zeros(shape, dtype), like, spec
  )

  def of_side(side: str) -> Any:
    spec = functools.partial(site.basis_spec, side)
    q = bases[side]
    if not carried.fits(q):
      return zeros(site.basis_shape(side), form.basis_dtype, spec)

    def of_codes(parts: tuple) -> tuple:
      *stack, rows, _ = spec(parts)
      return (*stack, None, rows)

    def of_scales(parts: tuple) -> tuple:
      return blocks.scale_spec(of_codes(parts), q.shape)

    x = jax.eval_shape(carried.pack, q)
    return carried.Carried(
      zeros(x.pairs.shape, x.pairs.dtype, of_codes),
      zeros(x.scale.shape, x.scale.dtype, of_scales),
      zeros(x.zero.shape, x.zero.dtype, of_scales),
    )

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


def _check_devices(
  arrays: Sequence[Any], results: Sequence[Any], axis_name: Any
) -> None:
  """Raises where nothing says over which devices the gradient is summed."""
  axes = jax.sharding.get_abstract_mesh().manual_axes
  types = [*map(jax.typeof, arrays), *results]
  varies = any(x.manual_axis_type.varying for x in types)
  if axis_name is not None and varies:
    raise ValueError(
      f"With axis_name={axis_name!r} gradients are those of each device, for "
      "`jax.shard_map` with check_vma=False. With check_vma=True they are "
      "summed already; leave `axis_name` out."
    )
  if axis_name is None and axes and not varies:
    raise ValueError(
      f"Within the mesh axes {axes}, each device would refresh the bases from "
      "its own gradient, and they would differ. `jax.shard_map` with "
      "check_vma=True knows what the devices share, and sums over them; "
      "`jax.pmap` and check_vma=False do not. Name the axes there with "
      "`axis_name`, and sum the gradients over them yourself."
    )
