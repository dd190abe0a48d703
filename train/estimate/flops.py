"""FLOPs of a model and an optimizer, and the peak FLOPs of devices.

MFU is model FLOPs utilization: three times the matrix products of the forward
pass (the backward pass takes two for each one), without what is recomputed,
divided by the peak of the devices. Attention counts in full, as in the PaLM
paper (arXiv 2204.02311, appendix B), though half of it is masked.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.extend import core

from train.estimate import jaxpr_cost
from train.methods import registry
from train.methods.options import OptimizerConfig
from train.step import losses as losses_lib
from train.step.adapters import Adapters

# Dense bfloat16 FLOPs a second of one JAX device, at its `device_kind`, with
# float32 accumulation. TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (a
# device is a chip). NVIDIA: the products' data sheets, without sparsity, and
# for GeForce the Ada and Ampere GA102 whitepapers (appendix A).
PEAKS: tuple[tuple[str, float], ...] = (
  (r"TPU v4", 275e12),
  (r"TPU v5 ?(lite|e)", 197e12),
  (r"TPU v5p?", 459e12),
  (r"TPU v6 ?(lite|e)", 918e12),
  (r"A100\b", 312e12),
  (r"H100 NVL", 835e12),
  (r"H100 PCIe", 756e12),
  (r"(H100|H200|GH200)", 989e12),
  (r"L40S", 362e12),
  (r"L4\b", 121e12),
  (r"RTX 4090", 165.2e12),
  (r"RTX 3090", 71e12),
)


def peak(device_kind: str) -> float:
  """Peak bfloat16 FLOPs a second of a device; nan if it is not known."""
  for pattern, flops in PEAKS:
    if re.search(pattern + "(?! Ti)", device_kind):
      return flops
  return math.nan


def utilization(tokens_per_second: float, forward: float) -> float:
  """MFU of the devices in use; nan if their peak is not known.

  Args:
    tokens_per_second: of all devices together.
    forward: FLOPs a token of the forward pass.
  """
  devices = jax.devices()
  best = len(devices) * peak(devices[0].device_kind)
  return 3 * forward * tokens_per_second / best


def trace_loss(
  graphdef: nnx.GraphDef, weights: dict, rows: int, length: int, gradient: bool
) -> core.Jaxpr:
  """The jaxpr of a batch's mean loss, or of its gradient.

  Args:
    graphdef: the model's structure.
    weights: shapes of its parameters.
    rows: in the batch.
    length: tokens a row that are predicted.
    gradient: whether to trace the gradient.
  """

  def loss(params: Any, rows: jax.Array) -> jax.Array:
    return losses_lib.token_losses(graphdef, params, rows).mean()

  batch = jax.ShapeDtypeStruct((rows, length + 1), jnp.int32)
  run = jax.grad(loss) if gradient else loss
  return jax.make_jaxpr(run)(weights, batch).jaxpr


def forward_per_token(
  graphdef: nnx.GraphDef, weights: dict, length: int
) -> float:
  """FLOPs a token of the forward pass, over rows of `length` tokens."""
  program = trace_loss(graphdef, weights, 1, length, gradient=False)
  return jaxpr_cost.count_flops(program) / length


def recompute_per_token(
  graphdef: nnx.GraphDef, weights: dict, length: int, forward: float
) -> float:
  """FLOPs a token of what the backward pass computes a second time.

  Args:
    graphdef: the model's structure.
    weights: shapes of its parameters.
    length: tokens a row.
    forward: what `forward_per_token` gives.
  """
  program = trace_loss(graphdef, weights, 1, length, gradient=True)
  return max(0.0, jaxpr_cost.count_flops(program) / length - 3 * forward)


def update_every_step(
  tx: optax.GradientTransformationExtraArgs, params: Any
) -> int:
  """FLOPs of the optimizer's matrix products in a step without a refresh.

  For GaLore these are the projections and the lifts, for Muon the
  Newton-Schulz iterations.
  """
  state = jax.eval_shape(tx.init, params)
  traced = jax.make_jaxpr(tx.update)(params, state, params)
  return jaxpr_cost.count_flops(traced.jaxpr, min)


def adapters_every_step(adapters: Adapters, params: Any) -> int:
  """FLOPs of multiplying factors, and of the gradient of those products.

  Args:
    adapters: how weights are divided into frozen and trained ones.
    params: `frozen` and `adapters`, or their shapes.
  """

  def both(params: Any) -> Any:
    weights, back = adapters.differentiable(params)
    return back(weights)

  return jaxpr_cost.count_flops(jax.make_jaxpr(both)(params).jaxpr)


def refresh(rows: Iterable[Any], config: OptimizerConfig) -> float:
  """FLOPs of refreshing every basis once, with the moments.

  In a burst, each of its steps takes one iteration and rotates the moments. An
  iteration of subspace iteration takes two products with the gradient and
  three passes of CholeskyQR. An SVD takes 6 m n^2 + 20 n^3 for m >= n (Golub
  and Van Loan, Matrix Computations, 4th ed., figure 8.6.1, thin, by R-SVD).

  Args:
    rows: rows of `galore_optax.describe`; those at full rank cost nothing.
    config: how a basis is found, and how moments are carried into it.
  """
  method = registry.get(config.name)
  if method.random_bases:
    return 0.0
  exact = method.published or config.projector == "svd"
  rotates = not method.published and config.moments in ("rotate", "ldadam")
  iterations = 0 if exact else 1 if config.burst else method.iterations
  total = 0.0
  for row in rows:
    if row.rank is None:
      continue
    *stack, m, n = row.shape
    total += math.prod(stack) * sum(
      _find(m, n, size, row.rank, iterations)
      + (rotates and _rotate(m, n, size, row))
      for size in _basis_lengths(row)
    )
  return total * (config.burst or 1)


def _basis_lengths(row: Any) -> list[int]:
  """Lengths of the vectors of each basis."""
  *_, m, n = row.shape
  return {"left": [m], "right": [n], "both": [m, n]}[row.side]


def _find(m: int, n: int, size: int, rank: int, iterations: int) -> float:
  if not iterations:
    long, short = max(m, n), min(m, n)
    return 6 * long * short**2 + 20 * short**3
  # The Gram matrix, its inverse factor, and the product with that.
  passes = 3 * (4 * size * rank**2 + 4 / 3 * rank**3)
  return iterations * (4 * m * n * rank + passes)


def _rotate(m: int, n: int, size: int, row: Any) -> float:
  """The overlap of two bases, and two moments rotated by it."""
  rank = row.rank or 0
  other = rank if row.side == "both" else m * n // size
  return 2 * size * rank**2 + 2 * 2 * rank**2 * other
