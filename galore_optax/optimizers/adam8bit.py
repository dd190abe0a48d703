"""Adam with moments in eight bits."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from galore_optax import checks
from galore_optax.quantization import qarray
from galore_optax.tree import boxes, sharding

# A tree of bools in the parameters' structure, or a function that makes one.
Mask = Any | Callable[[optax.Params], Any]

# Smaller leaves gain little. The number is that of bitsandbytes.
MIN_SIZE = 4096

# Half the smallest value of the unsigned code. Smaller second moments are
# rounded to zero; the step of their element would be divided by ε alone.
_SMALLEST = 1.625e-7


class ScaleByAdam8bitState(NamedTuple):
  """State of :func:`scale_by_adam_8bit`.

  Attributes:
    count: Updates so far.
    mu: First moments, :class:`galore_optax.QArray` or float32 for small leaves.
    nu: Second moments, in the same formats.
  """

  count: Any  # shape=(), dtype=jnp.int32
  mu: optax.Updates
  nu: optax.Updates


def scale_by_adam_8bit(
  b1: ArrayLike = 0.9,
  b2: ArrayLike = 0.999,
  eps: ArrayLike = 1e-8,
  *,
  min_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adam with moments in eight bits.

  As `optax.scale_by_adam`, but between steps both moments are stored as dynamic
  8-bit codes, relative to the largest magnitude in each block of 256 elements.
  The codes of the first moment are signed, those of the second unsigned:

  .. math::

    m_t &= \beta_1 D(M_{t-1}) + (1 - \beta_1) g_t, \quad
    v_t = \beta_2 D(V_{t-1}) + (1 - \beta_2) g_t^2 \\
    u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} +
      \varepsilon}, \quad M_t = Q(m_t), \quad V_t = Q(v_t)

  with rounding Q and its inverse D. The step uses the moments before they are
  rounded. A second moment that was rounded to zero counts as half of the
  smallest code above zero.

  Args:
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Term ε added to the root.
    min_size: Leaves with fewer elements, and complex leaves of any size, have
      float32 moments; None means 4096.

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
    size = MIN_SIZE if min_size is None else min_size
    zeros = lambda kind: boxes.put_inside(
      jax.tree.map(lambda x: _zeros(x, kind, size), params)
    )
    return ScaleByAdam8bitState(
      jnp.zeros([], jnp.int32), zeros("dynamic"), zeros("unsigned_dynamic")
    )

  def update(
    updates: optax.Updates,
    state: ScaleByAdam8bitState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, ScaleByAdam8bitState]:
    del params, extra_args
    count = optax.safe_increment(state.count)
    correction1, correction2 = 1 - b1**count, 1 - b2**count

    def update_leaf(
      g: jax.Array, mu: Any, nu: Any
    ) -> tuple[jax.Array, Any, Any]:
      is_complex = jnp.issubdtype(g.dtype, jnp.complexfloating)
      wide = g.astype(jnp.complex64 if is_complex else jnp.float32)
      m: Any = b1 * _read(mu) + (1 - b1) * wide
      v: Any = b2 * _read(nu) + (1 - b2) * jnp.real(wide * jnp.conj(wide))
      step = (m / correction1) / (jnp.sqrt(v / correction2) + eps)
      return step.astype(g.dtype), _write(mu, m), _write(nu, v)

    flat, treedef = jax.tree.flatten(updates)
    mus, nus = (
      treedef.flatten_up_to(boxes.put_outside(x)) for x in (state.mu, state.nu)
    )
    leaves = [update_leaf(*x) for x in zip(flat, mus, nus, strict=True)]
    new, mu, nu = zip(*leaves, strict=True) if leaves else ((), (), ())
    return treedef.unflatten(new), ScaleByAdam8bitState(
      count, *(boxes.put_inside(treedef.unflatten(x)) for x in (mu, nu))
    )

  return optax.GradientTransformationExtraArgs(
    init, sharding.with_auto_axes(update)
  )


def adamw_8bit(
  learning_rate: optax.ScalarOrSchedule,
  b1: ArrayLike = 0.9,
  b2: ArrayLike = 0.999,
  eps: ArrayLike = 1e-8,
  weight_decay: optax.ScalarOrSchedule = 1e-4,
  mask: Mask | None = None,
  *,
  min_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  """AdamW with moments in eight bits, at full rank.

  8-bit GaLore is compared with it; :func:`galore_optax.galore_adamw_8bit` is
  GaLore around it.

  Args:
    learning_rate: Learning rate, a float or a schedule of the step.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Term added to the root.
    weight_decay: Decoupled weight decay.
    mask: Which leaves are decayed: a tree of bools in the parameters'
      structure, or a function that makes one; None for all leaves.
    min_size: Leaves with fewer elements have float32 moments; None means 4096.

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
  """Zero moments, sharded like the parameter."""
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
    x = jnp.maximum(x, qarray.elementwise_scale(moment) * _SMALLEST)
  return x


def _write(moment: Any, x: jax.Array) -> Any:
  if not qarray.is_quantized(moment):
    return x.astype(moment.dtype)
  return qarray.requantize(moment, x)
