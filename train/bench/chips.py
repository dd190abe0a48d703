"""LLaMA-7B on slices of TPUs: what the TPU compiler assigns and sends.

Each training step is compiled by `python -m train.memory` in a process of its
own, some minutes each; nothing is executed. The weights are split over all
chips (fsdp), the batch too. The compiler has to be in the environment of
`--python` (extra tpu-aot).
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

from train.common.errors import UserError
from train.measure import figure, timing

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of this benchmark."""
  add = parser.add_argument
  add("--preset", default="llama_7b")
  add("--targets", default="tpu:v6e:2x2,tpu:v5e:4x4")
  add(
    "--methods",
    default="adamw,galore,galore+layerwise",
    help="of train.memory; +layerwise: updated layer by layer",
  )
  add("--seq", type=int, default=2048, help="tokens a row")
  add("--rows", type=int, default=1, help="of each chip")
  add("--python", default=sys.executable, help="with the TPU compiler")
  add("--set", action="append", default=[], dest="settings", help="a field")
  add(
    "--keep",
    type=pathlib.Path,
    help="folder for each program's figures;"
    " those that are there already are not compiled again",
  )


QUICK = {"preset": "llama_9m", "targets": "tpu:v6e:2x2", "seq": 256}


def chips_of(target: str) -> int:
  """Chips of a slice such as tpu:v5e:4x4.

  Raises:
    UserError: it names no topology.
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
  """Name and form of one of `--methods`.

  Raises:
    UserError: it has a form that does not exist.
  """
  name, _, form = method.partition("+")
  if form not in ("", "layerwise"):
    raise UserError(
      f"--methods {method!r}: {form!r} is no form of an update; write"
      f" {name!r} or '{name}+layerwise'"
    )
  return name, form


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """Compiles every method for every slice, one after the other."""
  found = []
  for method in flags.methods.split(","):
    _split(method)  # a mistake shows before minutes of compiling
  for target in flags.targets.split(","):
    for method in flags.methods.split(","):
      found.append(_compile(flags, target, method))
      print(text({"programs": found[-1:]}), flush=True)
  return {"programs": found}


def _compile(
  flags: argparse.Namespace, target: str, method: str
) -> dict[str, Any]:
  name, form = _split(method)
  file = f"{target.removeprefix('tpu:')}-{method}.json"
  kept = flags.keep / file if flags.keep else None
  if kept and kept.is_file() and kept.stat().st_size:
    return json.loads(kept.read_text(encoding="utf-8"))
  words = [
    f"--preset={flags.preset}",
    f"--method={name}",
    *(["--layerwise"] if form else []),
    f"--seq={flags.seq}",
    f"--batch={flags.rows * chips_of(target)}",
    f"--target={target}",
    *(f"--set={x}" for x in flags.settings),
    "--json",
  ]
  command = [flags.python, "-m", "train.memory", *words]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  lines = done.stdout.strip().splitlines()
  if done.returncode not in (0, 1) or not lines:
    said = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise UserError(f"{' '.join(command[1:])}: {said}")
  if kept:
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(lines[-1], encoding="utf-8")
  return json.loads(lines[-1])


HEAD = [
  "slice, optimizer",
  "weights GiB",
  "moments",
  "bases",
  "temporaries",
  "peak",
  "of the chip",
  "gathered every step",
  "reduced",
  "when due: gathered",
  "reduced",
]


def _name(x: dict[str, Any]) -> str:
  form = ", layerwise" * x["layerwise"]
  return f"{x['target'].removeprefix('tpu:')}, {x['method']}{form}"


def _rows(results: dict[str, Any]) -> list[list[str]]:
  rows = []
  for x in results["programs"]:
    gib = lambda size: "-" if size is None else f"{size / GIB:.2f}"
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


def _traffic(sums: dict[str, Any] | None) -> list[str]:
  """Count and GiB: gathered and reduced, at every step and when due."""
  cells = []
  for when in ("every_step", "when_due"):
    kinds = (sums or {}).get(when, {})
    for reduced in (False, True):
      chosen = [x for kind, x in kinds.items() if ("reduce" in kind) == reduced]
      count = sum(x["count"] for x in chosen)
      size = sum(x["bytes"] for x in chosen) / GIB
      cells.append(f"{count}, {size:.2f} GiB" if count else "-")
  return cells


def text(results: dict[str, Any]) -> str:
  """The table for the terminal."""
  return timing.text_table(HEAD, _rows(results))


def tables(results: dict[str, Any]) -> str:
  """The table for the page."""
  first = results["programs"][0]
  rows = first["batch"] // first["devices"]
  caption = (
    f"{first['preset']}, {rows} row{'s' * (rows > 1)} of {first['seq']:,}"
    " tokens a chip, bytes of one chip."
  )
  return f"{caption}\n\n{timing.markdown_table(HEAD, _rows(results))}"


PARTS = ("weights", "moments", "bases", "gradients", "activations")


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
  """What fills a chip, stacked bars."""
  with figure.axes(path, 1, width=7) as (axis,):
    found = results["programs"]
    names = [_name(x) for x in found]
    left = [0.0] * len(found)
    for part in PARTS:
      sizes = [(x["components"][part] or 0) / GIB for x in found]
      axis.barh(names, sizes, left=left, label=part, height=0.6)
      left = [a + b for a, b in zip(left, sizes, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("GiB of one chip, assigned by the compiler")
    axis.legend(frameon=False, fontsize=8)
