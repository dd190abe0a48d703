"""GaLore: an inner optimizer that runs in the gradients' dominant subspaces."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax import _chain, checks, options, residual
from galore_optax.inner import separate
from galore_optax.subspace import adaptive as adaptive_lib
from galore_optax.subspace import initial, projection, sequential
from galore_optax.subspace import moments as moments_lib
from galore_optax.subspace import refresh as refresh_lib
from galore_optax.tree import paths, sharding, slices, split
from galore_optax.tree import plan as plan_lib

PARAMS_MODES = ("split", "project")
BASIS_CODES = initial.CODES

# Extra argument of `update` with the number of the layer whose slices are
# updated, and that of all layers: decides whose turn it is to be refreshed.
LAYER_ARG = "galore_layer"

# Extra argument of `update`: path of a projected leaf to the matrices
# (..., m, n) that its bases are found from, in place of its gradient.
BASIS_ARG = "galore_basis_from"


class GaLoreState(NamedTuple):
  """State of :func:`galore`.

  Attributes:
    step: Updates so far.
    projector: Path of a projected leaf to side (`left`, `right`) to basis; a
      leaf at full rank has no entry. A basis in 4 or 8 bits is a
      :class:`galore_optax.QArray` of its transpose, a random one its seed.
    inner_state: The inner optimizer's state. In place of each tree in the
      parameters' structure, such as Adam's `mu`, it holds the tree's
      :class:`galore_optax.tree.split.Split`.
    schedule: Path of a projected leaf to its
      :class:`galore_optax.subspace.adaptive.State`; None unless
      `refresh="adaptive"`.
    accumulator: Mean of the projected gradients since the last update, a
      :class:`galore_optax.tree.split.Split`; None unless
      `accumulation_steps` > 1.
    micro_step: Gradients in it; None likewise.
    recovery: Path of a projected leaf to the norms of its last residuals, one a
      matrix, 0 before the first; None unless `recovery` is given.
  """

  step: Any  # shape=(), dtype=jnp.int32
  projector: Any  # (..., m, r) or (..., n, r), dtype=basis_dtype
  inner_state: optax.OptState
  schedule: Any = None
  accumulator: Any = None
  micro_step: Any = None  # shape=(), dtype=jnp.int32
  recovery: Any = None  # (...), dtype=jnp.float32


@dataclasses.dataclass(frozen=True)
class _GaLore:
  """The settings of one transformation, and its two functions."""

  inner: optax.GradientTransformationExtraArgs
  plan: plan_lib.Plan
  refresh: refresh_lib.Refresh
  null_tolerance: Any
  params_mode: str
  basis_dtype: Any
  state_dtype: Any
  seed: Any
  accumulation_steps: int
  recovery: str | None

  def init(self, params: optax.Params) -> GaLoreState:
    """State for parameters: start bases, and the inner state at rank r."""
    if split.is_placeholder(params):
      return self._skeleton(params)
    leaves = paths.leaves_by_path(params)
    sites = self.plan.sites(leaves, split.masked_paths(params))
    refresh_lib.check_gaps(self.refresh, sites)
    bases = {
      path: {side: self._start(site, side, leaves[path]) for side in site.sides}
      for path, site in sites.items()
    }
    low = paths.map_with_path(
      lambda path, x: (
        self._low_zeros(sites[path], x) if path in sites else self._cast(x)
      ),
      params,
    )
    inner_state = self.inner.init(low)
    checks.check_not_nested(inner_state, GaLoreState)
    kept = split.split_state(self.inner, inner_state, sites)
    if self.refresh.moments == "ldadam":
      moments_lib.check_adam(inner_state)
    if self.params_mode == "split":
      self._check_separable(params, inner_state, sites)
    else:
      self._check_forgetful(low, sites)
    state = GaLoreState(jnp.zeros([], jnp.int32), bases, kept)
    if self.refresh.policy == "adaptive":
      state = state._replace(
        schedule={
          path: adaptive_lib.start(site.view.stack, self.refresh.adaptive)
          for path, site in sites.items()
        }
      )
    if self.recovery:
      norms = residual.start(
        self.recovery, self.inner, sites, leaves, low, inner_state
      )
      state = state._replace(recovery=norms)
    if self.accumulation_steps == 1:
      return state
    empty = jax.tree.map(lambda x: _zeros_like(x), low)
    return state._replace(
      accumulator=split.split(empty, sites),
      micro_step=jnp.zeros([], jnp.int32),
    )

  def _skeleton(self, params: Any) -> GaLoreState:
    """What Optax is told of a state: nothing in it is like the parameters."""
    more = 0 if self.accumulation_steps > 1 else None
    return GaLoreState(
      step=0,
      projector=0,
      inner_state=split.placeholder_state(self.inner, params),
      schedule=0 if self.refresh.policy == "adaptive" else None,
      accumulator=more,
      micro_step=more,
      recovery=0 if self.recovery else None,
    )

  def update(
    self,
    updates: optax.Updates,
    state: GaLoreState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, GaLoreState]:
    """Refresh what is due, project, run the inner optimizer, lift."""
    layer, layers = extra_args.pop(LAYER_ARG, (0, 1))
    sought = extra_args.pop(BASIS_ARG, {})
    leaves = paths.leaves_by_path(updates)
    _check_like(leaves, params)
    sites = self.plan.sites_from_bases(
      leaves, projection.basis_shapes(state.projector)
    )
    grads = {
      path: site.view.as_matrix(leaves[path]) for path, site in sites.items()
    }
    active = True if state.micro_step is None else state.micro_step == 0
    kept, schedules, inner_state = refresh_lib.refresh(
      self.refresh,
      sites,
      refresh_lib.Moment(state.step, layer, layers, active),
      grads | sought,
      state.projector,
      state.schedule or {},
      state.inner_state,
      self._bias_ratios(updates, state, params, extra_args),
    )
    state = state._replace(
      projector=kept,
      inner_state=inner_state,
      schedule=state.schedule and schedules,
    )
    bases = {path: projection.read(kept[path]) for path in sites}
    low = sequential.one_after_another(
      lambda path, basis: _each(sites[path], self._project, grads[path], basis),
      bases,
    )
    low_updates = paths.map_with_path(
      lambda path, g: low[path] if path in low else _finite(self._cast(g)),
      updates,
    )
    step = functools.partial(self._step, sites, bases, updates, params)
    if self.accumulation_steps == 1:
      return step(low_updates, state, extra_args)
    return self._accumulate(
      step, sites, updates, low_updates, state, extra_args
    )

  def _bias_ratios(
    self,
    updates: optax.Updates,
    state: GaLoreState,
    params: optax.Params | None,
    extra_args: Mapping[str, Any],
  ) -> dict[str, jax.Array]:
    """What carrying second moments over takes beside the turn of the bases."""
    if self.refresh.moments != "ldadam":
      return {}
    inner_state = split.merge_state(self.inner, state.inner_state)
    return moments_lib.bias_ratios(
      self.inner, inner_state, updates, params, extra_args
    )

  def _step(
    self,
    sites: Mapping[str, plan_lib.Site],
    bases: Mapping[str, projection.Bases],
    like: optax.Updates,
    params: optax.Params | None,
    low_updates: optax.Updates,
    state: GaLoreState,
    extra_args: Mapping[str, Any],
  ) -> tuple[optax.Updates, GaLoreState]:
    """The inner optimizer's step on projected gradients, lifted."""
    old = split.merge_state(self.inner, state.inner_state)
    owed = self._owed_to_params(sites, old, params, extra_args)
    seen = self._inner_params(sites, bases, params)
    inner_updates, inner_state = self.inner.update(
      low_updates, old, seen, **extra_args
    )
    new = paths.leaves_by_path(inner_updates)
    if self.recovery:
      lifted, norms = residual.lift(
        self.recovery,
        residual.gains(self.inner, low_updates, old, seen, sites, extra_args),
        sites,
        bases,
        paths.leaves_by_path(like),
        paths.leaves_by_path(low_updates),
        new,
        state.recovery,
      )
      state = state._replace(recovery=norms)
    else:
      given = paths.leaves_by_path(like)
      lifted = sequential.one_after_another(
        lambda path, low: _lift(
          sites[path], low, bases[path], jnp.result_type(given[path])
        ),
        {path: new[path] for path in sites},
      )
    new |= lifted
    new |= {path: new[path] + h for path, h in owed.items()}
    return (
      paths.map_with_path(
        lambda path, g: new[path].astype(jnp.result_type(g)), like
      ),
      state._replace(
        step=optax.safe_increment(state.step),
        inner_state=split.split_state(self.inner, inner_state, sites),
      ),
    )

  def _accumulate(
    self,
    step: Any,
    sites: Mapping[str, plan_lib.Site],
    like: optax.Updates,
    low_updates: optax.Updates,
    state: GaLoreState,
    extra_args: Mapping[str, Any],
  ) -> tuple[optax.Updates, GaLoreState]:
    """Adds projected gradients up; every k-th time makes a step of their mean.

    Projection is linear, so that is the projection of the mean gradient. All
    gradients of a step are projected on the same bases.
    """
    mean = jax.tree.map(
      lambda total, x: total + x / self.accumulation_steps,
      split.merge(state.accumulator),
      low_updates,
    )
    last = state.micro_step == self.accumulation_steps - 1

    def finish(mean: Any) -> tuple[optax.Updates, GaLoreState]:
      new, after = step(mean, state, extra_args)
      empty = split.split(jax.tree.map(jnp.zeros_like, mean), sites)
      return new, after._replace(
        accumulator=empty, micro_step=jnp.zeros_like(state.micro_step)
      )

    def wait(mean: Any) -> tuple[optax.Updates, GaLoreState]:
      return jax.tree.map(jnp.zeros_like, like), state._replace(
        accumulator=split.split(mean, sites), micro_step=state.micro_step + 1
      )

    return jax.lax.cond(last, finish, wait, mean)

  def _project(self, g: jax.Array, bases: projection.Bases) -> jax.Array:
    """R, without directions of noise, 0 where the gradient is not finite."""
    low = projection.project(g, bases)
    low = projection.drop_null(low, bases, self.null_tolerance)
    return _finite(low.astype(self._dtype(g.dtype)))

  def _owed_to_params(
    self,
    sites: Mapping[str, plan_lib.Site],
    inner_state: Any,
    params: optax.Params | None,
    extra_args: Mapping[str, Any],
  ) -> dict[str, jax.Array]:
    """The part of the full-size update that depends on parameters alone."""
    if params is None or not sites or self.params_mode == "project":
      return {}
    # As matrices, as which the inner optimizer knows them: it may go by axes.
    seen = paths.map_with_path(
      lambda path, x: (
        sites[path].view.as_matrix(self._cast(x))
        if path in sites
        else self._cast(x)
      ),
      params,
    )
    try:
      owed = separate.param_term(
        self.inner, inner_state, seen, sites, extra_args
      )
    except separate.CoupledError as error:
      raise ValueError(_COUPLED.format(error)) from error
    return {path: sites[path].view.from_matrix(h) for path, h in owed.items()}

  def _inner_params(
    self,
    sites: Mapping[str, plan_lib.Site],
    bases: Mapping[str, projection.Bases],
    params: optax.Params | None,
  ) -> optax.Params | None:
    """The parameters as the inner optimizer sees them.

    Of a projected leaf that is zero, since its part is added at full size, or
    its projection where the inner optimizer was to see that.
    """
    if params is None:
      return None

    def see(path: str, x: jax.Array) -> jax.Array:
      if path not in sites:
        return self._cast(x)
      if self.params_mode == "split":
        return jnp.zeros(sites[path].low_shape, self._dtype(x.dtype))
      low = projection.project(sites[path].view.as_matrix(x), bases[path])
      return low.astype(self._dtype(x.dtype))

    return paths.map_with_path(see, params)

  def _check_separable(
    self,
    params: optax.Params,
    inner_state: Any,
    sites: Mapping[str, plan_lib.Site],
  ) -> None:
    """Refuses an inner optimizer at `init` that `update` would refuse."""
    checks.try_abstractly(
      lambda p, s: self._owed_to_params(sites, s, p, {}), params, inner_state
    )

  def _check_forgetful(
    self, low: Any, sites: Mapping[str, plan_lib.Site]
  ) -> None:
    """Refuses an inner optimizer that remembers where the weights began.

    A basis that changes leaves such a place behind.
    """
    try:
      separate.check_initial_state(self.inner, low, sites)
    except separate.CoupledError as error:
      raise ValueError(_REMEMBERS.format(error)) from error

  def _start(self, site: plan_lib.Site, side: str, like: Any) -> Any:
    """The basis that a matrix has before its first refresh."""
    if self.refresh.method == "random":
      return initial.random_basis(site, side, like, self.seed)
    return initial.basis(site, side, like, self.seed, self.basis_dtype)

  def _low_zeros(self, site: plan_lib.Site, like: Any) -> jax.Array:
    """Zeros in the shape of the projected gradient.

    The rank is split over the mesh axes of the side that it stands for, so
    that every device keeps its share of the moments whichever side that is.
    """
    zeros = jnp.zeros(site.low_shape, self._dtype(jnp.result_type(like)))
    return sharding.shard_divisible_like(zeros, like, site.view.spec)

  def _dtype(self, dtype: Any) -> Any:
    """The dtype in which the inner optimizer sees a leaf."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
      return jnp.promote_types(dtype, self.state_dtype or jnp.float32)
    if self.state_dtype is not None:
      return jnp.dtype(self.state_dtype)
    return jnp.promote_types(dtype, jnp.float32)

  def _cast(self, x: Any) -> Any:
    dtype = self._dtype(jnp.result_type(x))
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    return jnp.asarray(x, dtype)


def _zeros_like(x: Any) -> jax.Array:
  zeros = jnp.zeros(jnp.shape(x), jnp.result_type(x))
  return sharding.shard_like(zeros, x, lambda spec: spec)


def _finite(x: jax.Array) -> jax.Array:
  """0 in place of what would stay in the moments for ever."""
  return jnp.where(jnp.isfinite(x), x, 0)


def _lift(
  site: plan_lib.Site, low: jax.Array, bases: projection.Bases, dtype: Any
) -> jax.Array:
  """The update of a leaf, which is to have this dtype."""
  low = site.scale * low
  if dtype == jnp.bfloat16:
    # It is rounded to that anyway. Products of such numbers are exact in one
    # pass of a matrix unit, and on a mesh half as much is gathered.
    low, bases = jax.tree.map(lambda x: x.astype(dtype), (low, bases))
  return site.view.from_matrix(_each(site, projection.lift, low, bases))


def _each(site: plan_lib.Site, f: Callable, *stacks: Any) -> jax.Array:
  """A function of a leaf's matrices: of all at once, or one by one."""
  return slices.map_matrices(f, *stacks) if site.one_by_one else f(*stacks)


def _check_like(leaves: Mapping[str, Any], params: optax.Params | None) -> None:
  """Raises where gradients and parameters differ in structure or shape."""
  if params is None:
    return
  paths.check_arrays(paths.leaves_by_path(params), plan_lib.AT_ARRAYS)
  shapes = {p: jnp.shape(x) for p, x in paths.leaves_by_path(params).items()}
  found = {path: jnp.shape(x) for path, x in leaves.items()}
  for path in {**shapes, **found}:
    if found.get(path) != shapes.get(path):
      say = lambda shape: "is missing" if shape is None else f"is {shape}"
      raise ValueError(
        f"The leaf {path!r} {say(shapes.get(path))} in `params` but "
        f"{say(found.get(path))} in the gradients (`updates`). Both must have "
        "the same leaves and shapes."
      )


_COUPLED = """\
`inner` cannot run in a subspace as it is: {}, and that part of the update has
no exact low-rank form. Put what needs the weights behind GaLore, where it sees
full-size updates and keeps no state, for instance
  optax.chain(
    galore(optax.scale_by_adam(), rank=128),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_trust_ratio(),
    optax.scale_by_learning_rate(learning_rate),
  )
or pass `params_mode="project"` to let `inner` see the projected weights, which
an `inner` whose state begins with the weights cannot use, either: put
`optax.contrib.schedule_free` and its like around GaLore."""

_REMEMBERS = """\
`inner` keeps where the weights began: {}. With `params_mode="project"` it sees
projected weights, of which the basis changes. Put it around GaLore, as in
  optax.contrib.schedule_free(galore(optax.sgd(rate), rank=128), rate)"""


def galore(
  inner: optax.GradientTransformation | None = None,
  *,
  rank: Any = 128,
  update_proj_gap: Any = 200,
  scale: Any = 0.25,
  proj_type: str = "std",
  rules: plan_lib.Rules = (),
  projector: str = "subspace",
  refresh: str = "staggered",
  moments: str = "rotate",
  iterations: Any = 2,
  null_tolerance: Any = 1e-6,
  params_mode: str = "split",
  basis_dtype: Any = "float32",
  state_dtype: Any = None,
  seed: Any = 0,
  adaptive: adaptive_lib.Adaptive | None = None,
  accumulation_steps: int | None = None,
  recovery: str | None = None,
  param_shardings: Any = None,
  share_refresh: bool = True,
  random_from: Any = None,
  faithful: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""GaLore: runs an optimizer in the gradients' dominant subspaces.

  Each gradient matrix :math:`G_t \in \mathbb{R}^{m \times n}` is projected on
  an orthonormal basis of rank r, the inner optimizer :math:`\rho` runs on the
  small matrix, and its update is lifted back:

  .. math::

    R_t &= P_t^\top G_t \\
    N_t &= \rho_t(R_t) \\
    U_t &= \alpha P_t N_t

  (written for the left side). Every T steps the basis is found anew from the
  current gradient. The state holds one basis of rank r a matrix, and the inner
  optimizer's moments at rank r instead of at full size.

  Args:
    inner: Any Optax optimizer. Weight decay in it acts on the full weights
      (with `params_mode="split"`). If None, what is returned marks its place
      in :func:`galore_optax.chain`.
    rank: Rank r: a positive int, or a fraction in (0, 1] of each matrix's
      shorter side (a float).
    update_proj_gap: Steps T between two refreshes of a basis.
    scale: The papers' α, a factor on the lifted updates. With Adam it acts as
      a learning rate of the projected matrices alone. What `inner` adds for
      the weights, such as decoupled decay, is not multiplied (with
      `params_mode="split"`).
    proj_type: Which side is projected. `std`, the paper's rule: the shorter
      one. `reverse_std`: the longer one, whose state is smaller. `left`: rows.
      `right`: columns. `full`: both. `auto`: the one-sided projection with the
      smallest state; with `param_shardings`, of two sides the one that is whole
      on every device, where projection needs no communication.
    rules: Ordered pairs `(regex, Projection or None)`. The first whose regex
      is found in a leaf's path (`re.search` in `layers/attn/q/kernel`) decides
      how the leaf is projected; None leaves it at full rank. Leaves without a
      rule are projected if they have two axes or more (the last two are the
      matrix, the others stack matrices) and the projection makes the state
      smaller (counted with two moments, as Adam has), unless their path names
      an embedding, an output head, a norm, a bias or a scale.
    projector: How a basis is found. `subspace`: subspace iteration that starts
      from the last basis. `svd`: exactly. `random`: drawn anew every T steps
      from a seed, which alone is kept; for `recovery="apollo"`.
    refresh: When. `synchronous`: all matrices at the steps 0, T, 2T, ...
      `staggered`: all at step 0, from then on one matrix after the other,
      spread evenly over the gap, so that no step takes longer than others.
      `adaptive`: likewise, but matrices whose subspace has settled wait longer
      and longer (Q-GaLore). A matrix whose gradient at step 0 was zero or not
      finite keeps the basis of `init` until its turn, up to T steps later.
    moments: What becomes of the moments at a refresh. `rotate`: they are
      carried over into the new basis by :math:`C = P_{new}^\top P_{old}`,
      :math:`\mu \leftarrow C \mu` and :math:`\nu \leftarrow (C \circ C) \nu`.
      `keep`: left as they are, which is the paper's way. `reset`: zeros.
      `ldadam`, for `inner` with `optax.scale_by_adam`: the second moment is
      carried over as a variance and a squared mean,

      .. math::

        \nu \leftarrow (1 - \beta_2^t) \left| (C \circ C)(\hat\nu - \hat\mu^2)
          + (C \hat\mu)^2 \right|

      with the bias-corrected moments after t steps.
    iterations: Subspace iterations of a refresh.
    null_tolerance: Directions in which the projected gradient is less than this
      fraction of its whole norm are zeroed: there it is rounding noise, which
      Adam would scale up. 0 keeps all.
    params_mode: What an `inner` that reads the parameters is given. `split`:
      what it adds for the parameters alone, such as decoupled weight decay, is
      computed at full size, exactly; an `inner` for which that is impossible
      is refused. `project`: the projected weights :math:`P^\top W`; decay then
      acts on what the bases span, times α, and an `inner` that keeps where the
      weights began, such as a schedule-free one, is refused.
    basis_dtype: Dtype of the bases: a float dtype, or `int4` or `int8` for
      block-wise codes, see :class:`galore_optax.QArray`.
    state_dtype: Dtype in which `inner` sees gradients and parameters, and so of
      its moments. By default that of the parameters but at least float32,
      because a bfloat16 second moment does not decay at b2 = 0.999. In float16
      an ε of 1e-8 is 0, with which Adam divides 0 by 0.
    seed: Seed of the bases before their first refresh.
    adaptive: When a subspace counts as settled, for `refresh="adaptive"`; by
      default as in Q-GaLore.
    accumulation_steps: Number k of calls of `update` that make one step: k - 1
      of them return zeros and only add the projected gradient to a low-rank
      accumulator, the k-th makes a step of the mean. Bases that are due are
      found from the first of the k gradients. (`optax.MultiSteps` around
      GaLore accumulates at full size.) None means one.
    recovery: What becomes of the part of the gradient that the bases do not
      span. None: it is dropped. `fira`: it is added, scaled column by column to
      the size that `inner` gives to the projected gradient,

      .. math::

        U_t &= \alpha P_t N_t + S_t \\
        S_t &= (G_t - \alpha P_t R_t)\, \mathrm{diag}(\phi_t), \quad
          \phi_{t,j} = \|N_{t,:j}\| / \|R_{t,:j}\|

      with S scaled down where its norm would grow by more than 1% a step. (For
      the right side, φ is that of the rows; for both, one of the matrix.) The
      state grows by one number a matrix. The learning rate and the sign of
      `inner` are factors on S, too, and left out of φ and the limit, so that
      they must come last in it. `apollo`: the projected gradient gives nothing
      but the scaling,

      .. math::

        U_t = \sqrt{\alpha}\, G_t\, \mathrm{diag}(\phi_t),

      limited likewise; `apollo_mini`: with one φ for the whole matrix, for
      which rank 1 is enough. Published with α of 1 and 128, and with
      `projector="random"`, see :func:`galore_optax.apollo_adamw`.
    param_shardings: `jax.NamedSharding` for each parameter, where they are on a
      mesh: decides the sides of `proj_type="auto"`, and how stacked layers are
      walked. Of a stack that is divided among devices a refresh takes one layer
      without gathering the others; layers whose projected side is divided are
      projected and lifted one by one, so that what devices send each other
      takes the memory of one.
    share_refresh: Whether leaves whose bases have one shape share one compiled
      refresh, which compiles faster. It needs their gradients at one time. If
      False, each leaf has its own, and where layers are separate leaves a
      compiler can update each as soon as its gradient is there, and drop that.
    random_from: Step from which on a refresh draws an orthonormal basis at
      random, uniformly among all, in place of finding one (GoLore), on the same
      turns. Gradients that are mostly noise late in training have dominant
      directions of noise; random ones miss nothing in the mean. First moments
      are then carried over as before and, under `moments="rotate"`, second ones
      left as they are, of which two random bases have little in common. None
      means never.
    faithful: The paper's algorithm exactly: `projector="svd"`,
      `refresh="synchronous"`, `moments="keep"`, `null_tolerance=0`, and every
      matrix is projected, also if that saves nothing.

  Returns:
    A gradient transformation. Gradients that are not finite count as zero, of
    projected matrices the whole matrix.
    `init` raises ValueError or TypeError for rules, leaves or an inner
    optimizer that do not fit, and `update` for gradients that do not.

  Raises:
    ValueError: If an argument is out of its range.
    TypeError: If an argument is of the wrong type.

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
    `recovery="fira"` Chen et al., `Fira: Can We Achieve Full-rank Training of
    LLMs Under Low-rank Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024;
    for `recovery="apollo"` Zhu et al., `APOLLO: SGD-like Memory, AdamW-level
    Performance <https://arxiv.org/abs/2412.05270>`_, 2024; for
    `moments="ldadam"` Robert et al., `LDAdam: Adaptive Optimization from
    Low-Dimensional Gradient Statistics <https://arxiv.org/abs/2410.16103>`_,
    2024; for `random_from` He et al., `Subspace Optimization for Large Language
    Models with Convergence Guarantees <https://arxiv.org/abs/2410.11289>`_,
    2024.
  """
  checks.check_choice("params_mode", params_mode, PARAMS_MODES)
  basis_dtype = checks.dtype_name("basis_dtype", basis_dtype, BASIS_CODES)
  checks.check_float_dtype("state_dtype", state_dtype)
  checks.check_not_negative("null_tolerance", null_tolerance)
  accumulation_steps = options.check_accumulation(accumulation_steps)
  how = options.refresh_of(
    method=projector,
    policy=refresh,
    moments=moments,
    iterations=iterations,
    adaptive=adaptive,
    share=share_refresh,
    random_from=random_from,
    seed=seed,
    faithful=faithful,
  )
  defaults = plan_lib.Projection(
    rank=checks.required("rank", rank),
    update_proj_gap=checks.required("update_proj_gap", update_proj_gap),
    scale=checks.required("scale", scale),
    proj_type=checks.required("proj_type", proj_type),
  )
  residual.check(recovery, how, accumulation_steps, params_mode)
  residual.check_basis(how, basis_dtype)

  def wrap(
    inner: optax.GradientTransformation,
  ) -> optax.GradientTransformationExtraArgs:
    _chain.check_inner(inner)
    settings = _GaLore(
      inner=optax.with_extra_args_support(inner),
      plan=plan_lib.Plan(
        plan_lib.check_rules(rules),
        defaults,
        always=faithful,
        seeded=how.method == "random",
        partitions=sharding.partitions(param_shardings),
      ),
      refresh=how,
      null_tolerance=0.0 if faithful else null_tolerance,
      params_mode=params_mode,
      basis_dtype=basis_dtype,
      state_dtype=state_dtype,
      seed=seed,
      accumulation_steps=accumulation_steps,
      recovery=recovery,
    )
    return optax.GradientTransformationExtraArgs(
      settings.init, sharding.with_auto_axes(settings.update)
    )

  return _chain.marker(wrap) if inner is None else wrap(inner)
