r"""Memory of a training step on a device, from the device's own compiler.

    python -m train.memory --preset llama_7b --method q_galore --layerwise \
      --seq 2048 --batch 1 --target tpu:v5e

compiles the train step, including refreshes, for the target. It prints the
memory that the compiler assigned: arguments, temporaries, the peak, and what
the peak consists of. Nothing is executed and no device is needed. The figures
do not include what a runtime adds, such as its context and fragmentation.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import sys
import time
from typing import Any

import jax

import galore_optax
from train.common import commands, units
from train.common.errors import UserError
from train.config import presets, schema
from train.estimate import aot_targets, collectives, dry_run
from train.measure import figure as figure_lib
from train.methods import registry
from train.parallel import mesh as mesh_lib
from train.step import setup as setup_lib
from train.step import train_step

GIB = units.GIB
PARTS = ("weights", "moments", "bases", "gradients", "activations")
MAX_SIZE = 2**17  # where the search of `--fit` stops


def main(argv: list[str] | None = None) -> int:
  """Runs the command: 0 all fits, 1 not, 2 wrong input, 130 interrupted."""
  flags = parse(argv)
  aot_targets.set_up()
  return commands.run(lambda: estimate(flags))


def estimate(flags: argparse.Namespace) -> int:
  """Prints what the steps take; returns 0 if all fits, otherwise 1."""
  target = aot_targets.find(flags.target)
  runs = [configure(flags, name) for name in flags.method.split(",")]
  if flags.fit:
    limit = fit_size(flags.fit)
    found = [search(run, target, flags.vary, limit) for run in runs]
  else:
    found = [measure(run, target) for run in runs]
  if flags.json:
    print(json.dumps(found[0] if len(found) == 1 else found))
  else:
    print("\n\n".join(map(render, found)))
  if flags.plot:
    draw(found, flags.plot)
  return 0 if all(x["fits"] is not False for x in found) else 1


def parse(argv: list[str] | None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.memory",
    description="Memory of a training step, by the target's own compiler.",
    epilog="Targets: tpu:v5e, tpu:v6e, tpu:v5p, slices such as tpu:v5e:4x4;"
    " gpu:rtx4090, gpu:a100, gpu:h100, gpu:h100:8, gpu:FILE.txtpb.",
  )
  add = parser.add_argument
  add("--preset", default="llama_7b", metavar="NAME")
  add(
    "--method",
    default="q_galore",
    metavar="NAME[,NAME]",
    help="optimizers, compared: " + ", ".join(registry.METHODS),
  )
  add("--layerwise", action="store_true", help="update layer by layer")
  add("--lean", action="store_true", help="compute gradients at rank r")
  add("--seq", type=int, metavar="N", help="tokens a row; default: the preset")
  add("--batch", type=int, default=1, metavar="N", help="rows; default: 1")
  add("--target", required=True, metavar="KIND:NAME", help="see below")
  add(
    "--set",
    action="append",
    default=[],
    dest="settings",
    metavar="GROUP.FIELD=VALUE",
    help="changes one field of the preset; may be repeated",
  )
  add(
    "--fit",
    metavar="SIZE",
    help="find the longest rows (or the largest batch) that fit in this size,"
    " such as 16GiB; `device` for the memory of the target",
  )
  add(
    "--vary",
    choices=("seq", "batch"),
    default="seq",
    help="what --fit varies; default: seq",
  )
  add("--json", action="store_true", help="print one JSON object")
  add("--plot", type=pathlib.Path, metavar="PNG", help="draw stacked bars")
  return parser.parse_args(argv)


def configure(flags: argparse.Namespace, method: str) -> schema.Config:
  """The run that the flags describe."""
  config = presets.make(flags.preset, method)
  config = presets.lean(config) if flags.lean else config
  settings = [f"data.batch={flags.batch}"]
  settings += [f"data.length={flags.seq}"] if flags.seq else []
  settings += ["train.layerwise=true"] if flags.layerwise else []
  return schema.override(config, settings + flags.settings)


def fit_size(text: str) -> int | None:
  """The bytes that `--fit` names; None for `device`."""
  if text == "device":
    return None
  try:
    return units.parse_bytes(text)
  except UserError as error:
    raise UserError(f"--fit: {error}, or give `device`") from None


def measure(
  config: schema.Config, target: aot_targets.Target, limit: int | None = None
) -> dict[str, Any]:
  """Compiles a run's training step for a target.

  Args:
    config: the run.
    target: the devices.
    limit: bytes that are available; None for the memory of the device.

  Returns:
    What `--json` prints. If the compiler refuses a program that does not fit,
    `peak_bytes` is what it says the program needs, and unknown figures are
    None. `collectives` are those of one step, from `collectives.totals`, with
    the bytes of whole arrays on one device.
  """
  _check_host_memory(config, target)
  mesh = _mesh(config, target)
  found: dict[str, Any] = {
    "preset": config.preset,
    "method": config.optimizer.name,
    "layerwise": config.train.layerwise,
    "lean": config.train.lean,
    "seq": config.data.length,
    "batch": config.data.batch,
    "target": target.name,
    "devices": mesh.size,
    "executed": False,
  }
  begin = time.perf_counter()
  with jax.set_mesh(mesh):
    setup = setup_lib.make(config, mesh)
    exact = argument_parts(config, setup)
    try:
      sizes = _compile(config, setup, target)
    except jax.errors.JaxRuntimeError as error:
      sizes = {"peak_bytes": _needed(error)}
  unknown = dict.fromkeys(
    ("argument_bytes", "temp_bytes", "host_bytes", "collectives")
  )
  found |= unknown | sizes
  found["compile_seconds"] = round(time.perf_counter() - begin, 1)
  found["components"] = components(exact, sizes)
  room = target.usable if limit is None else limit
  found["room_bytes"] = room
  found["fits"] = None if room is None else found["peak_bytes"] <= room
  return found


def _check_host_memory(
  config: schema.Config, target: aot_targets.Target
) -> None:
  """Raises where state shall be in host memory, and the target has none."""
  kinds = {m.kind for m in target.devices[0].addressable_memories()}
  if config.mesh.offload != "none" and mesh_lib.HOST not in kinds:
    raise UserError(
      f"mesh.offload={config.mesh.offload}: the compiler's description of"
      f" {target.name} has no host memory; compile for a TPU target"
    )


def _mesh(
  config: schema.Config, target: aot_targets.Target
) -> jax.sharding.Mesh:
  """The mesh of the config over the target's devices.

  If the config has no mesh, all devices share the weights (fsdp), because this
  command is about memory.
  """
  sizes = config.mesh
  requested = (sizes.data or 1) * sizes.fsdp * sizes.tensor
  if requested == 1 and len(target.devices) > 1:
    sizes = dataclasses.replace(sizes, data=1, fsdp=len(target.devices))
  return mesh_lib.make_mesh(
    sizes,
    config.data.batch,
    accumulate=config.parts,
    devices=target.devices,
  )


def _compile(
  config: schema.Config, setup: setup_lib.Setup, target: aot_targets.Target
) -> dict[str, Any]:
  """Memory and collectives of the compiled step, on each device."""
  mesh, abstract = setup.mesh, setup.abstract
  rows = jax.ShapeDtypeStruct(
    (config.data.batch, config.data.length + 1),
    "int32",
    sharding=mesh_lib.batch_sharding(mesh),
  )
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract.state,
    abstract.shardings,
  )
  step: Any = train_step.make_train_step(
    setup.updater,
    abstract,
    config.train,
    config.optimizer.accumulate,
    reduce=config.mesh.reduce,
  )
  compiled = (
    step.trace(state, rows)
    .lower(lowering_platforms=(target.platform,))
    .compile()
  )
  figures = compiled.memory_analysis()
  arguments = figures.argument_size_in_bytes
  temporaries = figures.temp_size_in_bytes
  new = figures.output_size_in_bytes - figures.alias_size_in_bytes
  code = figures.generated_code_size_in_bytes
  in_host = (
    figures.host_argument_size_in_bytes
    + figures.host_output_size_in_bytes
    - figures.host_alias_size_in_bytes
    + figures.host_temp_size_in_bytes
  )
  return {
    "argument_bytes": arguments,
    "temp_bytes": temporaries,
    "unaliased_output_bytes": new,
    "code_bytes": code,
    "peak_bytes": arguments + new + temporaries + code,
    "host_bytes": in_host,
    "collectives": _collectives(compiled) if mesh.size > 1 else {},
  }


def _collectives(compiled: Any) -> dict[str, Any]:
  module = collectives.Module(compiled.as_text())
  return collectives.totals(module.collectives())


def _needed(error: Exception) -> int:
  """Bytes that a program needs, from the message that it does not fit."""
  match = re.search(r"\(?([\d.]+)([GM])\)? exceeds available", str(error))
  match = match or re.search(r"Used ([\d.]+)([GM]) of", str(error))
  if "RESOURCE_EXHAUSTED" not in str(error) or not match:
    raise error
  return int(float(match[1]) * {"G": units.GIB, "M": units.MIB}[match[2]])


def argument_parts(
  config: schema.Config, setup: setup_lib.Setup
) -> dict[str, int]:
  """Bytes on one device that are known before compiling, by component."""
  state, where = setup.abstract.state, setup.abstract.shardings
  whole = dry_run.shard_bytes(state.opt_state, where.opt_state)
  held = dry_run.shard_bytes(_bases(state.opt_state), _bases(where.opt_state))
  return {
    "weights": dry_run.shard_bytes(state.params, where.params),
    "moments": whole - held,
    "bases": held,
    "gradients": dry_run.shard_bytes(*dry_run.gradients(config, setup)),
  }


def _bases(opt_state: Any) -> list[Any]:
  """The bases of all GaLore states in an optimizer's."""
  is_galore = lambda x: isinstance(x, galore_optax.GaLoreState)
  leaves = jax.tree.leaves(opt_state, is_leaf=is_galore)
  return [x.projector for x in leaves if is_galore(x)]


def components(
  exact: dict[str, int], sizes: dict[str, Any]
) -> dict[str, int | None]:
  """What the peak consists of.

  Weights, moments and bases are counted exactly. The compiler does not say
  what its temporaries are: those that are not the gradients which the step has
  to keep count as activations and scratch.
  """
  if "temp_bytes" not in sizes:
    return {**exact, "activations": None}
  gradients = min(exact["gradients"], sizes["temp_bytes"])
  rest = sizes["peak_bytes"] - sizes["argument_bytes"] - gradients
  return {**exact, "gradients": gradients, "activations": rest}


def search(
  config: schema.Config,
  target: aot_targets.Target,
  vary: str,
  limit: int | None,
) -> dict[str, Any]:
  """The measurement of the longest rows, or the largest batch, that fit.

  Sizes are doubled until one does not fit. Then the size half way between the
  last two is tried, so the true limit is less than half as large again.

  Raises:
    UserError: not even the smallest size fits.
  """
  field = "length" if vary == "seq" else "batch"

  def at(size: int) -> dict[str, Any]:
    varied = schema.override(config, [f"data.{field}={size}"])
    found = measure(varied, target, limit)
    print(
      f"{vary}={size}: {found['peak_bytes'] / GIB:.2f} GiB,"
      f" {'fits' if found['fits'] else 'does not fit'}",
      file=sys.stderr,
    )
    return found

  size = 256 if vary == "seq" else 1
  best = at(size)
  if not best["fits"]:
    raise UserError(
      f"{vary}={size} takes {best['peak_bytes'] / GIB:.2f} GiB, which does not"
      f" fit {best['room_bytes'] / GIB:.2f} GiB"
    )
  while size < MAX_SIZE and (found := at(2 * size))["fits"]:
    best, size = found, 2 * size
  if size > 1 and (found := at(size + size // 2))["fits"]:
    best = found
  return best


def render(found: dict[str, Any]) -> str:
  """A measurement as a table."""
  form = "layer by layer" if found["layerwise"] else "usual step"
  form += ", gradients at rank r" if found["lean"] else ""
  each = "" if found["devices"] == 1 else f", each of {found['devices']}"
  lines = [
    f"{found['preset']}, {found['method']}, {form}, {found['batch']} x"
    f" {found['seq']} tokens, {found['target']}{each}",
    f"{'':<24}{'bytes':>16}{'GiB':>9}",
  ]

  def line(name: str, size: int | None) -> None:
    known = (
      f"{size:>16,}{size / GIB:>9.2f}" if size is not None else f"{'-':>16}"
    )
    lines.append(f"{name:<24}{known}")

  for name in PARTS:
    label = "activations, scratch" if name == "activations" else name
    line(f"  {label}", found["components"][name])
  line("arguments", found["argument_bytes"])
  line("temporaries", found["temp_bytes"])
  line("peak", found["peak_bytes"])
  if found["host_bytes"]:
    line("in host memory", found["host_bytes"])
  if found["room_bytes"] is not None:
    line("room", found["room_bytes"])
    lines.append("fits" if found["fits"] else "DOES NOT FIT")
  lines += collectives.lines(found["collectives"] or {})
  lines.append(
    f"Compiled in {found['compile_seconds']} s; nothing was executed."
  )
  return "\n".join(lines)


def draw(found: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws stacked bars of what the peak consists of, one for each method."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axis = plt.subplots(
    figsize=(7.5, 1.4 + 0.6 * len(found)), layout="constrained"
  )
  names = [
    f"{x['method']}{', layerwise' * x['layerwise']}{', lean' * x['lean']}"
    for x in found
  ]
  left = [0.0] * len(found)
  for part in PARTS:
    sizes = [(x["components"][part] or 0) / GIB for x in found]
    label = "activations, scratch" if part == "activations" else part
    axis.barh(names, sizes, left=left, label=label, height=0.6)
    left = [a + b for a, b in zip(left, sizes, strict=True)]
  for row, (size, x) in enumerate(zip(left, found, strict=True)):
    axis.text(size, row, f" {x['peak_bytes'] / GIB:.1f} GiB", va="center")
  if room := found[0]["room_bytes"]:
    axis.axvline(room / GIB, color="0.3", ls="--", lw=1)
  axis.set_xlim(right=1.15 * max(left))
  axis.invert_yaxis()
  axis.set_xlabel("GiB a device, assigned by the compiler, not executed")
  first = found[0]
  axis.set_title(
    f"{first['preset']}, {first['batch']} x {first['seq']} tokens,"
    f" {first['target']}",
    fontsize=10,
  )
  axis.legend(
    frameon=False,
    ncols=5,
    fontsize=8,
    loc="upper left",
    bbox_to_anchor=(0, -0.25 if len(found) > 2 else -0.45),
  )
  axis.spines[["top", "right"]].set_visible(False)
  figure_lib.save(figure, path, 130)
  plt.close(figure)


if __name__ == "__main__":
  sys.exit(main())
