"""Trains architectures beyond LLaMA: `python -m train.architectures`.

  python -m train.architectures vit
  python -m train.architectures gru --optimizer adamw --rate 8e-3
  python -m train.architectures diffusion --set steps=3000 --out samples.png
  python -m train.architectures search vit cnn
  python -m train.architectures time
  python -m train.architectures report

The name of an architecture trains it once and prints its scores. `search` makes
the runs that the comparison with AdamW lacks, and adds a line per run to
docs/results/architectures; it can be stopped at any time, and continues.
`time` measures the training steps side by side. `report` rewrites the tables
and the figure of docs/results/architectures.md.
"""

import argparse
import os
import pathlib
import sys

from train.architectures import catalog, loop, optimizers, search, tables
from train.run import exit_status

WORK = pathlib.Path("runs/architectures")


def parse(argv: list[str] | None) -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.architectures",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  for entry in catalog.ENTRIES.values():
    _add_training(
      commands.add_parser(entry.name, help=f"{entry.title}, {entry.library}")
    )
  for name, what in (
    ("search", "make the runs that the comparison lacks"),
    ("time", "measure the training steps side by side"),
    ("report", "rewrite the page from the records"),
  ):
    command = commands.add_parser(name, help=what)
    command.add_argument(
      "names",
      nargs="*",
      choices=[*catalog.ENTRIES, []],
      metavar="NAME",
      help="architectures (default: all)",
    )
    command.add_argument(
      "--results",
      type=pathlib.Path,
      default=search.FOLDER,
      help="folder of the records (default: %(default)s)",
    )
    if name == "search":
      command.add_argument(
        "--budget",
        type=float,
        default=float("inf"),
        metavar="HOURS",
        help="start no run after this time",
      )
      command.add_argument(
        "--nice", type=int, default=15, help="niceness to run with"
      )
  return parser.parse_args(argv)


def _add_training(command: argparse.ArgumentParser) -> None:
  add = command.add_argument
  add("--optimizer", choices=optimizers.METHODS, default="galore")
  add("--rate", type=float, help="learning rate (default: the one chosen)")
  add(
    "--multiplier",
    type=float,
    help="factor on it for the matrices (default: the one chosen)",
  )
  add("--seed", type=int, default=0)
  add(
    "--set",
    dest="settings",
    action="append",
    default=[],
    metavar="FIELD=VALUE",
    help="a field of the Config of the architecture's file",
  )
  add("--out", type=pathlib.Path, help="PNG for samples of the diffusion model")


def train(flags: argparse.Namespace) -> int:
  """Trains once and prints the scores."""
  entry = catalog.ENTRIES[flags.command]
  config = catalog.override(entry.module().Config(), flags.settings)
  rate = flags.rate or tables.RATES.start
  multiplier = flags.multiplier or tables.MULTIPLIERS.start
  rates = loop.Rates(flags.optimizer, rate, multiplier)
  finished = loop.run(entry, config, rates, flags.seed, print)
  for name, value in finished.record.items():
    if name != "curve":
      print(f"{name}  {value}")
  return 0


def execute(flags: argparse.Namespace) -> int:
  """Runs the chosen command; returns its exit status."""
  if flags.command in catalog.ENTRIES:
    return train(flags)
  entries = [catalog.ENTRIES[x] for x in flags.names or catalog.ENTRIES]
  if flags.command == "search":
    os.nice(max(0, flags.nice - os.nice(0)))
    say = lambda line: print(line, flush=True)
    return search.work_through(entries, flags.results, WORK, flags.budget, say)
  raise NotImplementedError


def main(argv: list[str] | None = None) -> int:
  """Runs the command: 0 when done, 2 for wrong input, 130 if stopped."""
  flags = parse(argv)
  return exit_status.report_errors(lambda: execute(flags))


if __name__ == "__main__":
  sys.exit(main())
