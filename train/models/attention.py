"""Causal attention, with the implementation that the device runs best.

    xla     plain products and a softmax, on any device; stores (T, T) scores
    cudnn   cuDNN's fused attention: NVIDIA GPUs, bfloat16
    splash  a fused Pallas kernel: TPUs
    auto    the fused implementation for the device, if it takes the shapes

The fused implementations store no scores: their memory grows with T, not T^2.

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

LANES = 128  # positions in the smallest tile of splash attention
HALF = (jnp.bfloat16, jnp.float16)


def attend(
  form: AttentionName,
  q_BxTxNxH: jax.Array,
  k_BxTxKxH: jax.Array,
  v_BxTxKxH: jax.Array,
  segments_BxT: jax.Array | None = None,
  window: int | jax.Array | None = None,
) -> jax.Array:
  """Causal attention: each position attends to itself and earlier ones.

  Args:
    form: `model.attention`.
    q_BxTxNxH: queries, after the rotary embedding.
    k_BxTxKxH: keys, after the rotary embedding.
    v_BxTxKxH: values.
    segments_BxT: numbers of the texts that share a row and do not attend to
      each other; None: a row is one text. With segments, `xla` is used.
    window: positions that a position attends to at most, with itself; None:
      all. An array () decides while the program runs, which takes `xla`.

  Returns:
    (B, T, N, H), in the dtype of the queries.

  Raises:
    UserError: the implementation cannot run on this device or these shapes.
  """
  varies = isinstance(window, jax.Array)
  form = choose(form, q_BxTxNxH, varies)
  if segments_BxT is not None or varies:
    mask = _mask(q_BxTxNxH.shape[1], segments_BxT, window)
    return jax.nn.dot_product_attention(
      q_BxTxNxH,
      k_BxTxKxH,
      v_BxTxKxH,
      mask=mask[:, None],
      is_causal=True,
      implementation="xla",
    )
  if form == "splash":
    return splash(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, window)
  return jax.nn.dot_product_attention(
    q_BxTxNxH,
    k_BxTxKxH,
    v_BxTxKxH,
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
    implementation="cudnn" if form == "cudnn" else "xla",
  )


def _mask(
  length: int,
  segments_BxT: jax.Array | None,
  window: int | jax.Array | None,
) -> jax.Array:
  """(B or 1, T, T) bool: the keys of each query, were it not for causality."""
  mask = jnp.ones((1, length, length), bool)
  if segments_BxT is not None:
    mask = segments_BxT[:, :, None] == segments_BxT[:, None]
  if window is not None:
    index_T = jnp.arange(length)
    mask &= index_T[:, None] - index_T < window
  return mask


def target() -> tuple[str, str]:
  """Platform and kind of the device that the program is traced for.

  That is a device of the current mesh, which may be of another machine when
  a program is compiled ahead of time; without a mesh, JAX's default device.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    device = jax.devices()[0]
  # Abstract devices of JAX 0.10.0 do not name their platform.
  named = getattr(device, "platform", None)
  return named or _platform(device.device_kind), device.device_kind


def _platform(kind: str) -> str:
  """The platform of a kind of device, such as "TPU v5e"."""
  if kind.startswith("TPU"):
    return "tpu"
  return "cpu" if kind == "cpu" else "gpu"


def _is_nvidia(kind: str) -> bool:
  return "NVIDIA" in kind  # the platform of AMD GPUs is "gpu", too


def _is_too_old() -> bool:
  """Whether the local GPU is older than Ampere, which cuDNN's kernel needs."""
  capability = getattr(jax.devices()[0], "compute_capability", "")
  major = capability.partition(".")[0]
  return major.isdigit() and int(major) < 8


def choose(
  form: AttentionName, q_BxTxNxH: jax.Array, varies: bool = False
) -> AttentionName:
  """Resolves `auto` to an implementation; checks one that is named.

  Args:
    form: `model.attention`.
    q_BxTxNxH: queries, or their shape and dtype.
    varies: whether layers have different windows.

  Raises:
    UserError: the named implementation cannot run.
  """
  if varies and form in ("splash", "cudnn"):
    raise UserError(
      f"model.attention={form} needs one window for all layers, and"
      " model.window_layers names some; use auto or xla"
    )
  if varies:
    return "xla"
  if form == "auto":
    return _best(q_BxTxNxH)
  _check(form, q_BxTxNxH)
  return form


def _best(q_BxTxNxH: jax.Array) -> AttentionName:
  """The fused implementation that takes these shapes, else `xla`."""
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
  """Raises unless the named implementation can run."""
  platform, kind = target()
  if form == "splash" and platform != "tpu":
    raise UserError(
      f"model.attention=splash runs on TPUs only, the device is {kind};"
      " use auto"
    )
  if form != "cudnn":
    return
  if not _is_nvidia(kind):
    raise UserError(
      f"model.attention=cudnn runs on NVIDIA GPUs only, the device is {kind};"
      " use auto"
    )
  if _is_too_old():
    raise UserError(
      "model.attention=cudnn needs an Ampere GPU or a newer one, the device is"
      f" {kind}; use auto"
    )
  width = q_BxTxNxH.shape[3]
  if q_BxTxNxH.dtype not in HALF or width % 8 or width > 256:
    raise UserError(
      "model.attention=cudnn needs bfloat16 heads whose width is a multiple of"
      f" 8 and at most 256, not {q_BxTxNxH.dtype} heads of {width} features;"
      " set model.dtype=bfloat16, or use auto"
    )


def splash(
  q_BxTxNxH: jax.Array,
  k_BxTxKxH: jax.Array,
  v_BxTxKxH: jax.Array,
  window: int | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Splash attention; each device computes its own rows and heads.

  Positions are padded to whole tiles. The padding comes after every real
  position, so the causal mask hides it.

  Args:
    q_BxTxNxH: queries.
    k_BxTxKxH: keys.
    v_BxTxKxH: values.
    window: positions that a position attends to at most; None: all.
    interpret: runs the kernel in Pallas's interpreter, on any device: tests.

  Returns:
    (B, T, N, H).
  """
  rows, length, _, width = q_BxTxNxH.shape
  missing = ((0, 0), (0, 0), (0, -length % LANES), (0, 0))
  heads_first = [
    jnp.pad(x.swapaxes(1, 2), missing)
    for x in (q_BxTxNxH / math.sqrt(width), k_BxTxKxH, v_BxTxKxH)
  ]
  run = functools.partial(_splash_local, window=window, interpret=interpret)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size > 1 and mesh.are_all_axes_auto:
    # The compiler cannot partition a Pallas kernel, so shard_map does.
    spec = _partition(rows, k_BxTxKxH.shape[2], mesh)
    run = jax.shard_map(
      run, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )
  return run(*heads_first)[:, :, :length].swapaxes(1, 2)


def _partition(
  rows: int, heads: int, mesh: jax.sharding.AbstractMesh
) -> PartitionSpec:
  """Divides rows over the batch axes and heads over `tensor`, if they fit."""
  shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  return PartitionSpec(
    BATCH_AXES if rows % shards == 0 else None,
    "tensor" if heads % mesh.shape["tensor"] == 0 else None,
  )


def _splash_local(q, k, v, window: int | None, interpret: bool) -> jax.Array:
  """Runs the kernel on (B, heads, T, H), where T is a multiple of LANES."""
  heads, length = q.shape[1:3]
  # The largest tile that divides the length: larger tiles are faster.
  tile = next(t for t in (512, 384, 256, LANES) if length % t == 0)
  sizes = splash_attention.BlockSizes(
    block_q=tile,
    block_kv=tile,
    block_q_dkv=tile,
    block_kv_dkv=tile,
    block_q_dq=tile,
    block_kv_dq=tile,
  )
  mask: Any = splash_attention.CausalMask((length, length))
  if window is not None:
    mask = splash_attention.LocalMask((length, length), (window - 1, 0), 0)
  kernel: Any = splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask([mask] * heads),
    block_sizes=sizes,
    interpret=interpret,
  )
  return jax.vmap(kernel)(q, k, v)
