"""A mixture of experts: feed-forward layers, of which each token takes some.

A router gives each token a probability of every expert. The K most probable
experts compute the token, and their outputs are added up, weighted by the
probabilities. No token is dropped, however many take the same expert.

The kernels of all experts are one array (E, rows, columns), and with the layers
(L, E, rows, columns): to GaLore each expert of each layer is a matrix with a
basis of its own. The router is not named `kernel`, as it is not one of the
matrices that are projected, quantized or adapted.

Names of local arrays end in their shape: M tokens, E experts, K experts of a
token, R = M * K pairs of a token and its expert, D d_model, F d_ff.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from train.config.schema import ModelConfig
from train.models import layers
from train.parallel.mesh import BATCH_AXES


class Experts(nnx.Module):
  """SwiGLU feed-forward layers and their router."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    d, ff, count = config.d_model, config.d_ff, config.n_experts

    def kernels(fan_in: int, fan_out: int, axes: tuple[str, str]) -> nnx.Linear:
      make = lambda rngs: layers.linear(
        config, fan_in, fan_out, axes, rngs, use_bias=False
      )
      return layers.stack(make, count, rngs, "experts")

    init = nnx.initializers.normal(config.init_std)
    dtype = jnp.dtype(config.param_dtype)
    self.router = nnx.Param(
      init(rngs.params(), (d, count), dtype), out_sharding=("embed", "experts")
    )
    self.gate = kernels(d, ff, ("embed", "mlp"))
    self.up = kernels(d, ff, ("embed", "mlp"))
    self.down = kernels(ff, d, ("mlp", "embed"))

  def __call__(
    self, x_MxD: jax.Array, rows: int, counted_M: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Applies to each token its experts.

    Args:
      x_MxD: tokens, one row after another.
      rows: of the batch.
      counted_M: 1 for each token that counts for the balance, 0 for padding;
        None: all do.

    Returns:
      (M, D); and what `balance_loss` adds up over the layers.
    """
    config, dtype = self.config, jnp.dtype(self.config.dtype)
    # In float32, as rounding would send tokens to other experts.
    logits_MxE = jnp.dot(
      x_MxD,
      self.router[...].astype(dtype),
      preferred_element_type=jnp.float32,
    )
    chances_MxE = jax.nn.softmax(logits_MxE)
    weights_MxK, chosen_MxK = jax.lax.top_k(
      chances_MxE, config.n_active_experts
    )
    if config.norm_topk_prob:
      weights_MxK /= weights_MxK.sum(-1, keepdims=True)
    kernels = (
      x.kernel[...].astype(dtype) for x in (self.gate, self.up, self.down)
    )
    y_MxD = _compute(config, rows)(x_MxD, weights_MxK, chosen_MxK, *kernels)
    return y_MxD, _sums(chances_MxE, chosen_MxK, counted_M)


def _compute(config: ModelConfig, rows: int) -> Callable[..., jax.Array]:
  """`_mix`, on a mesh on each device's own tokens and units.

  A sort over all devices would gather the tokens of the whole batch on each.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size == 1 or not mesh.are_all_axes_auto:
    return _mix
  shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  tokens = PartitionSpec(BATCH_AXES if rows % shards == 0 else None)
  axis = "tensor" if config.d_ff % mesh.shape["tensor"] == 0 else None
  inward = PartitionSpec(None, None, axis)
  outward = PartitionSpec(None, axis)
  return jax.shard_map(
    functools.partial(_mix, units_axis=axis),
    in_specs=(tokens, tokens, tokens, inward, inward, outward),
    out_specs=tokens,
  )


def _mix(
  x_MxD: jax.Array,
  weights_MxK: jax.Array,
  chosen_MxK: jax.Array,
  gate_ExDxF: jax.Array,
  up_ExDxF: jax.Array,
  down_ExFxD: jax.Array,
  units_axis: str | None = None,
) -> jax.Array:
  """The weighted sum of the outputs of each token's experts: (M, D).

  The pairs of a token and an expert are sorted by expert. `ragged_dot` then
  multiplies each run of rows by its expert's kernel. Its shapes are static, it
  has derivatives, and on TPUs and GPUs it is an instruction of XLA's own. A
  product with all experts (`einsum`) takes E / K times the FLOPs, 16 times in
  Qwen3-30B-A3B, and stores (E, M, F). On CPUs JAX makes such a product of
  `ragged_dot` anyway, and takes about as long as with `einsum`.

  Args:
    x_MxD: the tokens.
    weights_MxK: of the experts of each token, float32.
    chosen_MxK: their numbers.
    gate_ExDxF: kernels of the gates.
    up_ExDxF: kernels inwards.
    down_ExFxD: kernels outwards.
    units_axis: axis of the mesh that divides the units F, if any.
  """
  count, active = len(gate_ExDxF), chosen_MxK.shape[1]
  expert_R = chosen_MxK.reshape(-1)
  order_R = jnp.argsort(expert_R)
  sizes_E = jnp.bincount(expert_R, length=count)
  x_RxD = x_MxD[order_R // active]
  product = functools.partial(jax.lax.ragged_dot, group_sizes=sizes_E)
  h_RxF = jax.nn.silu(product(x_RxD, gate_ExDxF)) * product(x_RxD, up_ExDxF)
  y_RxD = product(h_RxF, down_ExFxD)
  y_MxKxD = y_RxD[jnp.argsort(order_R)].reshape(*chosen_MxK.shape, -1)
  y_MxD = jnp.einsum("mkd,mk->md", y_MxKxD, weights_MxK).astype(x_MxD.dtype)
  return jax.lax.psum(y_MxD, units_axis) if units_axis else y_MxD


def _sums(
  chances_MxE: jax.Array, chosen_MxK: jax.Array, counted_M: jax.Array | None
) -> jax.Array:
  """How often each expert is taken, and its summed probability: (2, E)."""
  experts = jnp.arange(chances_MxE.shape[1])
  taken_MxE = (chosen_MxK[..., None] == experts).sum(1).astype(jnp.float32)
  both = jnp.stack([taken_MxE, chances_MxE])
  if counted_M is not None:
    both *= counted_M[:, None]
  return both.sum(1)


def balance_loss(
  config: ModelConfig, sums_2xE: jax.Array, tokens: jax.Array
) -> jax.Array:
  r"""The load-balancing loss: K if all experts are taken equally often.

  .. math:: E \sum_e f_e P_e

  with the share :math:`f_e` of tokens that take an expert and its mean
  probability :math:`P_e`, both over all layers together, as in `transformers`.
  Switch Transformer (arXiv 2101.03961), equations (4) to (6).

  Args:
    config: of the model.
    sums_2xE: what `Experts` returns, added up over the layers.
    tokens: number of tokens that count.
  """
  pairs = config.n_layers * jnp.maximum(tokens, 1).astype(jnp.float32)
  return config.n_experts * (sums_2xE[0] * sums_2xE[1]).sum() / pairs**2
