"""Accelerators to compile for; none of them has to be present.

    tpu:v5e  tpu:v6e  tpu:v5p          one chip
    tpu:v5e:4x4                        a slice, by its topology
    gpu:rtx4090  gpu:h100  gpu:a100    one card
    gpu:h100:8                         a node of eight
    gpu:FILE.txtpb                     a GpuTargetConfigProto in text form

The programs are compiled by the real compilers: XLA's TPU compiler in libtpu,
and its GPU compiler in the CUDA plugin. Nothing is executed.
"""

import dataclasses
import importlib.util
import os
import pathlib
from typing import Any

# Set before jax is imported, so that it neither looks for accelerators nor
# claims them.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  # Allows several compilations at the same time.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_MIN_LOG_LEVEL": "3",
  "TF_CPP_MIN_LOG_LEVEL": "2",
}
for _name, _value in ENVIRONMENT.items():
  os.environ.setdefault(_name, _value)

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from train.common.errors import UserError  # noqa: E402
from train.common.units import GIB  # noqa: E402

# Memory in GiB that a program can use, from the compiler's message for one that
# does not fit. It excludes what the runtime keeps for itself.
TPU_USABLE = {"v5e": 15.75, "v6e": 31.25, "v5p": 95.74}

# Public figures of the cards, in the fields of a GpuTargetConfigProto.
GPUS: dict[str, dict[str, Any]] = {
  "rtx4090": {
    "name": "NVIDIA GeForce RTX 4090",
    "capability": (8, 9),
    "cores": 128,
    "bandwidth": 1_008_096_000_000,
    "clock": 2.52,
    "memory": 25_282_281_472,
    "l2": 75_497_472,
    "shared": (49_152, 102_400, 101_376),
    "threads_per_core": 1536,
  },
  "a100": {
    "name": "NVIDIA A100-SXM4-80GB",
    "capability": (8, 0),
    "cores": 108,
    "bandwidth": 2_039_000_000_000,
    "clock": 1.41,
    "memory": 85_094_825_984,
    "l2": 41_943_040,
    "shared": (49_152, 167_936, 166_912),
    "threads_per_core": 2048,
  },
  "h100": {
    "name": "NVIDIA H100 80GB HBM3",
    "capability": (9, 0),
    "cores": 132,
    "bandwidth": 3_352_320_000_000,
    "clock": 1.98,
    "memory": 84_978_434_048,
    "l2": 52_428_800,
    "shared": (49_152, 233_472, 232_448),
    "threads_per_core": 2048,
  },
}

_PROTO = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {shared[0]}
  shared_memory_per_core: {shared[1]}
  threads_per_core_limit: {threads_per_core}
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {shared[2]}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  name: "{name}"
  driver_version: "12.9.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices that a program can be compiled for.

  Attributes:
    name: name as the user wrote it.
    platform: platform for lowering, `tpu` or `cuda`.
    devices: descriptions of devices, without hardware.
    usable: usable bytes of memory of one device; None if they are not known.
    compiler: name of the compiler, for the report.
  """

  name: str
  platform: str
  devices: list[Any]
  usable: int | None
  compiler: str


def find(name: str) -> Target:
  """The target of a given name.

  Raises:
    UserError: the name is unknown, or its compiler is not installed.
  """
  kind, _, rest = name.partition(":")
  if kind == "tpu" and rest:
    return _tpu(name, rest)
  if kind == "gpu" and rest:
    return _gpu(name, rest)
  raise UserError(
    f"--target {name!r} is unknown; give tpu:{{{','.join(TPU_USABLE)}}}, with"
    f" a topology such as tpu:v5e:4x4 for a slice, gpu:{{{','.join(GPUS)}}} or"
    " gpu:FILE with a GpuTargetConfigProto, and :N for N cards"
  )


def _tpu(name: str, rest: str) -> Target:
  chip, _, shape = rest.partition(":")
  if chip not in TPU_USABLE:
    raise UserError(f"--target {name!r}: the chips are {', '.join(TPU_USABLE)}")
  _need("libtpu", "tpu-aot", name)
  options: dict[str, Any] = {}
  if not shape:
    # Without this, a topology consists of whole hosts of four chips.
    shape = "1x1x1" if chip == "v5p" else "1x1"
    options["chips_per_host_bounds"] = [1, 1, 1]
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=f"{chip}:{shape}", **options
    )
  except Exception as error:
    raise UserError(
      f"--target {name!r}: the TPU compiler refuses the topology"
      f" {chip}:{shape} ({str(error).splitlines()[0]})"
    ) from None
  usable = int(TPU_USABLE[chip] * GIB)
  return Target(name, "tpu", list(found.devices), usable, "XLA for TPU")


def _gpu(name: str, rest: str) -> Target:
  card, _, count = rest.rpartition(":") if ":" in rest else (rest, "", "1")
  if not count.isdigit() or int(count) < 1:
    raise UserError(f"--target {name!r}: {count!r} is not a number of cards")
  _need("jax_cuda12_plugin", "gpu-aot", name)
  config = _gpu_config(name, card)
  try:
    found = topologies.get_topology_desc(
      platform="cuda",
      topology_name="",
      target_config=config,
      topology=f"1x1x{count}",
    )
  except Exception as error:
    raise UserError(
      f"--target {name!r}: the GPU compiler refuses it"
      f" ({str(error).splitlines()[0]})"
    ) from None
  known = GPUS.get(card)
  usable = known["memory"] if known else None
  return Target(name, "cuda", list(found.devices), usable, "XLA for GPU")


def _gpu_config(name: str, card: str) -> str:
  if card in GPUS:
    return _PROTO.format(**GPUS[card])
  path = pathlib.Path(card)
  if not path.is_file():
    raise UserError(
      f"--target {name!r}: {card} is neither a card of"
      f" {', '.join(GPUS)} nor a file"
    )
  return path.read_text(encoding="utf-8")


def _need(module: str, extra: str, name: str) -> None:
  if importlib.util.find_spec(module) is None:
    raise UserError(
      f"--target {name!r} needs the compiler of that platform, though no"
      f' device: pip install -e ".[train,{extra}]" in a virtual'
      " environment of its own (jax loads one accelerator plugin at a time)"
    )


def set_up() -> None:
  """Keeps JAX from looking for accelerators."""
  jax.config.update("jax_platforms", "cpu")
