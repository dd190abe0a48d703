r"""LDAdam: Adam in a subspace that moves every step, with error feedback.

The part of gradient and momentum that a step's basis does not span is stored at
full size and added to the next gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from galore_optax import checks
from galore_optax import context as context_lib
from galore_optax._galore import galore
from galore_optax.optimizers import options as options_lib
from galore_optax.optimizers.adam8bit import Mask
from galore_optax.optimizers.options import GaLoreOptions, recipe
from galore_optax.subspace import moments, projection
from galore_optax.subspace.refresh_settings import Refresh
from galore_optax.transform import axis_names
from galore_optax.transform.state import GaLoreState
from galore_optax.tree import paths, sharding, split
from galore_optax.tree import plan as plan_lib
from galore_optax.tree import rules as rules_lib

POLICIES = ("synchronous", "staggered")

# Subspace iterations from a random start that find the first basis.
_FIRST_ITERATIONS = 8


class LDAdamState(NamedTuple):
  """State of :func:`ldadam`, without that of its learning rate.

  Attributes:
    galore: Bases and moments, a :class:`galore_optax.GaLoreState`.
    error: Path of a projected leaf to the error: the part of gradients and
      momentum not applied so far, in the leaf's shape. Empty without error
      feedback.
  """

  galore: GaLoreState
  error: Any  # dtype=error_dtype


@dataclasses.dataclass(frozen=True)
class _LDAdam:
  """The settings of one transformation, and its two functions.

  Attributes:
    core: Makes GaLore around Adam, given the number of subspace iterations.
    plan: The plan of that GaLore.
    iterations: Subspace iterations of every refresh but the first.
    b1: Decay of the first moment.
    rho: Weight of the momentum in the matrices that bases are found from.
    error_feedback: Whether the error is stored.
    error_dtype: Dtype of the error, or None.
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
    projected = [path for path in state.projector if path in leaves]
    return LDAdamState(state, {p: self._zeros(leaves[p]) for p in projected})

  def update(
    self,
    updates: optax.Updates,
    state: LDAdamState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, LDAdamState]:
    """GaLore's update with gradient and error, and the new error."""
    leaves = paths.leaves_by_path(updates)
    sites = self.plan.sites_from_bases(
      leaves, projection.basis_shapes(state.galore.projector)
    )
    old = state.galore
    old_bases = {path: projection.read(old.projector[path]) for path in sites}
    # At full size: gradient plus error, and momentum.
    grads = {
      path: _with_error(site, leaves[path], state.error.get(path))
      for path, site in sites.items()
    }
    adam: Any = old.inner_state
    mu = adam.mu.low
    momentum = {p: projection.lift(mu[p], old_bases[p]) for p in sites}
    unbiased = jnp.where(old.step > 0, 1 - self.b1**old.step, 1)
    basis_grads = {
      path: self.rho * momentum[path] / unbiased + (1 - self.rho) * grads[path]
      for path in sites
    }
    context, extra_args = context_lib.split_off(extra_args)
    many = jnp.maximum(self.iterations, _FIRST_ITERATIONS)
    new_updates, new = context_lib.update_with(
      self.core(jnp.where(old.step == 0, many, self.iterations)),
      context._replace(basis_grads=basis_grads),
      paths.map_with_path(
        lambda path, g: (
          sites[path].view.from_stack(grads[path]) if path in sites else g
        ),
        updates,
      ),
      old,
      params,
      **extra_args,
    )
    new_updates = jax.tree.map(
      lambda x, g: x.astype(jnp.result_type(g)), new_updates, updates
    )
    error = {
      path: self._new_error(
        sites[path],
        grads[path],
        momentum[path],
        mu[path],
        old_bases[path],
        projection.read(new.projector[path]),
      ).astype(old_error.dtype)
      for path, old_error in state.error.items()
    }
    return new_updates, LDAdamState(new, error)

  def _new_error(
    self,
    site: plan_lib.Site,
    grad: jax.Array,
    momentum: jax.Array,
    mu: jax.Array,
    old_bases: projection.Bases,
    new_bases: projection.Bases,
  ) -> jax.Array:
    """The part of gradient and momentum that the new basis does not span."""
    overlap = projection.overlap(new_bases, old_bases)
    rotated = projection.lift(moments.rotate(mu, overlap, 1), new_bases)
    low = projection.project(grad, new_bases)
    residual = grad - projection.lift(low, new_bases)
    # Between refreshes no momentum is lost. A basis in few bits is not exactly
    # orthonormal, so that some would seem to be.
    refreshed = functools.reduce(
      jnp.logical_or,
      [
        jnp.any(new_bases[side] != old_bases[side], (-2, -1), keepdims=True)
        for side in new_bases
      ],
    )
    lost = jnp.where(refreshed, momentum - rotated, 0)
    return site.view.from_stack(residual + self.b1 / (1 - self.b1) * lost)

  def _zeros(self, like: Any) -> jax.Array:
    dtype = self.error_dtype or jnp.promote_types(
      jnp.result_type(like), jnp.float32
    )
    zeros = jnp.zeros(jnp.shape(like), dtype)
    return sharding.shard_like(zeros, like, lambda spec: spec)


def _with_error(site: plan_lib.Site, grad: jax.Array, error: Any) -> jax.Array:
  """Gradient plus error as matrices; a gradient that is not finite counts 0."""
  grad = site.view.as_stack(grad)
  grad = grad.astype(jnp.promote_types(grad.dtype, jnp.float32))
  finite = jnp.isfinite(grad).all((-2, -1), keepdims=True)
  grad = jnp.where(finite, grad, 0)
  if error is None:
    return grad
  return grad + site.view.as_stack(error).astype(grad.dtype)


@recipe(
  {
    "update_proj_gap": 1,
    "scale": 1.0,
    "refresh": Refresh(policy="synchronous", iterations=1, moments="ldadam"),
  },
  refused={
    "residual": "error feedback returns what the bases leave out",
    "accumulation_steps": options_lib.WHOLE_GRADIENT,
    "faithful": options_lib.OTHER_PAPER,
  },
)
def ldadam(
  learning_rate: optax.ScalarOrSchedule,
  b1: ArrayLike = 0.908,
  b2: ArrayLike = 0.99,
  eps: ArrayLike = 1e-8,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  mask: Mask | None = None,
  *,
  rho: ArrayLike = 0.908,
  error_feedback: bool = True,
  error_dtype: DTypeLike | None = None,
  **options: Unpack[GaLoreOptions],
) -> optax.GradientTransformationExtraArgs:
  r"""LDAdam: AdamW in subspaces that move every step, with error feedback.

  With the sum of gradient and error, :math:`A_t = G_t + E_t`, a basis is found
  by one iteration from the last basis,

  .. math::

    B_t = \rho P_{t-1} \hat{M}_{t-1} + (1 - \rho) A_t, \qquad
    P_t = \mathrm{orth}(B_t B_t^\top P_{t-1}),

  Adam's moments are carried into it as by `Refresh(moments="ldadam")`, and Adam
  continues with :math:`P_t^\top A_t`. The part that the basis does not span is
  stored for the next step,

  .. math::

    E_{t+1} = A_t - P_t P_t^\top A_t + \frac{\beta_1}{1 - \beta_1}
      (P_{t-1} M_{t-1} - P_t P_t^\top P_{t-1} M_{t-1})

  (for the left side). The last term is the momentum that is lost when it is
  carried into the new basis, times its weight in all later steps.

  **The error is as large as the weights**: with a quarter of the rank the state
  is 7/8 of Adam's. The authors' code stores it in the memory that PyTorch keeps
  for gradients between two steps, which JAX does not have.
  `error_dtype="bfloat16"` halves it. `error_feedback=False` drops it, for a
  state as small as GaLore's.

  Two things differ from the authors' code. The first basis is found by eight
  iterations from a random one instead of an SVD. And the iteration is this
  library's, with a shift that prevents it from losing rank.

  Args:
    learning_rate: Learning rate η, a float or a schedule of the step.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Term added to the root.
    weight_decay: Decoupled weight decay, of the full weights.
    mask: Which leaves are decayed, see :func:`galore_optax.galore_adamw`.
    rho: Weight ρ of the momentum in the matrices that bases are found from.
    error_feedback: Whether the error is stored and added to the next gradient.
    error_dtype: Dtype of the error; None for that of the weights, but at least
      float32.
    **options: GaLore's options, see :func:`galore_optax.galore`. The defaults
      that differ are the paper's: `update_proj_gap=1`, `scale=1.0` and
      `refresh=Refresh(policy="synchronous", iterations=1, moments="ldadam")`,
      where `iterations` does not apply to the first refresh.

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
  rules = rules_lib.check_rules(options.pop("rules", ()))
  rules_lib.refuse_tensors(rules, "`ldadam` keeps the errors of matrices")
  refresh: Any = options.pop("refresh", None)
  _check_refresh(refresh)
  checks.check_float_dtype("error_dtype", error_dtype)
  checks.check_eps(eps, options.get("state_dtype"))
  _check_weight("b1", b1)
  _check_weight("rho", rho)

  def core(iterations: Any) -> optax.GradientTransformationExtraArgs:
    return galore(
      optax.scale_by_adam(b1, b2, eps),
      rules=rules,
      refresh=dataclasses.replace(refresh, iterations=iterations),
      **options,
    )

  core(refresh.iterations)  # raises for what GaLore refuses
  settings = _LDAdam(
    core,
    options_lib.plan_of(rules, options),
    refresh.iterations,
    b1,
    rho,
    error_feedback,
    error_dtype,
  )
  return optax.chain(
    optax.GradientTransformationExtraArgs(
      settings.init,
      sharding.with_auto_axes(axis_names.unnamed(settings.update)),
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def _check_refresh(refresh: Refresh) -> None:
  checks.check_choice("refresh", refresh.policy, POLICIES)
  options_lib.check_finder("ldadam", refresh)
  options_lib.check_no_burst("ldadam", refresh)
  if refresh.moments != "ldadam" or refresh.random_from is not None:
    raise ValueError(
      '`ldadam` carries moments over by Refresh(moments="ldadam") into bases '
      f"that follow the momentum, got moments={refresh.moments!r} and "
      f"random_from={refresh.random_from!r}. Leave them out."
    )


def _check_weight(name: str, value: Any) -> None:
  checks.check_number(name, checks.required(name, value))
  if not isinstance(value, jax.core.Tracer) and not 0 <= value < 1:
    raise ValueError(f"`{name}` must lie in [0, 1), got {value!r}.")
