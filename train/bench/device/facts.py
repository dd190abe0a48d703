"""What JAX finds: the device, its memory, its rate of matrix products."""

import os
import time
from typing import Any

import jax
import jax.numpy as jnp

from train.bench.device.rows import Settings
from train.common import units

# The part of a GPU's memory that a process takes as its pool.
FRACTION = "XLA_CLIENT_MEM_FRACTION"
ALL = 0.9  # for processes that may have all of it
# Other settings of the pool, of which a user may have set some.
OTHERS = (
  "XLA_PYTHON_CLIENT_MEM_FRACTION",  # the old name; both raise
  "XLA_PYTHON_CLIENT_ALLOCATOR",
  "XLA_PYTHON_CLIENT_PREALLOCATE",
)


def environment(fraction: float = ALL) -> dict[str, str]:
  """Variables of a process whose pool is a fraction of a GPU's memory."""
  kept = {k: v for k, v in os.environ.items() if k not in OTHERS}
  return kept | {FRACTION: f"{fraction:.4f}"}


def describe(settings: Settings) -> dict[str, Any]:
  """The first device.

  Returns:
    `platform`, `kind`, `count` of devices, `memory` (bytes, None if unknown),
    `flops` (a second, of matrix products in `dtype`), `dtype`.
  """
  device = jax.devices()[0]
  dtype = "float32" if device.platform == "cpu" else "bfloat16"
  return {
    "platform": device.platform,
    "kind": device.device_kind,
    "count": jax.device_count(),
    "memory": _memory(device),
    "dtype": dtype,
    "flops": _rate(256 if settings.quick else 1024, dtype, device.platform),
  }


def _memory(device: jax.Device) -> int | None:
  """Bytes of the device; of a CPU, what the machine has free."""
  if device.platform == "cpu":
    return _free_bytes()
  limit = (device.memory_stats() or {}).get("bytes_limit")
  if limit is None or device.platform != "gpu":
    return limit
  # The pool is this part of a GPU.
  return int(limit / float(os.environ[FRACTION]))


def _free_bytes() -> int | None:
  try:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
  except (AttributeError, ValueError, OSError):
    return None


def _rate(size: int, dtype: str, platform: str) -> float:
  """FLOPs a second of a large product, the best of three."""
  size = size if platform == "cpu" else 8 * size
  x = jnp.ones((size, size), dtype)
  run = jax.jit(jnp.matmul)
  jax.block_until_ready(run(x, x))
  seconds = []
  for _ in range(3):
    begin = time.perf_counter()
    jax.block_until_ready(run(x, x))
    seconds.append(time.perf_counter() - begin)
  return 2.0 * size**3 / min(seconds)


def sentence(facts: dict[str, Any]) -> str:
  """One line that describes the device."""
  memory = facts["memory"]
  known = "" if memory is None else f", {memory / units.GIB:.1f} GiB"
  return (
    f"{facts['kind']} ({facts['platform']}){known};"
    f" {facts['flops'] / 1e12:.3g} TFLOP/s of products in {facts['dtype']}"
  )
