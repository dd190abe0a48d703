r"""LDAdam: Adam in a subspace that moves every step, and loses nothing.

What a step's basis does not span of gradient and momentum is kept, at full
size, and added to the next gradient.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks
from galore_optax._galore import BASIS_ARG, GaLoreState, galore
from galore_optax.subspace import moments, projection
from galore_optax.tree import paths, sharding, split
from galore_optax.tree import plan as plan_lib

POLICIES = ("synchronous", "staggered")

# Subspace iterations from a random start, for the first gradient's basis.
_FIRST = 8


class LDAdamState(NamedTuple):
  """State of :func:`ldadam`, but for what its learning rate needs.

  Attributes:
    galore: Bases and moments, a :class:`galore_optax.GaLoreState`.
    error: Path of a projected leaf to what was lost so far, of the leaf's
      shape; empty without error feedback.
  """

  galore: GaLoreState
  error: Any  # dtype=error_dtype


@dataclasses.dataclass(frozen=True)
class _LDAdam:
  """The settings of one transformation, and its two functions.

  Attributes:
    core: From the number of subspace iterations to GaLore around Adam.
    plan: Its plan.
    iterations: Of a refresh but the first.
    b1: Decay of the first moment.
    rho: Share of the momentum in what bases are found from.
    error_feedback: Whether there is any.
    error_dtype: Dtype in which the error is kept, or None.
  """

  core: Callable[[Any], Any]
  plan: plan_lib.Plan
  iterations: Any
  b1: Any
  rho: Any
  error_feedback: bool
  error_dtype: Any

  def init(self, params: optax.Params) -> LDAdamState:
    """State for parameters, with an error of zero."""
    state = self.core(self.iterations).init(params)
    if split.is_placeholder(params):
      return LDAdamState(state, 0)
    leaves = paths.leaves_by_path(params) if self.error_feedback else {}
    known = {path: leaves[path] for path in state.projector if path in leaves}
    return LDAdamState(state, {p: self._zeros(x) for p, x in known.items()})

  def update(
    self,
    updates: optax.Updates,
    state: LDAdamState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, LDAdamState]:
    """GaLore's update of gradient and error, and the new error."""
    leaves = paths.leaves_by_path(updates)
    sites = self.plan.sites_from_bases(
      leaves, projection.basis_shapes(state.galore.projector)
    )
    old = state.galore
    before = {path: projection.read(old.projector[path]) for path in sites}
    # Full-size matrices: the gradient with the error, and momentum.
    whole = {
      path: _whole(site, leaves[path], state.error.get(path))
      for path, site in sites.items()
    }
    adam: Any = old.inner_state
    mean = adam.mu.low
    known = {p: projection.lift(mean[p], before[p]) for p in sites}
    unbiased = jnp.where(old.step > 0, 1 - self.b1**old.step, 1)
    sought = {
      path: self.rho * known[path] / unbiased + (1 - self.rho) * whole[path]
      for path in sites
    }
    seen = paths.map_with_path(
      lambda path, g: (
        sites[path].view.from_matrix(whole[path]) if path in sites else g
      ),
      updates,
    )
    many = jnp.maximum(self.iterations, _FIRST)
    core = self.core(jnp.where(old.step == 0, many, self.iterations))
    found, new = core.update(
      seen, old, params, **{BASIS_ARG: sought}, **extra_args
    )
    found = jax.tree.map(
      lambda x, g: x.astype(jnp.result_type(g)), found, updates
    )
    error = {
      path: self._lost(
        sites[path], whole[path], known[path], mean[path], before[path],
        projection.read(new.projector[path]),
      ).astype(kept.dtype)
      for path, kept in state.error.items()
    }  # fmt: skip
    return found, LDAdamState(new, error)

  def _lost(
    self,
    site: plan_lib.Site,
    whole: jax.Array,
    known: jax.Array,
    mean: jax.Array,
    before: projection.Bases,
    after: projection.Bases,
  ) -> jax.Array:
    """What is lost of gradient and momentum in the new basis."""
    turn = projection.overlap(after, before)
    kept = projection.lift(moments.rotate(mean, turn, 1), after)
    low = projection.project(whole, after)
    rest = whole - projection.lift(low, after)
    # Between refreshes nothing is lost of momentum. A basis in few bits is not
    # quite orthonormal, and would seem to lose some.
    moved = functools.reduce(
      jnp.logical_or,
      [
        jnp.any(after[side] != before[side], (-2, -1), keepdims=True)
        for side in after
      ],
    )
    forgotten = jnp.where(moved, known - kept, 0)
    return site.view.from_matrix(rest + self.b1 / (1 - self.b1) * forgotten)

  def _zeros(self, like: Any) -> jax.Array:
    dtype = self.error_dtype or jnp.promote_types(
      jnp.result_type(like), jnp.float32
    )
    zeros = jnp.zeros(jnp.shape(like), dtype)
    return sharding.shard_like(zeros, like, lambda spec: spec)


def _whole(site: plan_lib.Site, grad: jax.Array, error: Any) -> jax.Array:
  """Gradient and error as matrices; a gradient that is not finite counts 0."""
  grad = site.view.as_matrix(grad)
  grad = grad.astype(jnp.promote_types(grad.dtype, jnp.float32))
  finite = jnp.isfinite(grad).all((-2, -1), keepdims=True)
  grad = jnp.where(finite, grad, 0)
  if error is None:
    return grad
  return grad + site.view.as_matrix(error).astype(grad.dtype)


def ldadam(
  learning_rate: Any,
  b1: Any = 0.908,
  b2: Any = 0.99,
  eps: Any = 1e-8,
  weight_decay: Any = 0.0,
  mask: Any = None,
  *,
  rho: Any = 0.908,
  error_feedback: bool = True,
  rank: Any = 128,
  update_proj_gap: Any = 1,
  scale: Any = 1.0,
  proj_type: str = "std",
  rules: plan_lib.Rules = (),
  projector: str = "subspace",
  iterations: Any = 1,
  refresh: str = "synchronous",
  basis_dtype: Any = "float32",
  state_dtype: Any = None,
  error_dtype: Any = None,
  param_shardings: Any = None,
  seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""LDAdam: AdamW in subspaces that move every step, with error feedback.

  With the gradient and the error so far, :math:`A_t = G_t + E_t`, a basis is
  found by an iteration from the last one,

  .. math::

    B_t = \rho P_{t-1} \hat{M}_{t-1} + (1 - \rho) A_t, \qquad
    P_t = \mathrm{orth}(B_t B_t^\top P_{t-1}),

  Adam's moments are carried over to it as by `moments="ldadam"` of
  :func:`galore_optax.galore`, and Adam goes on with :math:`P_t^\top A_t`. What
  the basis does not span is kept for the next step,

  .. math::

    E_{t+1} = A_t - P_t P_t^\top A_t + \frac{\beta_1}{1 - \beta_1}
      (P_{t-1} M_{t-1} - P_t P_t^\top P_{t-1} M_{t-1})

  (for the left side), where the last term is what carrying the momentum over
  has lost, of which later steps would have made this much.

  **The error is as large as the weights**: with a quarter of the rank the state
  is 7/8 of Adam's. The authors' code keeps it where PyTorch leaves the gradient
  between two steps, which is no place in JAX. `error_dtype="bfloat16"` halves
  it, and `error_feedback=False` has none, with a state as small as GaLore's.

  Two things differ from the authors' code: the first basis is found by eight
  iterations from a random one in place of an SVD, and the iteration is that of
  GaLore here, with a shift that keeps it from losing rank.

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Term outside of the root.
    weight_decay: Decoupled weight decay, of the full weights.
    mask: Which leaves are decayed, see :func:`galore_optax.galore_adamw`.
    rho: Share ρ of the momentum in what bases are found from.
    error_feedback: Whether what is lost is kept.
    rank: Rank r; see :func:`galore_optax.galore` for what is not told here.
    update_proj_gap: Steps between two refreshes of a basis; the paper's is 1.
    scale: Factor on the lifted updates; the paper has none.
    proj_type: Which side is projected.
    rules: Ordered rules for single leaves.
    projector: How a basis is found, `subspace` or `svd`.
    iterations: Iterations of a refresh but the first.
    refresh: `synchronous`, or `staggered`, which differs where gaps are longer.
    basis_dtype: Dtype of the bases, or `int4` or `int8`.
    state_dtype: Dtype of the moments.
    error_dtype: Dtype of the error; None for that of the weights, but float32
      at least.
    param_shardings: `jax.NamedSharding` for each parameter, on a mesh.
    seed: Seed of the bases before their first refresh.

  Returns:
    The optimizer. Leaves that are not projected get AdamW.

  Raises:
    ValueError: If an argument is out of its range; see also
      :func:`galore_optax.galore`.
    TypeError: See :func:`galore_optax.galore`.

  Example:
    >>> from galore_optax import ldadam, state_bytes
    >>> params = {"w": jnp.zeros((64, 512))}
    >>> size = lambda **how: state_bytes(
    ...   ldadam(1e-3, rank=16, **how).init(params)
    ... )
    >>> size() - size(error_feedback=False) == 4 * 64 * 512
    True

  References:
    Robert et al., `LDAdam: Adaptive Optimization from Low-Dimensional Gradient
    Statistics <https://arxiv.org/abs/2410.16103>`_, 2024, Algorithm 1.
  """
  checks.check_choice("refresh", refresh, POLICIES)
  checks.check_choice("projector", projector, ("subspace", "svd"))
  checks.check_positive("iterations", checks.required("iterations", iterations))
  checks.check_float_dtype("error_dtype", error_dtype)
  checks.check_eps(eps, state_dtype)
  _check_share("b1", b1)
  _check_share("rho", rho)
  checked = plan_lib.check_rules(rules)
  default: Mapping[str, Any] = {
    "rank": rank,
    "update_proj_gap": update_proj_gap,
    "scale": scale,
    "proj_type": proj_type,
  }

  def core(iterations: Any) -> optax.GradientTransformationExtraArgs:
    return galore(
      optax.scale_by_adam(b1, b2, eps),
      **default,
      rules=checked,
      projector=projector,
      iterations=iterations,
      refresh=refresh,
      moments="ldadam",
      basis_dtype=basis_dtype,
      state_dtype=state_dtype,
      param_shardings=param_shardings,
      seed=seed,
    )

  core(iterations)  # refuses what GaLore refuses
  partitions = sharding.partitions(param_shardings)
  settings = _LDAdam(
    core,
    plan_lib.Plan(
      checked, plan_lib.Projection(**default), partitions=partitions
    ),
    iterations,
    b1,
    rho,
    error_feedback,
    error_dtype,
  )
  return optax.chain(
    optax.GradientTransformationExtraArgs(
      settings.init, sharding.with_auto_axes(settings.update)
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def _check_share(name: str, value: Any) -> None:
  checks.check_number(name, checks.required(name, value))
  if not isinstance(value, jax.core.Tracer) and not 0 <= value < 1:
    raise ValueError(f"`{name}` must lie in [0, 1), got {value!r}.")
