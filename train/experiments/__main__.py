"""Small versions of the papers' tables: `python -m train.experiments`.

  python -m train.experiments run length --budget 2
  python -m train.experiments run length --lanes 16
  python -m train.experiments report
  python -m train.experiments time length
  python -m train.experiments mechanism
  python -m train.experiments quick

`run` makes the runs that a table lacks, one after the other, and adds a line
per run to docs/results/evidence/TABLE.jsonl. It can be stopped at any time
(Ctrl-C, SIGTERM, kill -9), and the same command resumes it. A program is
compiled once a method, not once a run. Started twice on a CPU, the command
makes two runs at a time. On a GPU or TPU, `--lanes` trains several runs of a
method side by side, as one program. `report` rewrites the tables and figures of
docs/results from those lines. `time` measures the training steps of all methods
in one process, for the tables. `mechanism` records singular values of
gradients. `quick` tries all of this on a tiny model, in minutes.
"""

import argparse
import os
import pathlib
import sys

from train.common import commands
from train.common.errors import UserError
from train.experiments import (
  mechanism,
  report,
  results,
  runner,
  speed,
  tables,
  texts,
)
from train.run import checkpoint

WORK = pathlib.Path("runs/experiments")


def count(text: str) -> int:
  """Parses a count such as `1000000`, `256k` or `1m`."""
  scale = {"k": 1000, "m": 1_000_000}.get(text[-1:].lower(), 1)
  number = text[:-1] if scale > 1 else text
  try:
    value = round(float(number) * scale)
  except ValueError:
    value = 0
  if value < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 256k")
  return value


def parse(argv: list[str] | None) -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.experiments",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  run = commands.add_parser("run", help="make the runs that a table lacks")
  run.add_argument(
    "table",
    choices=tables.TABLES,
    help="which table (train/experiments/tables.py)",
  )
  _add_running(run)
  _add_results(run)
  timing = commands.add_parser(
    "time", help="time the training steps of a table's variants"
  )
  timing.add_argument(
    "table",
    choices=tables.TABLES,
    help="which table (train/experiments/tables.py)",
  )
  _add_text(timing)
  _add_results(timing)
  quick = commands.add_parser(
    "quick", help="try the experiments on a tiny model"
  )
  _add_running(quick)
  quick.add_argument(
    "--results",
    type=pathlib.Path,
    default=WORK / "quick",
    help=_RESULTS,
  )
  for name, what in (
    ("report", "rewrite the page from the records"),
    ("mechanism", "record spectra of gradients, then report"),
  ):
    command = commands.add_parser(name, help=what)
    _add_results(command)
    command.add_argument(
      "--page",
      dest="pages",
      type=pathlib.Path,
      nargs="+",
      default=report.PAGES,
      metavar="FILE",
      help="Markdown pages with the tables (default: the two of docs/results)",
    )
  return parser.parse_args(argv)


_RESULTS = "folder of the records of finished runs (default: %(default)s)"


def _add_results(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    "--results",
    type=pathlib.Path,
    default=results.FOLDER,
    help=_RESULTS,
  )


def _add_running(command: argparse.ArgumentParser) -> None:
  add = command.add_argument
  _add_text(command)
  add(
    "--budget",
    type=float,
    default=float("inf"),
    metavar="HOURS",
    help="stop after this time; the unfinished run is saved",
  )
  add(
    "--work",
    type=pathlib.Path,
    default=WORK,
    help="folder for checkpoints, shared by processes that work on one table"
    " (default: %(default)s)",
  )
  add(
    "--lanes",
    type=int,
    default=1,
    metavar="N",
    help="most runs that are trained side by side by one program, on a GPU or"
    " TPU (default: %(default)s)",
  )
  add(
    "--nice",
    type=int,
    default=10,
    help="niceness to run with; higher gives way to other processes",
  )


def _add_text(command: argparse.ArgumentParser) -> None:
  known = "; ".join(f"{name}: {what}" for name, what in texts.TEXTS.items())
  command.add_argument(
    "--tokens",
    type=count,
    help="tokens of each run, such as 256k (default: the table's full size)",
  )
  command.add_argument(
    "--text",
    help=f"the text to train on: {known}; or a file (default: the table's)",
  )


def run(flags: argparse.Namespace) -> int:
  """Makes the missing runs of a table."""
  if not flags.budget > 0:
    raise UserError(f"--budget is {flags.budget}; use hours above 0")
  if flags.lanes < 1:
    raise UserError(f"--lanes is {flags.lanes}; use 1 or more")
  checkpoint.silence_orbax()
  os.nice(max(0, flags.nice - os.nice(0)))
  table = tables.TABLES[getattr(flags, "table", "quick")]
  tokens = flags.tokens or table.tokens
  status = runner.work_through(
    table,
    tokens=tokens,
    text=flags.text or table.text,
    folder=flags.results,
    work=flags.work,
    hours=flags.budget,
    lanes=flags.lanes,
    say=lambda line: print(line, flush=True),
  )
  if flags.command == "quick":
    plan = runner.plan(table, tokens, flags.text or table.text, flags.results)
    print(report.table(plan))
  return status


def execute(flags: argparse.Namespace) -> int:
  """Runs the chosen command; returns its exit status."""
  if flags.command in ("run", "quick"):
    return run(flags)
  if flags.command == "time":
    checkpoint.silence_orbax()
    table = tables.TABLES[flags.table]
    tokens = flags.tokens or table.tokens
    speed.measure(
      runner.plan(table, tokens, flags.text or table.text, flags.results),
      flags.results,
    )
    print(f"wrote {flags.results / speed.FILE}")
    return 0
  if flags.command == "mechanism":
    checkpoint.silence_orbax()
    mechanism.run(flags.results)
  report.write(flags.results, flags.pages)
  return 0


def main(argv: list[str] | None = None) -> int:
  """Runs the command: 0 when done, 2 for wrong input, 130 if stopped."""
  flags = parse(argv)
  return commands.run(lambda: execute(flags))


if __name__ == "__main__":
  sys.exit(main())
