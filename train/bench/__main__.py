"""Benchmarks, each side by side with its peers in one process and one run.

    python -m train.bench step      the optimizer's step on LLaMA-shaped trees
    python -m train.bench refresh   bases: cost and captured energy
    python -m train.bench compile   tracing and compiling
    python -m train.bench shard     bytes and collectives on eight devices
    python -m train.bench cost      the cost model, and what the machine can do
    python -m train.bench chips     LLaMA-7B on slices of TPUs, compiled only
    python -m train.bench loop      the training loop beside its bare step
    python -m train.bench all       all of them but `loop`, and the report
    python -m train.bench report    docs/results/benchmarks.md from the records

Where the processor computes, times are processor seconds, which a busy machine
disturbs less than the clock; the ratios are what to read.
"""

import argparse
import importlib
import importlib.util
import pathlib
import subprocess
import sys
from typing import Any

from train.bench import report
from train.common.errors import UserError
from train.measure import machine

BENCHMARKS = ("step", "refresh", "compile", "shard", "cost", "chips")


def main(words: list[str] | None = None) -> int:
  """The command: 0 measured, 1 a benchmark of `all` failed, 2 wrong input."""
  words = sys.argv[1:] if words is None else words
  if words[:1] == ["loop"]:
    from train.bench import loop

    return loop.main(words[1:])
  flags = parse(words)
  try:
    if flags.benchmark == "report":
      report.write(flags.out, flags.page)
      return 0
    if flags.benchmark == "all":
      return run_all(flags)
    run(flags, words)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


def parse(words: list[str]) -> argparse.Namespace:
  """Reads the command line; `--quick` changes what is not given."""
  parser = argparse.ArgumentParser(
    prog="python -m train.bench",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="benchmark", required=True)
  for name in BENCHMARKS:
    module = _module(name)
    command = commands.add_parser(
      name,
      description=module.__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--out", type=pathlib.Path, help=_OUT)
    _add_common(command)
    module.add_arguments(command)
    if "--quick" in words and name in words:
      command.set_defaults(**module.QUICK)
  for name in ("all", "report"):
    command = commands.add_parser(name, help=_HELP[name])
    command.add_argument("--out", type=pathlib.Path, default=machine.FOLDER)
    command.add_argument("--page", type=pathlib.Path, default=report.PAGE)
    if name == "all":
      _add_common(command)
      command.add_argument("--torch", action="store_true", help=_TORCH)
      command.add_argument("--only", default=",".join(BENCHMARKS), help=_ONLY)
      command.add_argument("--tpu-python", metavar="PATH", help=_TPU)
  commands.add_parser("loop", help="python -m train.bench loop --help")
  return parser.parse_args(words)


_OUT = "folder for the record and the picture; default: print only"
_TORCH = "galore-torch and torch's AdamW among the step's peers"
_TPU = "interpreter with the TPU compiler, for `chips` (extra tpu-aot)"
_ONLY = "of the benchmarks, separated by commas"
_HELP = {
  "all": "every benchmark in a process of its own, and the report",
  "report": "renders the tables of the page from the records",
}


def _add_common(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--quick", action="store_true", help="smaller, to try")
  parser.add_argument(
    "--single-threaded",
    action="store_true",
    help="one thread for XLA and for BLAS",
  )


def _module(name: str) -> Any:
  return importlib.import_module(f"train.bench.{name}")


def run(flags: argparse.Namespace, words: list[str]) -> list[dict[str, Any]]:
  """Measures one benchmark, and keeps what it found if a folder is given."""
  if flags.single_threaded:
    machine.restart_with_one_thread(words)
  module = _module(flags.benchmark)
  machine.restart_with_devices(words, getattr(module, "DEVICES", 1))
  found = []
  for part, chosen in getattr(module, "parts", lambda _: [("", {})])(flags):
    vars(flags).update(chosen)
    results = module.measure(flags)
    own = _chosen(words, chosen)
    found.append(machine.make(flags.benchmark, own, flags, results, part))
    if flags.out:
      path = machine.save(found[-1], flags.out)
      report.draw(path)
      print(f"\nwrote {path}", flush=True)
  return found


def _chosen(words: list[str], chosen: dict[str, str]) -> list[str]:
  """The words of a command that measures a part only."""
  own = [word for k, v in chosen.items() for word in (f"--{k}", v)]
  return machine.without(words, chosen) + own


def run_all(flags: argparse.Namespace) -> int:
  """Every benchmark in a process of its own, then the report."""
  chosen = flags.only.split(",")
  if unknown := set(chosen) - set(BENCHMARKS):
    raise UserError(
      f"--only: {', '.join(sorted(unknown))} unknown; take"
      f" {', '.join(BENCHMARKS)}"
    )
  failed = []
  for name in chosen:
    if name == "chips" and not (flags.tpu_python or _has_tpu_compiler()):
      print(f"\n=== chips left out, its record stays: needs {_TPU}")
      continue
    words = _words(flags, name)
    print(f"\n=== {name}", flush=True)
    command = [sys.executable, "-m", "train.bench", *words]
    if subprocess.run(command, check=False).returncode:
      failed.append(name)
  report.write(flags.out, flags.page)
  if failed:
    print(f"\nfailed, their records are as before: {', '.join(failed)}")
  return 1 if failed else 0


def _words(flags: argparse.Namespace, name: str) -> list[str]:
  """The command line of one of the benchmarks of `all`."""
  words = [name, f"--out={flags.out}"]
  words += ["--quick"] * flags.quick
  words += ["--single-threaded"] * flags.single_threaded
  words += ["--torch"] * (flags.torch and name == "step")
  if name == "chips" and flags.tpu_python:
    words.append(f"--python={flags.tpu_python}")
  return words


def _has_tpu_compiler() -> bool:
  return importlib.util.find_spec("libtpu") is not None


if __name__ == "__main__":
  sys.exit(main())
