"""Adam whose moments are kept in eight bits."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks
from galore_optax.quantization import qarray
from galore_optax.tree import sharding

# Smaller leaves gain little; that of bitsandbytes.
MIN_SIZE = 4096

# Below half the smallest value of the unsigned code a second moment would be
# lost, and the step of its element divided by epsilon alone.
_LEAST = 1.625e-7


class ScaleByAdam8bitState(NamedTuple):
  """State of :func:`scale_by_adam_8bit`.

  Attributes:
    count: Updates so far.
    mu: First moments, :class:`galore_optax.QArray` or float32 for small leaves.
    nu: Second moments likewise.
  """

  count: Any  # shape=(), dtype=jnp.int32
  mu: optax.Updates
  nu: optax.Updates


def scale_by_adam_8bit(
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  *,
  min_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adam with moments in eight bits.

  As `optax.scale_by_adam`, but between steps both moments are kept as dynamic
  8-bit codes relative to the largest magnitude of each block of 256 elements,
  signed for the first and unsigned for the second:

  .. math::

    m_t &= \beta_1 D(M_{t-1}) + (1 - \beta_1) g_t, \quad
    v_t = \beta_2 D(V_{t-1}) + (1 - \beta_2) g_t^2 \\
    u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} +
      \varepsilon}, \quad M_t = Q(m_t), \quad V_t = Q(v_t)

  The step uses the moments before they are rounded. A second moment that was
  rounded to zero counts as half of the smallest one that is not.

  Args:
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Term ε outside of the root.
    min_size: Leaves with fewer elements keep float32 moments; None for 4096.
      Complex ones do, whatever their size.

  Returns:
    The gradient transformation.

  Raises:
    ValueError: If `min_size` is negative.

  Example:
    >>> params = {"w": jnp.zeros((256, 1024)), "bias": jnp.zeros(1024)}
    >>> state = scale_by_adam_8bit().init(params)
    >>> state.mu["w"].codes.dtype.name, state.mu["bias"].dtype.name
    ('int8', 'float32')

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2022.
  """
  checks.check_number("min_size", min_size)
  traced = isinstance(min_size, jax.core.Tracer)
  if min_size is not None and not traced and min_size < 0:
    raise ValueError(f"`min_size` must not be negative, got {min_size}.")

  def init(params: optax.Params) -> ScaleByAdam8bitState:
    if traced:
      raise ValueError(
        "`min_size` decides the structure of the state and cannot be traced "
        f"by `init`, got {min_size}. Under `optax.inject_hyperparams`, pass "
        "static_args=('min_size',), or call `init` outside of `jax.jit`."
      )
    least_size = MIN_SIZE if min_size is None else min_size
    make = lambda kind: jax.tree.map(
      lambda x: _zeros(x, kind, least_size), params
    )
    return ScaleByAdam8bitState(
      jnp.zeros([], jnp.int32), make("dynamic"), make("unsigned_dynamic")
    )

  def update(
    updates: optax.Updates,
    state: ScaleByAdam8bitState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, ScaleByAdam8bitState]:
    del params, extra_args
    count = optax.safe_increment(state.count)
    fix1, fix2 = 1 - b1**count, 1 - b2**count

    def one(g: jax.Array, mu: Any, nu: Any) -> tuple[jax.Array, Any, Any]:
      is_complex = jnp.issubdtype(g.dtype, jnp.complexfloating)
      wide = g.astype(jnp.complex64 if is_complex else jnp.float32)
      m = b1 * _read(mu) + (1 - b1) * wide
      v = b2 * _read(nu) + (1 - b2) * jnp.real(wide * jnp.conj(wide))
      step = (m / fix1) / (jnp.sqrt(v / fix2) + eps)
      return step.astype(g.dtype), _write(mu, m), _write(nu, v)

    flat, treedef = jax.tree.flatten(updates)
    mus, nus = treedef.flatten_up_to(state.mu), treedef.flatten_up_to(state.nu)
    found = [one(*each) for each in zip(flat, mus, nus, strict=True)]
    new, mu, nu = zip(*found, strict=True) if found else ((), (), ())
    return treedef.unflatten(new), ScaleByAdam8bitState(
      count, treedef.unflatten(mu), treedef.unflatten(nu)
    )

  return optax.GradientTransformationExtraArgs(
    init, sharding.with_auto_axes(update)
  )


def adamw_8bit(
  learning_rate: Any,
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  weight_decay: Any = 1e-4,
  mask: Any = None,
  *,
  min_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  """AdamW with moments in eight bits, at full rank.

  The baseline that 8-bit GaLore is compared with; for GaLore around it see
  :func:`galore_optax.galore_adamw_8bit`.

  Args:
    learning_rate: Learning rate, a float or a schedule of the step.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Term outside of the root.
    weight_decay: Decoupled weight decay.
    mask: Which leaves are decayed: a tree of bools in the parameters'
      structure, or a function that makes one; None for all.
    min_size: Leaves with fewer elements keep float32 moments; None for 4096.

  Returns:
    The optimizer.

  Raises:
    ValueError: If `min_size` is negative.

  Example:
    >>> from galore_optax import state_bytes
    >>> params = {"w": jnp.zeros((1024, 1024))}
    >>> small = state_bytes(adamw_8bit(1e-3).init(params))
    >>> round(small / state_bytes(optax.adamw(1e-3).init(params)), 2)
    0.25

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2022.
  """
  return optax.with_extra_args_support(
    optax.chain(
      scale_by_adam_8bit(b1, b2, eps, min_size=min_size),
      optax.add_decayed_weights(weight_decay, mask),
      optax.scale_by_learning_rate(learning_rate),
    )
  )


def _zeros(like: Any, kind: str, min_size: int) -> Any:
  """Zero moments, where the parameter lives."""
  shape = jnp.shape(like)
  is_complex = jnp.issubdtype(jnp.result_type(like), jnp.complexfloating)
  if not shape or math.prod(shape) < min_size or is_complex:
    is_mean = is_complex and kind == "dynamic"
    zeros = jnp.zeros(shape, jnp.complex64 if is_mean else jnp.float32)
    return sharding.shard_like(zeros, like, lambda spec: spec)
  q = qarray.zeros(shape, kind)
  return sharding.shard_quantized_like(q, like, lambda spec: spec)


def _read(moment: Any) -> jax.Array:
  if not qarray.is_quantized(moment):
    return moment
  x = qarray.dequantize(moment)
  if moment.kind == "unsigned_dynamic":
    x = jnp.maximum(x, qarray.elementwise_scale(moment) * _LEAST)
  return x


def _write(moment: Any, x: jax.Array) -> Any:
  if not qarray.is_quantized(moment):
    return x.astype(moment.dtype)
  return qarray.requantize(moment, x)
