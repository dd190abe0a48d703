"""Draws what fills a device's memory, one bar per method.

    python -m train.measure.memory_bars docs/results/memory/llama_7b.json \
      --out docs/results/memory/llama_7b.png

The JSON file lists the bars. Each has a label, the flags of `train.memory`
that describe its training step, and the figures which that command reported.
`--measure gpu` and `--measure tpu` run the commands of the bars with such a
target again and replace their figures. This needs the compiler of the target,
which is in the extra `gpu-aot` or `tpu-aot`.
"""

import argparse
import datetime
import json
import pathlib
import shlex
import subprocess
import sys
from typing import Any

from train.common import atomic_files, commands, units
from train.common.errors import UserError
from train.measure import figure as figure_lib
from train.measure import tables

# Component of `train.memory --json` to its label and colour.
COMPONENTS = {
  "weights": ("weights", "#4c72b0"),
  "gradients": ("gradients", "#dd8452"),
  "moments": ("moments", "#55a868"),
  "bases": ("bases", "#8172b3"),
  "activations": ("activations, temporaries", "#b8b8b8"),
}


def main(argv: list[str] | None = None) -> int:
  """Runs the command: 0 drawn, 2 wrong input, 130 interrupted."""
  flags = parse(argv)
  return commands.run(lambda: measure_and_draw(flags))


def measure_and_draw(flags: argparse.Namespace) -> None:
  """Does what the command line asks for; prints the table."""
  content = read(flags.source)
  if flags.measure:
    measure(content, flags.measure, flags.python)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    atomic_files.write_text(flags.source, text)
  if flags.out:
    draw(content, flags.out)
  print(table(content))


def parse(argv: list[str] | None) -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.measure.memory_bars",
    description="Draws the memory of training steps by component.",
  )
  add = parser.add_argument
  add("source", type=pathlib.Path, metavar="JSON", help="file of the bars")
  add("--out", type=pathlib.Path, metavar="PNG", help="where to draw them")
  add(
    "--measure",
    choices=("gpu", "tpu"),
    help="compile the training steps of bars with such a target again, and"
    " update the JSON file",
  )
  add(
    "--python",
    default=sys.executable,
    metavar="FILE",
    help="Python interpreter with the target's compiler (default: this one)",
  )
  return parser.parse_args(argv)


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads a file of bars.

  Raises:
    UserError: The file is missing, is not JSON, or has no bars.
  """
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read: {error}") from None
  if not isinstance(content, dict) or not content.get("bars"):
    raise UserError(f"{path} has no list `bars`")
  return content


def command(bar: dict[str, Any], python: str = "python") -> list[str]:
  """The command that compiles the training step of a bar."""
  return [python, "-m", "train.memory", *shlex.split(bar["flags"]), "--json"]


def measure(content: dict[str, Any], platform: str, python: str) -> None:
  """Compiles the training step of bars again and keeps the figures.

  Args:
    content: A file's content, updated in place.
    platform: `gpu` or `tpu`; bars with another target stay as they are.
    python: Interpreter of an environment with the target's compiler.

  Raises:
    UserError: A command failed.
  """
  for bar in content["bars"]:
    if f"--target {platform}:" not in bar["flags"]:
      continue
    print("+", shlex.join(command(bar)), file=sys.stderr)
    done = subprocess.run(
      command(bar, python), capture_output=True, text=True, check=False
    )
    # 1 means that the program does not fit, which is a figure, too.
    if done.returncode not in (0, 1) or not done.stdout:
      raise UserError(f"{shlex.join(command(bar))} failed:\n{done.stderr}")
    bar["figures"] = json.loads(done.stdout.splitlines()[-1])
    bar["versions"] = _versions(python)
    bar["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()


def _versions(python: str) -> dict[str, str]:
  """Versions of the packages that decide the figures, in an environment."""
  code = (
    "import json; from train.measure import machine;"
    " print(json.dumps(machine.versions()))"
  )
  done = subprocess.run(
    [python, "-c", code], capture_output=True, text=True, check=True
  )
  return json.loads(done.stdout)


def gib(bar: dict[str, Any]) -> dict[str, float]:
  """GiB of each component, and of the `peak`.

  A compiler that refuses a program for its size does not report temporaries.
  They are 0 here, and `peak` is what the compiler says that it needs at least.

  Raises:
    UserError: The bar was not measured.
  """
  if "figures" not in bar:
    raise UserError(f"{bar['label']!r} has no figures; run --measure")
  sizes = bar["figures"]["components"]
  return {name: (sizes[name] or 0) / units.GIB for name in COMPONENTS} | {
    "peak": bar["figures"]["peak_bytes"] / units.GIB
  }


def peak_text(bar: dict[str, Any]) -> str:
  """The peak as text; `> ` precedes that of a refused program."""
  refused = bar["figures"]["components"]["activations"] is None
  return f"{'> ' * refused}{gib(bar)['peak']:.1f} GiB"


def table(content: dict[str, Any]) -> str:
  """The figures in GiB, one line per bar."""
  rows = [
    [
      bar["label"],
      *(f"{gib(bar)[name]:.2f}" for name in COMPONENTS),
      peak_text(bar),
    ]
    for bar in content["bars"]
  ]
  return tables.text_table(["GiB", *COMPONENTS, "peak"], rows)


def draw(content: dict[str, Any], path: pathlib.Path) -> None:
  """Draws a stacked horizontal bar per method, the first at the top."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  bars = content["bars"]
  sizes = [gib(bar) for bar in bars]
  figure, axis = plt.subplots(
    figsize=(9, 1.5 + 0.62 * len(bars)), layout="constrained"
  )
  labels = [bar["label"] for bar in bars]
  left = [0.0] * len(bars)
  for name, (label, color) in COMPONENTS.items():
    widths = [x[name] for x in sizes]
    axis.barh(labels, widths, left=left, label=label, color=color, height=0.62)
    for index, (start, width) in enumerate(zip(left, widths, strict=True)):
      if width > 0.04 * max(x["peak"] for x in sizes):
        axis.text(
          start + width / 2,
          index,
          f"{width:.1f}",
          ha="center",
          va="center",
          color="white",
          fontsize=9,
        )
    left = [a + b for a, b in zip(left, widths, strict=True)]
  for limit in content.get("limits", ()):
    axis.axvline(limit["gib"], color="0.25", ls="--", lw=1, zorder=0)
    axis.text(
      limit["gib"] + 0.3,
      len(bars) - 0.45,
      limit["label"],
      fontsize=9,
      color="0.25",
      va="bottom",
    )
  for index, (end, bar) in enumerate(zip(left, bars, strict=True)):
    axis.text(
      end + 0.3,
      index,
      peak_text(bar),
      va="center",
      weight="bold",
      bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
    )
  axis.set_xlim(right=1.14 * max(left))
  axis.invert_yaxis()
  axis.set_xlabel(content["caption"], fontsize=9)
  axis.set_title(content["title"], fontsize=11, loc="left")
  figure.legend(
    *axis.get_legend_handles_labels(),
    frameon=False,
    ncols=len(COMPONENTS),
    fontsize=9,
    loc="outside lower left",
  )
  axis.spines[["top", "right"]].set_visible(False)
  axis.tick_params(axis="y", length=0)
  figure_lib.save(figure, path, 140)
  plt.close(figure)


if __name__ == "__main__":
  sys.exit(main())
