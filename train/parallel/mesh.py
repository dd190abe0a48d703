"""The device mesh, and how arrays are laid out on it.

Three axes: `data` splits the batch, `fsdp` splits the batch and the weights
(ZeRO-3), `tensor` splits heads, feed-forward units and the vocabulary. The
model names its axes logically (`embed`, `mlp`, ...); `RULES` is the one place
that says what a name means on the mesh.
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

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis of a parameter -> mesh axis. `layers` (the stacked axis that
# the model scans over) stays whole: every device takes part in every layer.
RULES = (
  # Of the embedding's table, whose rows are looked up: one split over both
  # axes needs one all-reduce, one of rows and columns a whole copy.
  ("table", ("fsdp", "tensor")),
  ("features", None),
  ("vocab", "tensor"),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("mlp", "tensor"),
  ("layers", None),
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
    config: sizes of the axes; `data = 0` takes the devices that are left.
    batch: rows in a global batch, which data * fsdp must divide.
    devices: those to use; all by default.
    accumulate: parts that each device cuts its rows into.

  Returns:
    A mesh whose axes are of type Auto: the compiler derives the collectives.

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
  # Any sizes will do: an axis of the mesh may take a part of a torus's.
  placed = mesh_utils.create_device_mesh(
    shape, devices, allow_split_physical_axes=True
  )
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.sharding.Mesh(placed, AXES, axis_types=auto)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Rows over data and fsdp; everything else whole."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The same array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_part(mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """Which part of a batch this process feeds to its devices, of how many.

  Processes whose devices hold the same rows (the tensor axis runs across
  them) feed the same part.

  Returns:
    The index of the part, from 0, and the number of parts.

  Raises:
    UserError: processes share some of their rows and not others.
  """
  rows: dict[int, set[int]] = {}
  for place, device in np.ndenumerate(mesh.devices):
    shard = place[0] * mesh.shape["fsdp"] + place[1]
    rows.setdefault(device.process_index, set()).add(shard)
  parts = sorted({tuple(sorted(shards)) for shards in rows.values()})
  if len({len(part) for part in parts}) > 1 or len(sum(parts, ())) > len(
    set().union(*parts)
  ):
    raise UserError(
      f"mesh.tensor={mesh.shape['tensor']} cuts through the"
      f" {len(rows)} processes; let it divide the"
      f" {mesh.size // len(rows)} devices of a process, or be a multiple"
    )
  return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def put_batch(rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """Moves this process's rows of a batch to its devices."""
  # Explicit, though JAX takes it for an accident with several processes.
  with jax.transfer_guard("allow"):
    return jax.make_array_from_process_local_data(sharding, rows)


def microbatches(rows: jax.Array, count: int) -> jax.Array:
  """Cuts a batch (B, ...) into (count, B / count, ...), inside a jit.

  Each device's rows are dealt out in turn, so that every part has rows of
  every device and none moves between them.
  """
  parts = rows.reshape(-1, count, *rows.shape[1:]).swapaxes(0, 1)
  if jax.sharding.get_abstract_mesh().empty:
    return parts
  spec = PartitionSpec(None, BATCH_AXES)
  return jax.lax.with_sharding_constraint(parts, spec)


def constrain_batch(x: jax.Array, rows: int) -> jax.Array:
  """Keeps activations (B * T, ...) split by rows inside a jitted function.

  Without it a weight sharded over fsdp can make the compiler split the
  activations along d_model instead. Outside a mesh, and for batches that its
  shards do not divide (a sample's one row), it does nothing.

  Args:
    x: activations whose first axis is rows times positions.
    rows: B.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or rows % batch_shards(mesh):
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Any) -> int:
  """Parts into which a mesh cuts a batch; 1 if it is empty."""
  return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def _shards(mesh: jax.sharding.Mesh, axis: str | tuple | None) -> int:
  """Parts into which a mesh axis, or several together, cuts an array's."""
  names = (axis,) if isinstance(axis, str) else axis or ()
  return math.prod(mesh.shape[name] for name in names)


def param_shardings(params: nnx.State, mesh: jax.sharding.Mesh) -> dict:
  """Where each parameter lives, from the names of its axes and `RULES`.

  An axis that the mesh does not divide stays whole.

  Args:
    params: boxes of abstract parameters, from `train.models.llama.abstract`.
    mesh: the devices.

  Returns:
    Nested dicts of NamedShardings, in the structure of the parameters.
  """
  rules = dict(RULES)

  def place(param: nnx.Param) -> NamedSharding:
    shape = param.get_value().shape
    names = param.get_metadata("out_sharding")
    axes = [rules[name] for name in names]
    fits = [
      axis if size % _shards(mesh, axis) == 0 else None
      for axis, size in zip(axes, shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*fits))

  placed = jax.tree.map(
    place, params, is_leaf=lambda x: isinstance(x, nnx.Param)
  )
  return nnx.to_pure_dict(placed)
