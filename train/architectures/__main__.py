"""Trains architectures beyond LLaMA: `python -m train.architectures`.

  python -m train.architectures vit
  python -m train.architectures gru --optimizer adamw --rate 8e-3
  python -m train.architectures diffusion --set steps=3000 --out samples.png
  python -m train.architectures search vit cnn
  python -m train.architectures time
  python -m train.architectures views
  python -m train.architectures report

The name of an architecture trains it once and prints its scores. `search` makes
the runs that the comparison with AdamW lacks, and adds a line per run to
docs/results/architectures; it can be stopped at any time, and continues.
`time` measures the training steps side by side. `views` prints how much of the
gradients of convolutions each way to read them keeps. `report` rewrites the
tables and the figure of docs/results/architectures.md.
"""

import argparse
import os
import pathlib
import sys

from train.architectures import (
  catalog,
  cnn,
  loop,
  optimizers,
  report,
  search,
  tables,
  times,
  views,
)
from train.common import commands
from train.common.errors import Diverged, UserError

WORK = pathlib.Path("runs/architectures")
SAMPLED = "diffusion"  # the architecture that makes pictures


def parse(argv: list[str] | None) -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.architectures",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  subparsers = parser.add_subparsers(dest="command", required=True)
  for entry in catalog.ENTRIES.values():
    title = f"{entry.title}, {entry.library}"
    training = subparsers.add_parser(entry.name, help=title, description=title)
    _add_training(training, entry)
  searching = subparsers.add_parser(
    "search", help="make the runs that the comparison lacks"
  )
  _add_names(searching)
  searching.add_argument(
    "--budget",
    type=float,
    default=float("inf"),
    metavar="HOURS",
    help="start no run after this time",
  )
  searching.add_argument(
    "--nice", type=int, default=15, help="niceness (default: %(default)s)"
  )
  timing = subparsers.add_parser(
    "time", help="measure the training steps side by side"
  )
  _add_names(timing)
  subparsers.add_parser(
    "views", help="compare the ways to read a convolution kernel"
  )
  reporting = subparsers.add_parser(
    "report", help="rewrite the page from the records"
  )
  reporting.add_argument("--page", type=pathlib.Path, default=report.PAGE)
  for command in (searching, timing, reporting):
    command.add_argument(
      "--results",
      type=pathlib.Path,
      default=search.FOLDER,
      help="folder of the records (default: %(default)s)",
    )
  return parser.parse_args(argv)


def _add_names(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    "names",
    nargs="*",
    metavar="NAME",
    help=f"architectures (default: all): {', '.join(catalog.ENTRIES)}",
  )


def _add_training(
  command: argparse.ArgumentParser, entry: catalog.Entry
) -> None:
  add = command.add_argument
  add("--optimizer", choices=optimizers.METHODS, default="galore")
  add("--rate", type=float, help="learning rate (default: the one chosen)")
  add(
    "--multiplier",
    type=float,
    help="factor on it for the matrices (default: the one chosen)",
  )
  add("--seed", type=int, default=0, help="of weights and batches")
  add(
    "--set",
    dest="settings",
    action="append",
    default=[],
    metavar="FIELD=VALUE",
    help=f"a field of the Config in train/architectures/{entry.name}.py",
  )
  if entry.name == SAMPLED:
    add("--out", type=pathlib.Path, help="PNG to write a hundred samples to")


def train(flags: argparse.Namespace) -> int:
  """Trains once and prints the scores."""
  entry = catalog.ENTRIES[flags.command]
  config = catalog.override(entry.module().Config(), flags.settings)
  rates = _rates(entry, flags)
  command = search.command(entry, rates, flags.seed)
  print(" ".join([command, *(f"--set {x}" for x in flags.settings)]))
  made = loop.run(entry, config, rates, flags.seed, print)
  if made.record["status"] == "diverged":
    raise Diverged("the loss is not finite at the end; lower --rate")
  for name, value in made.record.items():
    if name != "curve":
      print(f"{name}  {value}")
  out = getattr(flags, "out", None)
  if out and made.trainer.sample:
    report.draw_samples(made.trainer.sample(made.state, flags.seed), out)
    print(f"wrote {out}")
  return 0


def _rates(entry: catalog.Entry, flags: argparse.Namespace) -> loop.Rates:
  """The rates of the command line, or else those that the search chose."""
  plan = search.plan(entry, search.FOLDER)
  found = {x.optimizer: plan.chosen(x) for x in plan.table.variants}
  start = tables.RATES.start, tables.MULTIPLIERS.start
  rate, multiplier = found.get(flags.optimizer) or start
  if flags.rate is not None:
    rate = flags.rate
  if flags.multiplier is not None:
    multiplier = flags.multiplier
  for name, value in (("--rate", rate), ("--multiplier", multiplier)):
    if not value > 0:
      raise UserError(f"{name} is {value}; use a number above 0")
  return loop.Rates(flags.optimizer, rate, multiplier)


def execute(flags: argparse.Namespace) -> int:
  """Runs the chosen command; returns its exit status."""
  if flags.command in catalog.ENTRIES:
    return train(flags)
  if flags.command == "report":
    report.write(flags.results, flags.page)
    return 0
  if flags.command == "views":
    print(views.table(cnn.Config()))
    return 0
  entries = [catalog.get(x) for x in flags.names or catalog.ENTRIES]
  if flags.command == "time":
    times.measure(entries, flags.results)
    return 0
  os.nice(max(0, flags.nice - os.nice(0)))
  say = lambda line: print(line, flush=True)
  return search.work_through(entries, flags.results, WORK, flags.budget, say)


def main(argv: list[str] | None = None) -> int:
  """Runs the command: 0 when done, 2 for wrong input, 130 if stopped."""
  flags = parse(argv)
  return commands.run(lambda: execute(flags))


if __name__ == "__main__":
  sys.exit(main())
