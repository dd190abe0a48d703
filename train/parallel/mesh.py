"""The device mesh, and how arrays are sharded over it.

There are three axes: `data` divides the batch, `fsdp` divides the batch and
the weights (ZeRO-3), `tensor` divides heads, feed-forward units and the
vocabulary. The model gives its axes logical names (`embed`, `mlp`, ...), and
`RULES` maps these names to axes of the mesh.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from train.common.errors import UserError
from train.config.schema import MeshConfig

HOST = "pinned_host"  # JAX's name of host memory that devices can reach

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis of a parameter to mesh axis. `layers`, the stacked axis that the
# model scans over, is not divided: every device takes part in every layer. Nor
# is `experts`: every device has a part of each.
RULES = (
  # The rows of the embedding, which are looked up. Divided over both axes they
  # need one all-reduce; with divided columns they would need a whole copy.
  ("table", ("fsdp", "tensor")),
  ("features", None),
  ("vocab", "tensor"),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("mlp", "tensor"),
  ("layers", None),
  ("experts", None),
  ("norm", None),
)


def make_mesh(
  config: MeshConfig,
  batch: int,
  devices: Sequence[jax.Device] | None = None,
  accumulate: int = 1,
) -> jax.sharding.Mesh:
  """Arranges devices as (data, fsdp, tensor).

  Args:
    config: sizes of the axes; `data = 0` means all remaining devices.
    batch: rows in a global batch, which data * fsdp must divide.
    devices: devices to use; all by default.
    accumulate: microbatches into which each device divides its rows.

  Returns:
    A mesh with axes of type Auto, for which the compiler derives collectives.

  Raises:
    UserError: the sizes do not multiply to the number of devices, or do not
      divide the batch.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  rest = config.fsdp * config.tensor
  if config.data == 0 and count % rest:
    raise UserError(
      f"mesh.fsdp * mesh.tensor is {rest}, which does not divide the {count}"
      f" devices found; choose sizes whose product divides {count}"
    )
  data = config.data or count // rest
  if data * rest != count:
    raise UserError(
      f"mesh.data * mesh.fsdp * mesh.tensor is {data * rest}, but {count}"
      " devices were found; with mesh.data=0 the data axis takes what is left"
    )
  shards = data * config.fsdp
  if batch % (shards * accumulate):
    product = "train.accumulate * optimizer.accumulate"
    parts = f" in {product} = {accumulate} parts" * (accumulate > 1)
    raise UserError(
      f"data.batch is {batch}, which the {shards} batch shards"
      f" (mesh.data={data} * mesh.fsdp={config.fsdp}){parts} do not divide;"
      f" use a multiple of {shards * accumulate}"
    )
  shape = (data, config.fsdp, config.tensor)
  # An axis of the mesh may be a part of a physical axis of the torus.
  grid = mesh_utils.create_device_mesh(
    shape, devices, allow_split_physical_axes=True
  )
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.sharding.Mesh(grid, AXES, axis_types=auto)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The sharding of a batch: rows are divided over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The sharding of an array that every device has whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_part(mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """Which part of each batch this process reads, of how many.

  Processes whose devices hold the same rows, because the tensor axis crosses
  them, read the same part.

  Returns:
    The index of the part, from 0, and the number of parts.

  Raises:
    UserError: processes share only some of their rows.
  """
  rows: dict[int, set[int]] = {}
  for index, device in np.ndenumerate(mesh.devices):
    shard = index[0] * mesh.shape["fsdp"] + index[1]
    rows.setdefault(device.process_index, set()).add(shard)
  parts = sorted({tuple(sorted(shards)) for shards in rows.values()})
  if len({len(part) for part in parts}) > 1 or len(sum(parts, ())) > len(
    set().union(*parts)
  ):
    raise UserError(
      f"mesh.tensor={mesh.shape['tensor']} does not fit {len(rows)} processes"
      f" with {mesh.size // len(rows)} devices each; use a divisor or a"
      f" multiple of {mesh.size // len(rows)}"
    )
  return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def put_batch(rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """Moves this process's rows of a batch to its devices."""
  # JAX counts this as an implicit transfer if there are several processes.
  with jax.transfer_guard("allow"):
    return jax.make_array_from_process_local_data(sharding, rows)


def on_device(tree: Any) -> Any:
  """Copies what is in host memory to the device, in a program or outside."""
  space = jax.memory.Space.Device
  return jax.tree.map(
    lambda x: (
      x if jax.typeof(x).memory_space == space else jax.device_put(x, space)
    ),
    tree,
  )


def microbatches(rows: jax.Array, count: int) -> jax.Array:
  """Divides a batch (B, ...) into (count, B / count, ...), inside a jit.

  Each microbatch has the same number of rows of every device, so that no rows
  move between devices.
  """
  parts = rows.reshape(-1, count, *rows.shape[1:]).swapaxes(0, 1)
  if not _is_partitioned():
    return parts
  spec = PartitionSpec(None, BATCH_AXES)
  return jax.lax.with_sharding_constraint(parts, spec)


def constrain_batch(x: jax.Array, rows: int) -> jax.Array:
  """Keeps activations (B * T, ...) divided by rows inside a jitted function.

  Without it, a weight that is sharded over fsdp can make the compiler divide
  activations along d_model instead. It does nothing outside of a mesh, in the
  body of `jax.shard_map`, which sees one device's rows, and for batches that
  the shards do not divide, such as the single row of a sample.

  Args:
    x: activations whose first axis is rows times positions.
    rows: B.
  """
  shards = batch_shards(jax.sharding.get_abstract_mesh())
  if not _is_partitioned() or rows % shards:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def _is_partitioned() -> bool:
  """Whether the compiler divides arrays here over a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and not mesh.manual_axes


def batch_shards(mesh: Any) -> int:
  """Number of parts into which a mesh divides a batch; 1 if it is empty."""
  return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def _shards(mesh: jax.sharding.Mesh, axis: str | tuple | None) -> int:
  """Number of parts into which one or several mesh axes divide an axis."""
  names = (axis,) if isinstance(axis, str) else axis or ()
  return math.prod(mesh.shape[name] for name in names)


def param_shardings(params: nnx.State, mesh: jax.sharding.Mesh) -> dict:
  """Shardings of the parameters, from the names of their axes and `RULES`.

  An axis whose size the mesh does not divide is not divided.

  Args:
    params: boxes of abstract parameters, from `train.models.llama.abstract`.
    mesh: the devices.

  Returns:
    Nested dicts of NamedShardings, in the structure of the parameters.
  """
  rules = dict(RULES)

  def sharding(param: nnx.Param) -> NamedSharding:
    shape = param.get_value().shape
    names = param.get_metadata("out_sharding")
    axes = [rules[name] for name in names]
    fits = [
      axis if size % _shards(mesh, axis) == 0 else None
      for axis, size in zip(axes, shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*fits))

  shardings = jax.tree.map(
    sharding, params, is_leaf=lambda x: isinstance(x, nnx.Param)
  )
  return nnx.to_pure_dict(shardings)
