"""The papers' tables in small: `python -m train.experiments`.

  python -m train.experiments run methods --tokens 256k --budget 2
  python -m train.experiments report
  python -m train.experiments time methods --tokens 256k
  python -m train.experiments mechanism
  python -m train.experiments quick

`run` trains what a table lacks, one run after the other, and adds a line a run
to docs/results/evidence/TABLE.jsonl. It can be stopped (Ctrl-C, SIGTERM,
kill -9) at any time: the same command goes on where it was; started twice, it
trains two runs at a time. `report` rewrites the tables and figures of
docs/results/evidence.md from those lines. `time` measures
steps of all methods side by side, for the tables. `mechanism` looks
at the singular values of gradients, for the same page. `quick` tries the whole
on a tiny model, in minutes.
"""

import argparse
import os
import pathlib
import sys

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
from train.run import checkpoint, exit_status

WORK = pathlib.Path("runs/experiments")


def count(text: str) -> int:
  """Reads `1000000`, `256k` or `1m`."""
  scale = {"k": 1000, "m": 1_000_000}.get(text[-1:].lower(), 1)
  number = text[:-1] if scale > 1 else text
  try:
    found = round(float(number) * scale)
  except ValueError:
    found = 0
  if found < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is no number such as 256k")
  return found


def parse(words: list[str] | None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.experiments",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  run = commands.add_parser("run", help="train what a table lacks")
  run.add_argument("table", choices=tables.TABLES, help="see tables.py")
  _add_running(run)
  _add_results(run)
  timing = commands.add_parser("time", help="time the steps of a table")
  timing.add_argument("table", choices=tables.TABLES, help="see tables.py")
  _add_text(timing)
  _add_results(timing)
  quick = commands.add_parser("quick", help="try it on a tiny model")
  _add_running(quick)
  quick.add_argument("--results", type=pathlib.Path, default=WORK / "quick")
  for name, what in (
    ("report", "rewrite the page from what was found"),
    ("mechanism", "look at gradients, then report"),
  ):
    command = commands.add_parser(name, help=what)
    _add_results(command)
    command.add_argument("--page", type=pathlib.Path, default=report.PAGE)
  return parser.parse_args(words)


def _add_results(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    "--results",
    type=pathlib.Path,
    default=results.FOLDER,
    help="of finished runs",
  )


def _add_running(command: argparse.ArgumentParser) -> None:
  add = command.add_argument
  _add_text(command)
  add(
    "--budget",
    type=float,
    default=float("inf"),
    metavar="HOURS",
    help="stops after so long; the run under way is saved",
  )
  add(
    "--work",
    type=pathlib.Path,
    default=WORK,
    help="for checkpoints; runners of one table share it",
  )
  add("--nice", type=int, default=10, help="lowers the priority to this")


def _add_text(command: argparse.ArgumentParser) -> None:
  known = "; ".join(f"{name}: {what}" for name, what in texts.TEXTS.items())
  command.add_argument(
    "--tokens", type=count, help="of one run, such as 256k; a million"
  )
  command.add_argument("--text", default="speeches", help=f"{known}; or a file")


def run(flags: argparse.Namespace) -> int:
  """Works through a table."""
  if not flags.budget > 0:
    raise UserError(f"--budget is {flags.budget}; give hours above 0")
  checkpoint.silence_orbax()
  os.nice(max(0, flags.nice - os.nice(0)))
  table = tables.TABLES[getattr(flags, "table", "quick")]
  tokens = flags.tokens or table.tokens
  status = runner.work_through(
    table,
    tokens=tokens,
    text=flags.text,
    folder=flags.results,
    work=flags.work,
    hours=flags.budget,
    say=lambda line: print(line, flush=True),
  )
  if flags.command == "quick":
    plan = runner.plan(table, tokens, flags.text, flags.results)
    print(report.table(plan))
  return status


def act(flags: argparse.Namespace) -> int:
  """Does what was asked for."""
  if flags.command in ("run", "quick"):
    return run(flags)
  if flags.command == "time":
    checkpoint.silence_orbax()
    table = tables.TABLES[flags.table]
    tokens = flags.tokens or table.tokens
    speed.measure(
      runner.plan(table, tokens, flags.text, flags.results), flags.results
    )
    print(f"wrote {flags.results / speed.FILE}")
    return 0
  if flags.command == "mechanism":
    checkpoint.silence_orbax()
    mechanism.run(flags.results)
  report.write(flags.results, flags.page)
  return 0


def main(words: list[str] | None = None) -> int:
  """The command: 0 done, 2 wrong input, 130 stopped."""
  flags = parse(words)
  return exit_status.report_errors(lambda: act(flags))


if __name__ == "__main__":
  sys.exit(main())
