"""Counts what a run would take, before anything is allocated or read.

`python -m train.pretrain --preset llama_7b --dry-run` prints it; with `--json`
as one object. Parameters, optimizer state and programs are traced as shapes,
so a 7B model takes seconds on a laptop and needs neither data nor a hub.
"""

import collections
import json
import math
import textwrap
from typing import Any

import jax
import jax.numpy as jnp

import galore_optax
from galore_optax.tree import paths
from train.common.errors import UserError
from train.common.units import format_bytes, format_duration, format_si
from train.config import schema
from train.estimate import flops, jaxpr_cost
from train.methods import leaves, registry
from train.parallel import mesh as mesh_lib
from train.step import optimizer
from train.step import setup as setup_lib
from train.step import state as state_lib

# Group of a parameter, by the first part of its path that is a key here.
GROUPS = {
  "embed": "embedding",
  "attn": "attention",
  "mlp": "feed-forward",
  "experts": "experts",
  "attn_norm": "norms",
  "mlp_norm": "norms",
  "norm": "norms",
  "lm_head": "head",
}


def main(config: schema.Config, as_json: bool) -> int:
  """Prints what the run would take; returns the exit status."""
  # Leaves the devices alone, because another run may be using them.
  jax.config.update("jax_platforms", "cpu")
  found = estimate(config)
  print(json.dumps(found) if as_json else render(found))
  return 0


def estimate(config: schema.Config) -> dict[str, Any]:
  """Counts parameters, bytes and FLOPs of a run.

  Args:
    config: the run. `mesh.data = 0`, which means all remaining devices,
      counts as 1: this machine need not have the devices of the run.

  Returns:
    What `--json` prints: nested dicts of numbers, in bytes and FLOPs.

  Raises:
    UserError: the optimizer's options exclude one another, or the mesh does
      not divide the batch.
  """
  mesh: Any = abstract_mesh(config.mesh)  # shardings take it as a mesh
  setup = setup_lib.make(config, mesh)
  abstract = setup.abstract
  own = galore_optax.state_bytes(abstract.state.opt_state)
  return {
    "preset": config.preset,
    "optimizer": config.optimizer.name,
    "mesh": dict(mesh.shape),
    "parameters": parameters(abstract.weights),
    "plan": plan_rows(setup.plan, config.optimizer),
    "bytes": memory(config, setup, mesh),
    "optimizer_state": optimizer.accounting(
      config.optimizer, abstract.weights, own
    ),
    "optimizer_state_note": optimizer.accounting_note(abstract.weights),
    "flops": work(config, setup),
  }


def abstract_mesh(config: schema.MeshConfig) -> jax.sharding.AbstractMesh:
  """The mesh of a run without its devices."""
  sizes = (config.data or 1, config.fsdp, config.tensor)
  auto = (jax.sharding.AxisType.Auto,) * len(sizes)
  return jax.sharding.AbstractMesh(sizes, mesh_lib.AXES, axis_types=auto)


def parameters(params: Any) -> dict[str, int]:
  """Number of parameters, in total and by group."""
  counts: dict[str, int] = collections.defaultdict(int)
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    parts = leaves.path_of(path).split("/")
    counts[next((GROUPS[p] for p in parts if p in GROUPS), "other")] += x.size
  return {"total": sum(counts.values()), **counts}


def plan_rows(
  plan: galore_optax.diagnostics.Description, config: schema.OptimizerConfig
) -> list[dict[str, Any]]:
  """The rows of `galore_optax.describe` as JSON takes them."""
  return [_plan_row(row, config) for row in plan.rows]


def _plan_row(row: Any, config: schema.OptimizerConfig) -> dict[str, Any]:
  side, rank = row.side or "full rank", row.rank
  block = row.path.startswith("layers/") and row.path.endswith("/kernel")
  method = registry.get(config.name)
  if method.by_optax and block:
    side, rank = "long side", config.rank
  if method.factors and block:
    side, rank = "factors", min(config.rank, *row.shape[-2:])
  return {
    "path": row.path,
    "shape": list(row.shape),
    "side": side,
    "rank": rank,
    "state_bytes": row.state_bytes,
    "reason": row.reason if rank is None else "",
  }


def memory(
  config: schema.Config,
  setup: setup_lib.Setup,
  mesh: jax.sharding.AbstractMesh,
) -> dict[str, dict[str, int]]:
  """Bytes of all devices (`whole`), and in the memory of one (`device`).

  Activations are the most that the loss and gradient of a microbatch keep at
  once if the tensor axis has size 1; for a larger one they are an upper bound.
  Gradient accumulation keeps a float32 sum besides the gradient. If the
  optimizer's state is in host memory, `host` is one device's part of it.
  """
  abstract = setup.abstract
  state, where = abstract.state, abstract.shardings
  groups = weights(abstract) | {
    "gradients": gradients(config, setup),
    "optimizer_state": (state.opt_state, where.opt_state),
  }
  if config.train.accumulate > 1:
    cast = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32)
    sums = jax.tree.map(cast, abstract.weights)
    groups["gradient_sums"] = (sums, abstract.weight_shardings)
  whole = {name: galore_optax.state_bytes(x) for name, (x, _) in groups.items()}
  device = {name: shard_bytes(*pair) for name, pair in groups.items()}
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  device["activations"] = activation_bytes(config, abstract, shards)
  whole["activations"] = shards * device["activations"]
  for part in (whole, device):
    part["together"] = sum(part.values())
  found = {"whole": whole, "device": device}
  if config.mesh.offload != "none":
    moved = shard_bytes(*groups["optimizer_state"], in_host=True)
    found["host"] = {"optimizer_state": moved}
  return found


def weights(abstract: state_lib.AbstractState) -> dict[str, tuple[Any, Any]]:
  """Shapes and shardings of the weights, by group.

  Methods with factors have frozen and trained weights, and those that a step
  makes of both.
  """
  params, where = abstract.state.params, abstract.shardings.params
  if abstract.adapters is None:
    return {"weights": (params, where)}
  return {
    "frozen_weights": (params["frozen"], where["frozen"]),
    "trained_weights": (params["adapters"], where["adapters"]),
    "made_weights": (abstract.weights, abstract.weight_shardings),
  }


def gradients(config: schema.Config, setup: setup_lib.Setup) -> tuple[Any, Any]:
  """Shapes and shardings of the gradients that are alive at the same time.

  If updates are layer by layer, these are the gradients of one layer and of
  the embedding or the head, whichever is larger.
  """
  weights = paths.leaves_by_path(setup.abstract.weights)
  shardings = paths.leaves_by_path(setup.abstract.weight_shardings)
  if config.train.lean:
    _project(setup.plan, weights, shardings)
  if config.train.layerwise:
    weights = _largest_parts(weights)
  return weights, {path: shardings[path] for path in weights}


def _project(
  plan: galore_optax.diagnostics.Description, weights: dict, shardings: dict
) -> None:
  """Replaces shapes and shardings, by path, by those of gradients at rank r."""
  for row in plan.rows:
    if row.rank is None:
      continue
    x, where = weights[row.path], shardings[row.path]
    shape, spec = list(x.shape), list(where.spec)
    spec += [None] * (len(shape) - len(spec))
    for side, axis in (("left", -2), ("right", -1)):
      if row.side in (side, "both"):
        shape[axis], spec[axis] = row.rank, None
    weights[row.path] = jax.ShapeDtypeStruct(tuple(shape), x.dtype)
    shardings[row.path] = jax.NamedSharding(where.mesh, jax.P(*spec))


def _largest_parts(weights: dict) -> dict:
  """Shapes by path of one layer, and of the embedding or the head."""
  layer, ends = {}, collections.defaultdict(dict)
  for path, x in weights.items():
    name = path.split("/")[0]
    if name == "layers":
      layer[path] = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    else:
      ends[name][path] = x
  return layer | max(ends.values(), key=galore_optax.state_bytes)


def shard_bytes(tree: Any, shardings: Any, in_host: bool = False) -> int:
  """Bytes of one device's part of a tree, in the device's or host's memory."""
  return sum(
    galore_optax.state_bytes(
      jax.ShapeDtypeStruct(where.shard_shape(x.shape), x.dtype)
    )
    for x, where in zip(
      jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True
    )
    if in_host == (where.memory_kind == mesh_lib.HOST)
  )


def activation_bytes(
  config: schema.Config, abstract: state_lib.AbstractState, shards: int
) -> int:
  """Maximum bytes that the loss and gradient of a microbatch keep."""
  parts = shards * config.parts
  rows, rest = divmod(config.data.batch, parts)
  if rest:
    raise UserError(
      f"data.batch is {config.data.batch}, which mesh.data * mesh.fsdp *"
      f" train.accumulate * optimizer.accumulate = {parts} does not divide;"
      f" use a multiple of {parts}"
    )
  program = flops.trace_loss(
    abstract.graphdef, abstract.weights, rows, config.data.length, gradient=True
  )
  return jaxpr_cost.peak_bytes(program)


def work(config: schema.Config, setup: setup_lib.Setup) -> dict[str, float]:
  """FLOPs of the matrix products of a token, a step, and the run."""
  abstract, length = setup.abstract, config.data.length
  forward = flops.forward_per_token(abstract.graphdef, abstract.weights, length)
  again = flops.recompute_per_token(
    abstract.graphdef, abstract.weights, length, forward
  )
  if abstract.adapters is None:
    update = flops.update_every_step(setup.tx, abstract.weights)
  else:
    update = flops.adapters_every_step(abstract.adapters, abstract.state.params)
  refresh = flops.refresh(setup.plan.rows, config.optimizer)
  gap = config.optimizer.update_proj_gap
  tokens = config.data.batch * length
  per_step = tokens * (3 * forward + again) + update + refresh / gap
  return {
    "forward_per_token": forward,
    "backward_per_token": 2 * forward,
    "recomputed_per_token": again,
    "optimizer_per_step": update,
    "refresh": refresh,
    "refresh_every": gap,
    "tokens_per_step": tokens,
    "steps": config.train.steps,
    "tokens": tokens * config.train.steps,
    "per_step": per_step,
    "run": per_step * config.train.steps,
  }


def render(found: dict[str, Any]) -> str:
  """The estimate as text of at most 80 columns."""
  parts = (
    [f"dry run of {found['preset']} with {found['optimizer']}"],
    _parameters(found["parameters"]),
    plan_table(found["plan"]),
    _memory(found["bytes"], found["mesh"]),
    _states(found["optimizer_state"], found["optimizer_state_note"]),
    _work(found["flops"]),
    _time(found["flops"], math.prod(found["mesh"].values())),
  )
  return "\n\n".join("\n".join(lines) for lines in parts)


def _parameters(counts: dict[str, int]) -> list[str]:
  total = counts["total"]
  return [f"parameters        {total:>16,}"] + [
    f"  {name:<15} {n:>16,}  {n / total:6.1%}"
    for name, n in counts.items()
    if name != "total"
  ]


def plan_table(rows: list[dict[str, Any]]) -> list[str]:
  """The rows of `plan_rows` as lines of a table."""
  width = max(len(row["path"]) for row in rows)
  lines = [f"{'leaf':<{width}}  {'shape':<18} {'side':<9} rank optimizer state"]
  for row in rows:
    # The kernels of experts have four axes, for which the column is narrow.
    separator = " x " if len(row["shape"]) < 4 else "x"
    shape = separator.join(map(str, row["shape"]))
    lines.append(
      f"{row['path']:<{width}}  {shape:<18} {row['side']:<9}"
      f" {row['rank'] or '-':>4} {format_bytes(row['state_bytes']):>15}"
    )
  # Other reasons are names and rules, which the table shows well enough.
  small = [row["path"] for row in rows if row["reason"].startswith("no small")]
  if small:
    text = f"left at full rank, as this rank would save nothing: {small[0]}"
    lines.append(text + (f" and {len(small) - 1} more" if small[1:] else ""))
  return lines


def _memory(parts: dict[str, dict], mesh: dict[str, int]) -> list[str]:
  axes = " x ".join(f"{n} {axis}" for axis, n in mesh.items())
  lines = [f"{'bytes':<20}{'in all':>12}{'a device':>14}, mesh {axes}"]
  for name, n in parts["whole"].items():
    label, here = name.replace("_", " "), format_bytes(parts["device"][name])
    lines.append(f"  {label:<18}{format_bytes(n):>12}{here:>14}")
  for name, n in parts.get("host", {}).items():
    label = name.replace("_", " ")
    lines.append(f"  {label}, in host memory, a device{format_bytes(n):>12}")
  return lines


def _states(states: dict[str, int], note: str) -> list[str]:
  width = max(map(len, states))
  rows = [
    f"  {name:<{width}}{format_bytes(n):>12}  {n / states['adamw']:6.1%} of"
    " adamw's"
    for name, n in states.items()
  ]
  return ["optimizer state of this model", *rows, *textwrap.wrap(note, 78)]


def _work(found: dict[str, float]) -> list[str]:
  token = lambda name: f"{format_si(found[name + '_per_token'])}FLOPs a token"
  lines = [
    f"forward     {token('forward')}",
    f"backward    {token('backward')}",
  ]
  if found["recomputed_per_token"]:
    lines.append(f"recomputed  {token('recomputed')}")
  update, refresh = found["optimizer_per_step"], found["refresh"]
  if update:
    share = 100 * update / found["per_step"]
    lines.append(
      f"optimizer   {format_si(update)}FLOPs a step, {share:.2g}% of it"
    )
  if refresh:
    gap = found["refresh_every"]
    share = 100 * refresh / gap / found["per_step"]
    lines.append(
      f"refreshes   {format_si(refresh)}FLOPs every {gap} steps,"
      f" {share:.2g}% of them"
    )
  return [
    "matrix products",
    *(f"  {line}" for line in lines),
    "",
    f"the run     {found['steps']:,} steps of {found['tokens_per_step']:,}"
    f" tokens: {format_si(found['tokens'])}tokens,"
    f" {format_si(found['run'])}FLOPs",
  ]


def _time(found: dict[str, float], devices: int) -> list[str]:
  model = 3 * found["forward_per_token"] * found["tokens"]
  count = f"{devices} devices" if devices > 1 else "one device"
  times = (
    f"{kind} {format_duration(model / (0.4 * devices * flops.peak(kind)))}"
    for kind in ("TPU v5e", "TPU v6e", "A100", "H100", "RTX 4090")
  )
  text = f"at 40% MFU, {count}: {', '.join(times)}"
  return textwrap.wrap(text, 78, subsequent_indent="  ")
