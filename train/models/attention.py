"""Causal attention: what is computed once, how it is computed by the device.

    xla     plain products and a softmax, anywhere; (T, T) scores are in memory
    cudnn   cuDNN's fused attention: NVIDIA GPUs, bfloat16
    splash  a fused Pallas kernel: TPUs
    auto    the fused form of the device at hand where it takes the shapes

The fused forms keep no scores: their memory grows with T, not with T^2.

Array names end in their shape: B rows, T positions, N query heads, K key and
value heads (query head i reads head i // (N / K)), H head width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from train.common.errors import UserError
from train.config.schema import AttentionName
from train.parallel.mesh import BATCH_AXES

LANES = 128  # splash works on tiles of so many positions
HALF = (jnp.bfloat16, jnp.float16)


def attend(
  form: AttentionName,
  q_BxTxNxH: jax.Array,
  k_BxTxKxH: jax.Array,
  v_BxTxKxH: jax.Array,
  segments_BxT: jax.Array | None = None,
) -> jax.Array:
  """Each position's mix of the values up to its own.

  Args:
    form: `model.attention`.
    q_BxTxNxH: queries, turned to their positions.
    k_BxTxKxH: keys, turned to their positions.
    v_BxTxKxH: values.
    segments_BxT: numbers of the texts that share a row, which do not see each
      other; None: a row is one text. With them the fused forms are not taken.

  Returns:
    (B, T, N, H), in the dtype of the queries.

  Raises:
    UserError: the form cannot run on this device, or not on these shapes.
  """
  form = choose(form, q_BxTxNxH)
  if segments_BxT is not None:
    same_BxTxT = segments_BxT[:, :, None] == segments_BxT[:, None]
    return jax.nn.dot_product_attention(
      q_BxTxNxH,
      k_BxTxKxH,
      v_BxTxKxH,
      mask=same_BxTxT[:, None],
      is_causal=True,
      implementation="xla",
    )
  if form == "splash":
    return splash(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH)
  library = "cudnn" if form == "cudnn" else "xla"
  return jax.nn.dot_product_attention(
    q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, is_causal=True, implementation=library
  )


def target() -> tuple[str, str]:
  """Platform and kind of the devices that are traced for.

  Those of the mesh in use, which may be another machine's when a program is
  compiled ahead of time, else JAX's default device.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None or device.platform is None:
    device = jax.devices()[0]
  return device.platform, device.device_kind


def _is_nvidia(kind: str) -> bool:
  return "NVIDIA" in kind  # AMD's are the platform "gpu" as well


def _is_too_old() -> bool:
  """Whether the device here is older than cuDNN's kernel asks for, Ampere."""
  found = getattr(jax.devices()[0], "compute_capability", "")
  major = found.partition(".")[0]
  return major.isdigit() and int(major) < 8


def choose(form: AttentionName, q_BxTxNxH: jax.Array) -> AttentionName:
  """The form that is meant on these devices: never `auto`.

  Raises:
    UserError: it was asked for by name and cannot run.
  """
  if form == "auto":
    return _best(q_BxTxNxH)
  _check(form, q_BxTxNxH)
  return form


def _best(q_BxTxNxH: jax.Array) -> AttentionName:
  """The fused form that takes these shapes on these devices, else `xla`."""
  length, width = q_BxTxNxH.shape[1], q_BxTxNxH.shape[3]
  platform, kind = target()
  if platform == "tpu" and length % LANES == 0:
    return "splash"
  half = q_BxTxNxH.dtype in HALF
  fits = half and width % 8 == 0 and width <= 128
  if _is_nvidia(kind) and fits and not _is_too_old():
    return "cudnn"
  return "xla"


def _check(form: AttentionName, q_BxTxNxH: jax.Array) -> None:
  """Refuses a form that was asked for by name where it cannot run."""
  platform, kind = target()
  if form == "splash" and platform != "tpu":
    raise UserError(
      f"model.attention=splash runs on TPUs, the device is {kind}; use auto"
    )
  if form != "cudnn":
    return
  if not _is_nvidia(kind):
    raise UserError(
      f"model.attention=cudnn runs on NVIDIA GPUs, the device is {kind};"
      " use auto"
    )
  if _is_too_old():
    raise UserError(
      f"model.attention=cudnn needs an Ampere GPU or a later one, the device"
      f" is {kind}; use auto"
    )
  width = q_BxTxNxH.shape[3]
  if q_BxTxNxH.dtype not in HALF or width % 8 or width > 256:
    raise UserError(
      "model.attention=cudnn takes bfloat16 heads whose width is a multiple"
      f" of 8 up to 256, not {q_BxTxNxH.dtype} heads of {width} features;"
      " set model.dtype=bfloat16, or use auto"
    )


def splash(
  q_BxTxNxH: jax.Array,
  k_BxTxKxH: jax.Array,
  v_BxTxKxH: jax.Array,
  interpret: bool = False,
) -> jax.Array:
  """Splash attention on each device's rows and heads.

  Positions are filled up to whole tiles: what is added lies in the future of
  every real position, so it changes none.

  Args:
    q_BxTxNxH: queries.
    k_BxTxKxH: keys.
    v_BxTxKxH: values.
    interpret: run the kernel step by step, on any device: for tests.

  Returns:
    (B, T, N, H).
  """
  rows, length, _, width = q_BxTxNxH.shape
  missing = ((0, 0), (0, 0), (0, -length % LANES), (0, 0))
  heads_first = [
    jnp.pad(x.swapaxes(1, 2), missing)
    for x in (q_BxTxNxH / math.sqrt(width), k_BxTxKxH, v_BxTxKxH)
  ]
  run = functools.partial(_splash_local, interpret=interpret)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size > 1 and mesh.are_all_axes_auto:
    # The compiler cannot split a kernel: each device is given its own part.
    spec = _split(rows, k_BxTxKxH.shape[2], mesh)
    run = jax.shard_map(
      run, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )
  return run(*heads_first)[:, :, :length].swapaxes(1, 2)


def _split(
  rows: int, heads: int, mesh: jax.sharding.AbstractMesh
) -> PartitionSpec:
  """Rows over the batch's axes and heads over tensor, where they divide."""
  shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  return PartitionSpec(
    BATCH_AXES if rows % shards == 0 else None,
    "tensor" if heads % mesh.shape["tensor"] == 0 else None,
  )


def _splash_local(q, k, v, interpret: bool) -> jax.Array:
  """The kernel on (B, heads, T, H), T a multiple of LANES."""
  heads, length = q.shape[1:3]
  # The largest tile up to 512 that divides the length: larger ones run faster.
  tile = next(t for t in (512, 384, 256, LANES) if length % t == 0)
  sizes = splash_attention.BlockSizes(
    block_q=tile,
    block_kv=tile,
    block_q_dkv=tile,
    block_kv_dkv=tile,
    block_q_dq=tile,
    block_kv_dq=tile,
  )
  causal = splash_attention.CausalMask((length, length))
  kernel: Any = splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask([causal] * heads),
    block_sizes=sizes,
    interpret=interpret,
  )
  return jax.vmap(kernel)(q, k, v)
