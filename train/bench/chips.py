"""LLaMA-7B on slices of TPUs: memory and collectives, from the TPU compiler.

Each training step is compiled by `python -m train.memory` in its own process,
which takes some minutes; nothing is executed. Weights and batch are sharded
over all chips (fsdp). The Python interpreter `--python` needs the TPU compiler
(extra tpu-aot).
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

from train.common import units
from train.common.errors import UserError
from train.measure import figure
from train.measure import tables as tables_lib


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of this benchmark."""
  add = parser.add_argument
  add("--preset", default="llama_7b", help="as for train.memory")
  add(
    "--targets",
    default="tpu:v6e:2x2,tpu:v5e:4x4",
    help="slices, separated by commas (default: %(default)s)",
  )
  add(
    "--methods",
    default="adamw,galore,galore+layerwise",
    help="methods of train.memory, separated by commas; with +layerwise, the"
    " update is applied layer by layer (default: %(default)s)",
  )
  add("--seq", type=int, default=2048, help="tokens of a sequence")
  add("--rows", type=int, default=1, help="sequences per chip")
  add(
    "--python",
    default=sys.executable,
    metavar="PATH",
    help="Python interpreter with the TPU compiler",
  )
  add(
    "--set",
    action="append",
    default=[],
    dest="settings",
    metavar="FIELD=VALUE",
    help="change a field of the config; may be repeated",
  )
  add(
    "--keep",
    type=pathlib.Path,
    help="folder for the result of each program; a program whose result is"
    " there is not compiled again",
  )


QUICK = {"preset": "llama_9m", "targets": "tpu:v6e:2x2", "seq": 256}


def chips_of(target: str) -> int:
  """Number of chips of a slice such as tpu:v5e:4x4.

  Raises:
    UserError: The target does not name its topology.
  """
  *_, shape = target.split(":")
  try:
    total = 1
    for size in shape.split("x"):
      total *= int(size)
  except ValueError:
    raise UserError(
      f"--targets {target!r}: name the topology, as in tpu:v5e:4x4"
    ) from None
  return total


def _split(method: str) -> tuple[str, str]:
  """Splits `galore+layerwise` into the method's name and its suffix.

  Raises:
    UserError: The suffix is unknown.
  """
  name, _, suffix = method.partition("+")
  if suffix not in ("", "layerwise"):
    raise UserError(
      f"--methods {method!r}: unknown suffix {suffix!r}; write {name!r} or"
      f" '{name}+layerwise'"
    )
  return name, suffix


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """Compiles every method for every slice, one after the other."""
  programs = []
  for method in flags.methods.split(","):
    _split(method)  # reports a mistake before minutes of compiling
  for target in flags.targets.split(","):
    for method in flags.methods.split(","):
      programs.append(_compile(flags, target, method))
      print(text({"programs": programs[-1:]}), flush=True)
  return {"programs": programs}


def _compile(
  flags: argparse.Namespace, target: str, method: str
) -> dict[str, Any]:
  """Compiles one program with `train.memory`, or reads its kept result."""
  name, suffix = _split(method)
  file = f"{target.removeprefix('tpu:')}-{method}.json"
  path = flags.keep / file if flags.keep else None
  if path and path.is_file() and path.stat().st_size:
    return json.loads(path.read_text(encoding="utf-8"))
  arguments = [
    f"--preset={flags.preset}",
    f"--method={name}",
    *(["--layerwise"] if suffix else []),
    f"--seq={flags.seq}",
    f"--batch={flags.rows * chips_of(target)}",
    f"--target={target}",
    *(f"--set={x}" for x in flags.settings),
    "--json",
  ]
  command = [flags.python, "-m", "train.memory", *arguments]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  lines = done.stdout.strip().splitlines()
  if done.returncode not in (0, 1) or not lines:
    message = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise UserError(f"{' '.join(command[1:])}: {message}")
  if path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines[-1], encoding="utf-8")
  return json.loads(lines[-1])


HEAD = [
  "slice, optimizer",
  "weights GiB",
  "moments",
  "bases",
  "temporaries",
  "peak",
  "of the chip",
  "every step: gathered",
  "reduced",
  "when due: gathered",
  "reduced",
]


def _name(x: dict[str, Any]) -> str:
  suffix = ", layerwise" * x["layerwise"]
  return f"{x['target'].removeprefix('tpu:')}, {x['method']}{suffix}"


def _rows(results: dict[str, Any]) -> list[list[str]]:
  rows = []
  for x in results["programs"]:
    gib = lambda size: "-" if size is None else units.format_gib(size)
    parts = x["components"]
    rows.append(
      [
        _name(x),
        *(gib(parts[name]) for name in ("weights", "moments", "bases")),
        gib(x["temp_bytes"]),
        gib(x["peak_bytes"]),
        f"{x['peak_bytes'] / x['room_bytes']:.0%}",
        *_traffic(x["collectives"]),
      ]
    )
  return rows


def _traffic(totals: dict[str, Any] | None) -> list[str]:
  """Count and GiB: gathered and reduced, at every step and when due."""
  cells = []
  for when in ("every_step", "when_due"):
    kinds = (totals or {}).get(when, {})
    for reduced in (False, True):
      chosen = [x for kind, x in kinds.items() if ("reduce" in kind) == reduced]
      count = sum(x["count"] for x in chosen)
      size = units.format_gib(sum(x["bytes"] for x in chosen))
      cells.append(f"{count}, {size} GiB" if count else "-")
  return cells


def text(results: dict[str, Any]) -> str:
  """The table for the terminal."""
  return tables_lib.text_table(HEAD, _rows(results))


def tables(results: dict[str, Any]) -> str:
  """The table for the page."""
  first = results["programs"][0]
  rows = first["batch"] // first["devices"]
  caption = (
    f"{first['preset']}, {rows} sequence{'s' * (rows > 1)} of"
    f" {first['seq']:,} tokens per chip; memory and traffic are of one chip."
  )
  return f"{caption}\n\n{tables_lib.markdown_table(HEAD, _rows(results))}"


PARTS = ("weights", "moments", "bases", "gradients", "activations")


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
  """Draws what fills a chip, as stacked bars."""
  with figure.axes(path, 1, width=7) as (axis,):
    programs = results["programs"]
    names = [_name(x) for x in programs]
    left = [0.0] * len(programs)
    for part in PARTS:
      sizes = [(x["components"][part] or 0) / units.GIB for x in programs]
      axis.barh(names, sizes, left=left, label=part, height=0.6)
      left = [a + b for a, b in zip(left, sizes, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("GiB on one chip, assigned by the compiler")
    axis.legend(frameon=False, fontsize=8)
