"""GaLore: an inner optimizer that runs in the gradients' dominant subspaces."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from galore_optax import _chain, checks, old_spellings
from galore_optax import context as context_lib
from galore_optax.inner import extra_args, separate, storage
from galore_optax.projected import probe as probe_lib
from galore_optax.quantization import bfloat16
from galore_optax.residual import methods as residual_lib
from galore_optax.subspace import (
  adaptive,
  initial,
  moments,
  projection,
  refresh_settings,
)
from galore_optax.subspace import refresh as refresh_lib
from galore_optax.subspace.refresh_settings import Refresh
from galore_optax.tree import (
  boxes,
  paths,
  sequential,
  sharding,
  slices,
  split,
)
from galore_optax.tree import plan as plan_lib
from galore_optax.tree import rules as rules_lib

PARAMS_MODES = ("split", "project")
BASIS_CODES = initial.CODES


class GaLoreState(NamedTuple):
  """State of :func:`galore`.

  The field names are those of version 0.1, so that its checkpoints restore:
  `projector` holds the bases, `recovery` what is kept for residuals.

  Attributes:
    step: Updates so far.
    projector: Path of a projected leaf to side (`left`, `right`; of a tensor
      `axis0`, `axis1`, ...) to basis; a leaf at full rank has no entry. A
      basis in 4 or 8 bits is a :class:`galore_optax.QArray` of its transpose, a
      random one its seed.
    inner_state: The inner optimizer's state. Each tree in it that has the
      parameters' structure, such as Adam's `mu`, is stored as a
      :class:`galore_optax.tree.split.Split`.
    schedule: Path of a projected leaf to its
      :class:`galore_optax.subspace.adaptive.State`; None unless the refresh
      policy is `adaptive`.
    accumulator: Mean of the projected gradients since the last step, a
      :class:`galore_optax.tree.split.Split`; None unless
      `accumulation_steps` > 1.
    micro_step: Number of gradients in `accumulator`, or None.
    recovery: Path of a projected leaf to what is kept for its residual: a
      :class:`galore_optax.residual.normalized.State`, or for Fira and APOLLO
      the norm of each matrix's last residual, 0 before the first step. None
      unless `residual` is given.
  """

  step: Any  # shape=(), dtype=jnp.int32
  projector: Any  # (..., m, r) or (..., n, r), dtype=basis_dtype
  inner_state: optax.OptState
  schedule: Any = None
  accumulator: Any = None
  micro_step: Any = None  # shape=(), dtype=jnp.int32
  recovery: Any = None  # (...) or (..., n), dtype=jnp.float32

  @property
  def bases(self) -> Any:
    """The bases: another name of the field `projector`."""
    return self.projector


@dataclasses.dataclass(frozen=True)
class _Call:
  """The arguments of one call of `update`, and what is static about it."""

  sites: Mapping[str, plan_lib.Site]
  updates: optax.Updates
  grads: Mapping[str, jax.Array]  # of projected leaves, (..., m, n)
  low: Mapping[str, jax.Array]  # of leaves that come projected, (..., r, n)
  params: optax.Params | None
  context: context_lib.UpdateContext
  extra_args: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _GaLore:
  """The settings of one transformation, and its two functions."""

  inner: optax.GradientTransformationExtraArgs
  plan: plan_lib.Plan
  refresh: Refresh
  params_mode: str
  basis_dtype: Any
  state_dtype: Any
  seed: Any
  accumulation_steps: int
  residual: residual_lib.Settings | None

  def init(self, params: optax.Params) -> GaLoreState:
    """Initial bases for the parameters, and the inner state at rank r."""
    if split.is_placeholder(params):
      return self._skeleton(params)
    leaves = paths.leaves_by_path(params)
    sites = self.plan.sites(
      leaves, split.masked_paths(params), boxes.axis_names(params)
    )
    refresh_lib.check_gaps(self.refresh, sites)
    bases = {
      path: {
        side: self._initial_basis(site, side, leaves[path])
        for side in site.sides
      }
      for path, site in sites.items()
    }
    low, narrow = (
      self._low_params(params, sites, dtype)
      for dtype in (self._dtype, self._stored_dtype)
    )
    inner_state = storage.init(self.inner, low, narrow)
    checks.check_not_nested(inner_state, GaLoreState)
    stored = split.split_state(self.inner, inner_state, sites)
    inner_state = storage.widen(self.inner, inner_state, low)
    self._check_inner(params, low, inner_state, sites)
    norms = None
    if self.residual:
      norms = residual_lib.start(
        self.residual, self.inner, sites, leaves, low, inner_state
      )
    state = GaLoreState(
      step=jnp.zeros([], jnp.int32),
      projector=bases,
      inner_state=stored,
      schedule=self._initial_schedules(sites),
      recovery=norms,
    )
    if self.accumulation_steps == 1:
      return state
    empty = jax.tree.map(lambda x: _zeros_like(x), narrow)
    return state._replace(
      accumulator=split.split(empty, sites),
      micro_step=jnp.zeros([], jnp.int32),
    )

  def _skeleton(self, params: Any) -> GaLoreState:
    """The state for Optax's `tree.map_params`: no leaf is like a parameter."""
    accumulates = 0 if self.accumulation_steps > 1 else None
    return GaLoreState(
      step=0,
      projector=0,
      inner_state=split.placeholder_state(self.inner, params),
      schedule=0 if self.refresh.policy == "adaptive" else None,
      accumulator=accumulates,
      micro_step=accumulates,
      recovery=0 if self.residual else None,
    )

  def update(
    self,
    updates: optax.Updates,
    state: GaLoreState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, GaLoreState]:
    """Refreshes the bases that are due, projects, updates and lifts."""
    call = self._call(updates, state, params, extra_args)
    state = self._refresh(call, state, call.grads)
    bases = {
      path: projection.read(state.projector[path]) for path in call.sites
    }
    low = self._project(call, bases)
    if self.accumulation_steps == 1:
      return self._step(call, bases, low, state)
    return self._accumulate(call, bases, low, state)

  def _call(
    self,
    updates: optax.Updates,
    state: GaLoreState,
    params: optax.Params | None,
    extra_args: Mapping[str, Any],
  ) -> _Call:
    """Checks the arguments of `update` and finds the projected leaves."""
    leaves = paths.leaves_by_path(updates)
    paths.check_arrays(leaves, plan_lib.AT_ARRAYS)
    context, others = context_lib.split_off(extra_args)
    active = True if state.micro_step is None else state.micro_step == 0
    shapes = projection.basis_shapes(state.projector)
    # Gradients may come projected: only the parameters have the full shape.
    full = leaves if params is None else paths.leaves_by_path(params)
    sites = self.plan.sites_from_bases({**leaves, **full}, shapes)
    low = {p: leaves[p] for p in sites if _is_low(sites[p], leaves.get(p))}
    _check_like(leaves, params, low)
    if low:
      self._check_projected(next(iter(low)), context)
    return _Call(
      sites=sites,
      updates=updates,
      grads={
        p: s.view.as_stack(leaves[p]) for p, s in sites.items() if p not in low
      },
      low=low,
      params=params,
      context=context._replace(step=state.step, active=active),
      extra_args=others,
    )

  def _check_projected(
    self, path: str, context: context_lib.UpdateContext
  ) -> None:
    """Raises where a projected gradient is not enough."""
    reason = self._needs_all(context)
    if reason is not None:
      raise ValueError(
        f"The gradient of the leaf {path!r} is projected, but {reason}, which "
        "needs the whole gradient. Take it with jax.value_and_grad, or give "
        "`galore` another setting there."
      )

  def _needs_all(self, context: context_lib.UpdateContext) -> str | None:
    """What of the settings needs whole gradients; None if nothing does."""
    if self.residual:
      return (
        f"residual={self.residual.method!r} (instead of None) adds what the "
        "bases leave out"
      )
    if self.refresh.finder != "subspace":
      return (
        f"bases are found by finder={self.refresh.finder!r} (instead of "
        "'subspace')"
      )
    if self.refresh.random_from is not None:
      return "bases are drawn at random (`random_from`)"
    if context.weights is not None or context.basis_grads is not None:
      return "the optimizer around GaLore (`gum` or `ldadam`) uses more of it"
    return None

  def describe(
    self,
    updates: optax.Updates,
    state: GaLoreState,
    params: optax.Params | None,
    extra_args: Mapping[str, Any],
  ) -> probe_lib.Described:
    """What a backward pass needs for projecting gradients, at this step."""
    call = self._call(updates, state, params, extra_args)
    if call.context.probe.active is not None:
      active = call.context.active & call.context.probe.active
      context = call.context._replace(active=active)
      call = dataclasses.replace(call, context=context)
    reason = self._needs_all(call.context)
    if reason is not None:
      raise ValueError(
        f"Gradients of rank r are not enough here: {reason}, which needs the "
        "whole gradient. Take it with jax.value_and_grad, or give `galore` "
        "another setting there."
      )

    def refreshed(found: Mapping[str, Any]) -> GaLoreState:
      bases = {
        path: refresh_lib.Found(x.bases, x.valid) for path, x in found.items()
      }
      return self._refresh(call, state, bases)

    return probe_lib.Described(
      state.step,
      call.sites,
      state.projector,
      refresh_lib.due_by_leaf(
        self.refresh, call.sites, call.context, state.schedule or {}
      ),
      self.refresh.iterations,
      refreshed,
    )

  def _refresh(
    self, call: _Call, state: GaLoreState, grads: Mapping[str, Any]
  ) -> GaLoreState:
    """The state with the bases that are due found, and moments carried over.

    Args:
      call: The call.
      state: The state.
      grads: As for :func:`galore_optax.subspace.refresh.refresh`.
    """
    bases, schedules, inner_state = refresh_lib.refresh(
      self.refresh,
      self.seed,
      call.sites,
      call.context,
      {**grads, **(call.context.basis_grads or {})},
      state.projector,
      state.schedule or {},
      state.inner_state,
      self._bias_ratios(call, state),
    )
    return state._replace(
      projector=bases,
      inner_state=inner_state,
      schedule=state.schedule and schedules,
    )

  def _bias_ratios(
    self, call: _Call, state: GaLoreState
  ) -> dict[str, jax.Array]:
    """The bias corrections that LDAdam's rotation of second moments needs."""
    if self.refresh.moments != "ldadam":
      return {}
    inner_state = split.merge_state(self.inner, state.inner_state)
    return moments.bias_ratios(
      self.inner, inner_state, call.updates, call.params, call.extra_args
    )

  def _project(
    self, call: _Call, bases: Mapping[str, projection.Bases]
  ) -> optax.Updates:
    """The gradients for the inner optimizer, those of projected leaves R."""
    weights = call.context.weights or {}

    def project(path: str, basis: projection.Bases) -> jax.Array:
      is_low = path in call.low
      low = _by_matrix(
        call.sites[path],
        self._without_noise if is_low else self._project_matrices,
        call.low[path] if is_low else call.grads[path],
        basis,
      )
      return low * weights[path] if path in weights else low

    low = sequential.one_after_another(project, bases)
    return paths.map_with_path(
      lambda path, g: low[path] if path in low else _finite(self._cast(g)),
      call.updates,
    )

  def _project_matrices(
    self, g: jax.Array, bases: projection.Bases
  ) -> jax.Array:
    """The projected gradient as the inner optimizer sees it."""
    low = projection.project(g, bases)
    return self._without_noise(low, bases, g.dtype)

  def _without_noise(
    self, low: jax.Array, bases: projection.Bases, dtype: Any = None
  ) -> jax.Array:
    """R without directions of noise; 0 where the gradient is not finite.

    Args:
      low: Projected gradients R.
      bases: The bases they were made with.
      dtype: Dtype of the gradient; None for that of R.
    """
    tolerance: Any = self.refresh.null_tolerance
    wide = low.astype(jnp.promote_types(low.dtype, jnp.float32))
    wide = projection.drop_null(wide, bases, tolerance)
    return _finite(wide.astype(self._dtype(dtype or low.dtype)))

  def _step(
    self,
    call: _Call,
    bases: Mapping[str, projection.Bases],
    low: optax.Updates,
    state: GaLoreState,
  ) -> tuple[optax.Updates, GaLoreState]:
    """The inner optimizer's step on projected gradients, lifted."""
    inner_state = split.merge_state(self.inner, state.inner_state)
    inner_state = storage.widen(self.inner, inner_state, low)
    param_terms = self._param_terms(
      call.sites, inner_state, call.params, call.extra_args
    )
    inner_params = self._inner_params(call, bases)
    inner_updates, new_inner_state = self.inner.update(
      low, inner_state, inner_params, **call.extra_args
    )
    new = paths.leaves_by_path(inner_updates)
    lifted, norms = self._lift(
      call, bases, low, new, inner_state, inner_params, state.recovery
    )
    new |= lifted
    new |= {path: new[path] + term for path, term in param_terms.items()}
    updates = paths.map_with_path(
      lambda path, g: new[path].astype(jnp.result_type(g)), call.updates
    )
    stored = storage.narrow(
      split.split_state(self.inner, new_inner_state, call.sites),
      state.inner_state,
      paths.leaves_by_path(updates),
      bfloat16.step_key("moments", self.seed, state.step),
      call.context.layer,
    )
    return updates, state._replace(
      step=optax.safe_increment(state.step),
      inner_state=stored,
      recovery=norms,
    )

  def _lift(
    self,
    call: _Call,
    bases: Mapping[str, projection.Bases],
    low: optax.Updates,
    new: Mapping[str, jax.Array],
    inner_state: Any,
    inner_params: optax.Params | None,
    norms: Any,
  ) -> tuple[dict[str, jax.Array], Any]:
    """Projected leaves' updates at full size, and the norms of residuals."""
    if not self.residual:
      return _lift_leaves(call, bases, new), norms
    gains = residual_lib.gains(
      self.inner, low, inner_state, inner_params, call.sites, call.extra_args
    )
    return residual_lib.lift(
      self.residual,
      gains,
      call.sites,
      bases,
      paths.leaves_by_path(call.updates),
      paths.leaves_by_path(low),
      new,
      norms,
    )

  def _accumulate(
    self,
    call: _Call,
    bases: Mapping[str, projection.Bases],
    low: optax.Updates,
    state: GaLoreState,
  ) -> tuple[optax.Updates, GaLoreState]:
    """Adds projected gradients up; every k-th call steps with their mean.

    Projection is linear, so this is the projection of the mean gradient. All
    gradients of a step are projected on the same bases.
    """
    mean = jax.tree.map(
      lambda total, x: total + x / self.accumulation_steps,
      split.merge(state.accumulator),
      low,
    )
    is_last = state.micro_step == self.accumulation_steps - 1

    def finish(mean: Any) -> tuple[optax.Updates, GaLoreState]:
      new, after = self._step(call, bases, mean, state)
      empty = jax.tree.map(jnp.zeros_like, state.accumulator)
      return new, after._replace(
        accumulator=empty, micro_step=jnp.zeros_like(state.micro_step)
      )

    def wait(mean: Any) -> tuple[optax.Updates, GaLoreState]:
      stored = storage.round_tree(
        split.split(mean, call.sites),
        state.accumulator,
        bfloat16.step_key("sums", self.seed, state.step, state.micro_step),
        call.context.layer,
      )
      return _zero_updates(call), state._replace(
        accumulator=stored, micro_step=state.micro_step + 1
      )

    return jax.lax.cond(is_last, finish, wait, mean)

  def _param_terms(
    self,
    sites: Mapping[str, plan_lib.Site],
    inner_state: Any,
    params: optax.Params | None,
    extra_args: Mapping[str, Any],
  ) -> dict[str, jax.Array]:
    """The part of each full-size update that depends on parameters alone."""
    if params is None or not sites or self.params_mode == "project":
      return {}
    # Reshaped as the inner optimizer sees them: it may tell axes apart.
    inner_params = paths.map_with_path(
      lambda path, x: (
        sites[path].view.as_stack(self._cast(x))
        if path in sites
        else self._cast(x)
      ),
      params,
    )
    try:
      terms = separate.param_term(
        self.inner, inner_state, inner_params, sites, extra_args
      )
    except separate.CoupledError as error:
      raise ValueError(_COUPLED.format(error)) from error
    return {path: sites[path].view.from_stack(x) for path, x in terms.items()}

  def _inner_params(
    self, call: _Call, bases: Mapping[str, projection.Bases]
  ) -> optax.Params | None:
    """The parameters as the inner optimizer sees them.

    A projected leaf is zero, since its term is added at full size; with
    `params_mode="project"` it is the projected weight.
    """
    if call.params is None:
      return None

    def convert(path: str, x: jax.Array) -> jax.Array:
      if path not in call.sites:
        return self._cast(x)
      site = call.sites[path]
      if self.params_mode == "split":
        return jnp.zeros(site.low_shape, self._dtype(x.dtype))
      low = projection.project(site.view.as_stack(x), bases[path])
      return low.astype(self._dtype(x.dtype))

    return paths.map_with_path(convert, call.params)

  def _check_inner(
    self,
    params: optax.Params,
    low: Any,
    inner_state: Any,
    sites: Mapping[str, plan_lib.Site],
  ) -> None:
    """Refuses at `init` an inner optimizer that cannot run in a subspace."""
    if self.refresh.moments == "ldadam":
      moments.check_adam(inner_state)
    if self.params_mode == "split":
      extra_args.check(
        functools.partial(self._param_terms, sites), inner_state, params
      )
      return
    if sites:
      extra_args.check(
        lambda g, s, p, extra: self.inner.update(g, s, p, **extra),
        *(low, inner_state, low),
      )
    try:
      separate.check_initial_state(self.inner, low, sites)
    except separate.CoupledError as error:
      raise ValueError(_REMEMBERS.format(error)) from error

  def _initial_basis(self, site: plan_lib.Site, side: str, like: Any) -> Any:
    """The basis that a matrix has before its first refresh."""
    if self.refresh.finder == "random":
      return initial.random_basis(site, side, like, self.seed)
    return initial.basis(site, side, like, self.seed, self.basis_dtype)

  def _initial_schedules(
    self, sites: Mapping[str, plan_lib.Site]
  ) -> dict[str, adaptive.State] | None:
    """Path to schedule before the first refresh; None unless it is adaptive."""
    rule: Any = self.refresh.adaptive
    if self.refresh.policy != "adaptive":
      return None
    return {p: adaptive.start(x.view.stack, rule) for p, x in sites.items()}

  def _low_params(
    self,
    params: optax.Params,
    sites: Mapping[str, plan_lib.Site],
    dtype: Callable[[Any], Any],
  ) -> Any:
    """What the inner optimizer is initialized with, in the dtypes of `dtype`.

    Args:
      params: The parameters.
      sites: Path to site.
      dtype: From the dtype of a parameter.
    """
    return paths.map_with_path(
      lambda path, x: (
        _low_zeros(sites[path], x, dtype(jnp.result_type(x)))
        if path in sites
        else _as_dtype(x, dtype(jnp.result_type(x)))
      ),
      params,
    )

  def _dtype(self, dtype: Any) -> Any:
    """The dtype in which the inner optimizer sees a leaf."""
    if self.state_dtype is None or self.state_dtype == jnp.bfloat16:
      return jnp.promote_types(dtype, jnp.float32)
    if jnp.issubdtype(dtype, jnp.complexfloating):
      return jnp.promote_types(dtype, self.state_dtype)
    return jnp.dtype(self.state_dtype)

  def _stored_dtype(self, dtype: Any) -> Any:
    """The dtype in which the moments of a leaf are stored."""
    asked = dtype if self.state_dtype is None else self.state_dtype
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    if asked == jnp.bfloat16 and not is_complex:
      return jnp.dtype(jnp.bfloat16)
    return self._dtype(dtype)

  def _cast(self, x: Any) -> Any:
    return _as_dtype(x, self._dtype(jnp.result_type(x)))


def _as_dtype(x: Any, dtype: Any) -> Any:
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
  return jnp.asarray(x, dtype)


def _low_zeros(site: plan_lib.Site, like: Any, dtype: Any) -> jax.Array:
  """Zeros in the shape of the projected gradient.

  The axis of the rank is divided over the mesh axes of the side it stands for,
  so that every device holds a part of the moments on either side.
  """
  zeros = jnp.zeros(site.low_shape, dtype)
  return sharding.shard_divisible_like(zeros, like, site.view.spec)


def _zeros_like(x: Any) -> jax.Array:
  zeros = jnp.zeros(jnp.shape(x), jnp.result_type(x))
  return sharding.shard_like(zeros, x, lambda spec: spec)


def _finite(x: jax.Array) -> jax.Array:
  """`x` with 0 for NaN and infinity, which would never leave a moment."""
  return jnp.where(jnp.isfinite(x), x, 0)


def _zero_updates(call: _Call) -> optax.Updates:
  """Updates of zero, at full size."""
  return paths.map_with_path(
    lambda path, g: (
      jnp.zeros(call.sites[path].view.shape, jnp.result_type(g))
      if path in call.low
      else jnp.zeros_like(g)
    ),
    call.updates,
  )


def _is_low(site: plan_lib.Site, leaf: Any) -> bool:
  """Whether the gradient of a leaf is projected: its shape tells."""
  if leaf is None:
    return False
  return jnp.shape(leaf) == site.low_shape != site.view.shape


def _lift_leaves(
  call: _Call,
  bases: Mapping[str, projection.Bases],
  new: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
  """Path of a projected leaf to its update at full size."""
  leaves = paths.leaves_by_path(call.updates)
  return sequential.one_after_another(
    lambda path, low: _lift_leaf(
      call.sites[path], low, bases[path], jnp.result_type(leaves[path])
    ),
    {path: new[path] for path in call.sites},
  )


def _lift_leaf(
  site: plan_lib.Site, low: jax.Array, bases: projection.Bases, dtype: Any
) -> jax.Array:
  """The full-size update of a leaf that will be cast to `dtype`."""
  low = site.scale * low
  if dtype == jnp.bfloat16:
    # The update is rounded to bfloat16 anyway. Products of bfloat16 numbers
    # take one pass of a matrix unit, and a mesh gathers half as many bytes.
    low, bases = jax.tree.map(lambda x: x.astype(dtype), (low, bases))
  return site.view.from_stack(_by_matrix(site, projection.lift, low, bases))


def _by_matrix(site: plan_lib.Site, f: Callable, *stacks: Any) -> jax.Array:
  """A function of a leaf's matrices, called on all at once or one by one."""
  if not site.one_by_one:
    return f(*stacks)
  return slices.map_stack(f, len(site.view.stack), *stacks)


def _check_like(
  leaves: Mapping[str, Any],
  params: optax.Params | None,
  low: Mapping[str, Any],
) -> None:
  """Raises where gradients and parameters differ in structure or shape.

  Args:
    leaves: Path to gradient.
    params: The parameters.
    low: Path to gradient, for those that are projected.
  """
  if params is None:
    return
  paths.check_arrays(paths.leaves_by_path(params), plan_lib.AT_ARRAYS)
  shapes = {p: jnp.shape(x) for p, x in paths.leaves_by_path(params).items()}
  given = {path: jnp.shape(x) for path, x in leaves.items()}
  for path in {**shapes, **given}:
    if path not in low and given.get(path) != shapes.get(path):
      say = lambda shape: "is missing" if shape is None else f"is {shape}"
      raise ValueError(
        f"The leaf {path!r} {say(shapes.get(path))} in `params` but "
        f"{say(given.get(path))} in the gradients (`updates`). Both must have "
        "the same leaves and shapes."
      )


_COUPLED = """\
`inner` cannot run in a subspace as it is: {}, and that part of the update has
no exact low-rank form. Put the parts that need the weights behind GaLore, where
they see full-size updates and keep no state, for instance
  optax.chain(
    galore(optax.scale_by_adam(), rank=128),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_trust_ratio(),
    optax.scale_by_learning_rate(learning_rate),
  )
or pass `params_mode="project"` to let `inner` see the projected weights, with
which for example `optax.contrib.momo` runs.
`optax.adafactor` only needs `multiply_by_parameter_scale=False`. An
`inner` whose state begins with the weights cannot use those either: put
`optax.contrib.schedule_free` and similar optimizers around GaLore."""

_REMEMBERS = """\
`inner` keeps where the weights began: {}. With `params_mode="project"` it sees
projected weights, and their basis changes. Put it around GaLore, as in
  optax.contrib.schedule_free(galore(optax.sgd(rate), rank=128), rate)"""


@old_spellings.refuse
def galore(
  inner: optax.GradientTransformation | None = None,
  *,
  rank: ArrayLike = 128,
  update_proj_gap: ArrayLike = 200,
  scale: ArrayLike = 0.25,
  proj_type: str = "std",
  rules: rules_lib.Rules = (),
  refresh: Refresh | str = Refresh(),  # noqa: B008
  residual: str | None = None,
  residual_factor: ArrayLike | None = None,
  residual_decay: ArrayLike | None = None,
  basis_dtype: DTypeLike = "float32",
  state_dtype: DTypeLike | None = None,
  accumulation_steps: int | None = None,
  param_shardings: Any = None,
  seed: ArrayLike = 0,
  faithful: bool = False,
  params_mode: str = "split",
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore: runs an optimizer in the gradients' dominant subspaces.

  Each gradient matrix :math:`G_t \in \mathbb{R}^{m \times n}` is projected on
  an orthonormal basis of rank r, the inner optimizer :math:`\rho` runs on the
  small matrix, and its update is lifted back:

  .. math::

    R_t &= P_t^\top G_t \\
    N_t &= \rho_t(R_t) \\
    U_t &= \alpha P_t N_t

  (written for the left side). Every T steps the basis is recomputed from the
  current gradient. The state holds one basis of rank r for each matrix, and the
  inner optimizer's moments at rank r instead of at full size.

  Args:
    inner: An Optax optimizer. Its weight decay acts on the full weights (with
      `params_mode="split"`), so the terms of its update that depend on the
      weights must be separable from those of the gradient. If None, the
      result marks where GaLore is in :func:`galore_optax.chain`.
    rank: Rank r: a positive int, or a fraction in (0, 1] of each matrix's
      shorter side (a float).
    update_proj_gap: Steps T between two refreshes of a basis.
    scale: The papers' α, a factor on the lifted updates. With Adam it acts as
      a learning rate of the projected matrices alone. Terms that `inner` adds
      for the weights, such as decoupled decay, are not multiplied (with
      `params_mode="split"`).
    proj_type: Which side is projected. `std`, the paper's rule: the shorter
      one. `reverse_std`: the longer one, whose state is smaller. `left`: rows.
      `right`: columns. `full`: both. `auto`: the one-sided projection with the
      smallest state; with `param_shardings`, the side that is not divided over
      devices, where projection needs no communication.
    rules: Ordered pairs `(regex, Projection or None)`. The first whose regex
      is found in a leaf's path (`re.search` in `layers/attn/q/kernel`) decides
      how the leaf is projected; None leaves it at full rank. Leaves without a
      rule are projected if they have two axes or more (the last two are the
      matrix, the others stack matrices; axes that Flax's partition metadata
      name `layers` or `experts` always do) and the projection makes the state
      smaller (counted with two moments, as Adam has), unless their path names
      an embedding, an output head, a norm, a bias or a scale.
    refresh: When and how bases are recomputed, a :class:`galore_optax.Refresh`,
      or only its policy: `staggered`, `synchronous` or `adaptive`.
    residual: What to do with the part of the gradient that the bases do not
      span, :math:`S_t = G_t - P_t R_t`. None: it is dropped. `normalized`: it
      is added, each column divided by the root of a running mean of its
      squares,

      .. math::

        U_t &= \alpha (P_t N_t + \mathrm{factor} \cdot \tilde S_t) \\
        \tilde S_{t,ij} &= S_{t,ij} \sqrt{(m - r) / \hat c_{t,j}}, \quad
          c_{t,j} = \beta c_{t-1,j} + (1 - \beta) \sum_i S_{t,ij}^2

      with the bias of c removed. (For the right side, rows take the part of
      columns.) The state grows by one number for each column, and S itself is
      never computed. `factored`: the mean square has a factor for each column
      and one for each row, as in Adafactor; it takes one more product of the
      size of the lift. The learning rate and the sign of `inner` multiply the
      residual too. `fira`: it is added, scaled column by column to
      the size that `inner` gives to the projected gradient,

      .. math::

        U_t &= \alpha P_t N_t + S_t \\
        S_t &= (G_t - \alpha P_t R_t)\, \mathrm{diag}(\phi_t), \quad
          \phi_{t,j} = \|N_{t,:j}\| / \|R_{t,:j}\|

      with S scaled down where its norm would grow by more than 1% a step. (For
      the right side φ scales rows; for both sides it is one number for the
      matrix.) The state grows by one number for each matrix. The learning rate
      and the sign of `inner` multiply S too; φ and the limit are computed
      without them, so that they must come last in `inner`. `apollo`: the
      projected gradient only gives the scaling,

      .. math::

        U_t = \sqrt{\alpha}\, G_t\, \mathrm{diag}(\phi_t),

      with the same limit; `apollo_mini`: with one φ for the whole matrix, for
      which rank 1 is enough. They were published with α of 1 and 128, and with
      `Refresh(finder="random")`, see :func:`galore_optax.apollo_adamw`.
    residual_factor: The factor on a `normalized` or `factored` residual, whose
      entries are about as large as Adam's; None means 1.
    residual_decay: Decay β of the mean of its squares; None means 0.95.
    basis_dtype: Dtype of the bases: a float dtype, or `int4` or `int8` for
      block-wise codes, see :class:`galore_optax.QArray`.
    state_dtype: Dtype in which moments are stored between steps. None: bfloat16
      for bfloat16 parameters; for others theirs, but at least float32. `inner`
      computes in float32 at least, and what is stored in bfloat16 is rounded at
      random, without bias: rounded to the nearest, a second moment would not
      decay at b2 = 0.999. Moments to which `inner` gives a dtype of its own
      keep it. In float16 `inner` also computes, where an ε of 1e-8 is 0, so
      that Adam would divide 0 by 0. For moments in
      8 bits take :func:`galore_optax.galore_adamw_8bit`, or
      :func:`galore_optax.scale_by_adam_8bit` as `inner`.
    accumulation_steps: Number k of calls of `update` that make one step; None
      means 1. The first k - 1 calls return zeros and only add the projected
      gradient to a low-rank accumulator; the k-th makes a step with the mean.
      Bases that are due are found from the first of the k gradients.
      (`optax.MultiSteps` around GaLore accumulates at full size.)
    param_shardings: `jax.NamedSharding` of each parameter, if they are on a
      mesh: decides the sides of `proj_type="auto"`, and how stacked layers are
      read. From a stack that is divided among devices, a refresh takes one
      layer without gathering the others; layers whose projected side is divided
      are projected and lifted one by one, so that the devices exchange one
      layer at a time.
    seed: Seed of the initial bases, of random ones, and of random rounding.
    faithful: Whether to follow the paper's algorithm exactly:
      `refresh=Refresh.paper()`, and every matrix is projected, even if that
      saves nothing.
    params_mode: What an `inner` that reads the parameters is given. `split`:
      what it adds for the parameters alone, such as decoupled weight decay, is
      computed at full size, exactly; an `inner` for which that is impossible
      is refused. `project`: the projected weights :math:`P^\top W`; decay then
      acts on what the bases span, times α, and an `inner` that keeps where the
      weights began, such as a schedule-free one, is refused.

  Returns:
    A gradient transformation. A projected matrix whose gradient has an entry
    that is not finite counts as zero; elsewhere only that entry does.
    `init` raises ValueError or TypeError for rules, leaves or an inner
    optimizer that do not fit, and `update` for gradients that do not.

  Raises:
    ValueError: If an argument is out of its range.
    TypeError: If an argument has the wrong type.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from galore_optax import galore, state_bytes
    >>> params = {"w": jnp.zeros((256, 1024)), "bias": jnp.zeros(1024)}
    >>> tx = galore(optax.adamw(1e-2, weight_decay=0.1), rank=16)
    >>> state = tx.init(params)
    >>> grads = jax.tree.map(jnp.ones_like, params)
    >>> updates, state = jax.jit(tx.update)(grads, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> state_bytes(state) / state_bytes(optax.adamw(1e-2).init(params)) < 0.1
    True

  References:
    Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
    Projection <https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm 2; for
    `residual="fira"` Chen et al., `Fira: Can We Achieve Full-rank Training of
    LLMs Under Low-rank Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024;
    for `residual="normalized"` the compensation of Gong et al., `Towards
    Efficient Optimizer Design for LLM via Structured Fisher Approximation with
    a Low-Rank Extension <https://arxiv.org/abs/2502.07752>`_, 2025; for
    `residual="factored"` the denominator of Shazeer and Stern, `Adafactor
    <https://arxiv.org/abs/1804.04235>`_, 2018; for `residual="apollo"` Zhu et
    al., `APOLLO: SGD-like Memory, AdamW-level
    Performance <https://arxiv.org/abs/2412.05270>`_, 2024.
  """
  checks.check_choice("params_mode", params_mode, PARAMS_MODES)
  basis_dtype = checks.dtype_name("basis_dtype", basis_dtype, BASIS_CODES)
  checks.check_float_dtype("state_dtype", state_dtype)
  accumulation_steps = _check_accumulation(accumulation_steps)
  refresh = refresh_settings.complete(refresh)
  if faithful:
    refresh = refresh_settings.faithful(refresh)
  defaults = rules_lib.Projection(
    rank=checks.required("rank", rank),
    update_proj_gap=checks.required("update_proj_gap", update_proj_gap),
    scale=checks.required("scale", scale),
    proj_type=checks.required("proj_type", proj_type),
  )
  residual_lib.check(residual, refresh, accumulation_steps, params_mode)
  residual_lib.check_basis(refresh, basis_dtype)
  residual_settings = residual_lib.settings(
    residual, residual_factor, residual_decay, basis_dtype
  )
  rules = rules_lib.check_rules(rules)
  residual_lib.check_rules(residual, refresh, rules)

  def wrap(
    inner: optax.GradientTransformation,
  ) -> optax.GradientTransformationExtraArgs:
    _chain.check_inner(inner)
    settings = _GaLore(
      inner=optax.with_extra_args_support(inner),
      plan=plan_lib.Plan(
        rules,
        defaults,
        always=faithful,
        seeded=refresh.finder == "random",
        partitions=sharding.partitions(param_shardings),
      ),
      refresh=refresh,
      params_mode=params_mode,
      basis_dtype=basis_dtype,
      state_dtype=state_dtype,
      seed=seed,
      accumulation_steps=accumulation_steps,
      residual=residual_settings,
    )
    return optax.GradientTransformationExtraArgs(
      settings.init, _or_describe(settings)
    )

  return _chain.marker(wrap) if inner is None else wrap(inner)


def _or_describe(settings: _GaLore) -> Callable:
  """The update function; called with a probe, it describes itself to that."""
  update = sharding.with_auto_axes(settings.update)

  def update_or_describe(updates, state, params=None, **extra_args):
    context, _ = context_lib.split_off(extra_args)
    if context.probe is None:
      return update(updates, state, params, **extra_args)
    described = settings.describe(updates, state, params, extra_args)
    context.probe.described.append(described)
    return updates, state

  return update_or_describe


def _check_accumulation(steps: Any) -> int:
  """The number of gradients that make a step; raises unless it is one."""
  # None by default, because `optax.inject_hyperparams` would trace an int.
  if steps is None:
    return 1
  if isinstance(steps, bool) or not isinstance(steps, int):
    raise TypeError(
      f"`accumulation_steps` must be an int, got {steps!r}: it decides the "
      "structure of the state."
    )
  if steps < 1:
    raise ValueError(f"`accumulation_steps` must be positive, got {steps}.")
  return steps
