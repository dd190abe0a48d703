"""Benchmarks, each measured together with its peers in one process.

    python -m train.bench step      the optimizer's step on LLaMA-shaped trees
    python -m train.bench lean      training with gradients at rank r
    python -m train.bench reduce    what devices send each other, compiled only
    python -m train.bench refresh   bases: cost and captured energy
    python -m train.bench compile   tracing and compiling
    python -m train.bench shard     bytes and collectives on eight devices
    python -m train.bench cost      measured times beside the cost model's
    python -m train.bench chips     LLaMA-7B on slices of TPUs, compiled only
    python -m train.bench device    a new device, in five minutes
    python -m train.bench loop      the training loop beside its bare step
    python -m train.bench all       all of them except `loop`, then the report
    python -m train.bench report    docs/results/benchmarks.md from the records

On a CPU backend, times are processor seconds, which other processes disturb
less than wall-clock time. Compare the ratios rather than the seconds.
"""

import argparse
import importlib.util
import pathlib
import subprocess
import sys
from typing import Any

from train.bench import record as record_lib
from train.bench import relaunch, report
from train.bench.report import BENCHMARKS
from train.common import commands
from train.common.errors import UserError


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status.

  Returns:
    0 when measured, 1 if a benchmark of `all` or a check of `device` failed, 2
    for wrong input, 130 if interrupted.
  """
  argv = sys.argv[1:] if argv is None else argv
  if argv[:1] == ["loop"]:
    from train.bench import loop

    return loop.main(argv[1:])
  flags = parse(argv)

  def action() -> int | None:
    if flags.benchmark == "all":
      return run_all(flags)
    if flags.benchmark == "report":
      report.write(flags.out, flags.page)
      return 0
    failed = getattr(report.module(flags.benchmark), "failed", lambda _: False)
    records = run(flags, argv)
    return int(any(failed(record["results"]) for record in records))

  return commands.run(action)


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses the command line; `--quick` changes the defaults."""
  parser = argparse.ArgumentParser(
    prog="python -m train.bench",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="benchmark", required=True)
  for name in BENCHMARKS:
    if name not in argv:  # imports nothing that another one needs
      commands.add_parser(name)
      continue
    module: Any = report.module(name)
    command = commands.add_parser(
      name,
      description=module.__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--out", type=pathlib.Path, help=_OUT)
    _add_common(command)
    module.add_arguments(command)
    if "--quick" in argv:
      command.set_defaults(**module.QUICK)
  for name in ("all", "report"):
    command = commands.add_parser(name, help=_HELP[name])
    command.add_argument(
      "--out",
      type=pathlib.Path,
      default=record_lib.FOLDER,
      help="folder of the records and figures (default: %(default)s)",
    )
    command.add_argument(
      "--page",
      type=pathlib.Path,
      default=report.PAGE,
      help="Markdown page with the tables (default: %(default)s)",
    )
    if name == "all":
      _add_common(command)
      command.add_argument("--torch", action="store_true", help=_TORCH)
      command.add_argument("--only", default=",".join(BENCHMARKS), help=_ONLY)
      command.add_argument("--tpu-python", metavar="PATH", help=_TPU)
  commands.add_parser("loop", help="see python -m train.bench loop --help")
  return parser.parse_args(argv)


_OUT = "folder for the record and its figure (default: only print)"
_TORCH = "let `step` also measure galore-torch and PyTorch's AdamW"
_TPU = "Python interpreter with the TPU compiler, for `chips` (extra tpu-aot)"
_ONLY = "the benchmarks to run, separated by commas"
_HELP = {
  "all": "run every benchmark in its own process, then write the report",
  "report": "rewrite the page's tables from the records",
}


def _add_common(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--quick", action="store_true", help="a smaller version, as a trial"
  )
  parser.add_argument(
    "--single-threaded",
    action="store_true",
    help="use one thread for XLA and one for BLAS",
  )


def run(flags: argparse.Namespace, argv: list[str]) -> list[dict[str, Any]]:
  """Measures one benchmark; saves its records if a folder is given."""
  if flags.single_threaded:
    relaunch.with_one_thread(argv)
  module: Any = report.module(flags.benchmark)
  relaunch.with_devices(argv, getattr(module, "DEVICES", 1))
  records = []
  for part, settings in getattr(module, "parts", lambda _: [("", {})])(flags):
    vars(flags).update(settings)
    results = module.measure(flags)
    part = getattr(module, "part_of", lambda _, part=part: part)(results)
    own = _arguments_of_part(argv, settings)
    records.append(record_lib.make(flags.benchmark, own, flags, results, part))
    if flags.out:
      path = record_lib.save(records[-1], flags.out)
      report.draw(path)
      print(f"\nwrote {path}", flush=True)
  return records


def _arguments_of_part(argv: list[str], settings: dict[str, str]) -> list[str]:
  """The arguments of a command that measures only this part."""
  own = [x for k, v in settings.items() for x in (f"--{k}", v)]
  return record_lib.without(argv, settings) + own


def run_all(flags: argparse.Namespace) -> int:
  """Runs every benchmark in its own process, then writes the report."""
  names = flags.only.split(",")
  if unknown := set(names) - set(BENCHMARKS):
    raise UserError(
      f"--only: {', '.join(sorted(unknown))} unknown; choose from"
      f" {', '.join(BENCHMARKS)}"
    )
  failed = []
  for name in names:
    if name == "chips" and not (flags.tpu_python or _has_tpu_compiler()):
      print(f"\n=== chips skipped, its record is kept; it needs a {_TPU}")
      continue
    print(f"\n=== {name}", flush=True)
    own = _arguments_of_benchmark(flags, name)
    command = [sys.executable, "-m", "train.bench", *own]
    if subprocess.run(command, check=False).returncode:
      failed.append(name)
  report.write(flags.out, flags.page)
  if failed:
    print(f"\nfailed, their old records are kept: {', '.join(failed)}")
  return 1 if failed else 0


def _arguments_of_benchmark(flags: argparse.Namespace, name: str) -> list[str]:
  """The arguments with which `all` runs one benchmark."""
  argv = [name, f"--out={flags.out}"]
  argv += ["--quick"] * flags.quick
  argv += ["--single-threaded"] * flags.single_threaded
  argv += ["--torch"] * (flags.torch and name == "step")
  if name == "chips" and flags.tpu_python:
    argv.append(f"--python={flags.tpu_python}")
  return argv


def _has_tpu_compiler() -> bool:
  return importlib.util.find_spec("libtpu") is not None


if __name__ == "__main__":
  sys.exit(main())
