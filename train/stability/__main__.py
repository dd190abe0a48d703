"""Long runs of a small model: `python -m train.stability`.

  python -m train.stability                  # makes what is missing
  python -m train.stability restarts nans    # only these
  python -m train.stability --steps 1000 --results /tmp/short

Every method makes 20,000 steps in each scenario, and a record of what could
drift is added to docs/results/stability/runs.jsonl. Then the table and the
figure of docs/results/stability.md are rewritten. It can be stopped at any
time; runs that are recorded are not made again.
"""

import argparse
import os
import pathlib
import sys

from train.experiments import results
from train.measure import machine
from train.run import exit_status, program_cache
from train.stability import report, runs, scenarios

STEPS = 20_000


def parse(argv: list[str] | None) -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.stability",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  known = "; ".join(
    f"{x.name}: {x.title}" for x in scenarios.SCENARIOS.values()
  )
  add = parser.add_argument
  add(
    "names",
    nargs="*",
    metavar="SCENARIO",
    help=f"scenarios (default: all): {known}",
  )
  add("--steps", type=int, default=STEPS, help="default: %(default)s")
  add(
    "--results",
    type=pathlib.Path,
    default=report.FOLDER,
    help="folder of the records and the figure (default: %(default)s)",
  )
  add(
    "--page",
    type=pathlib.Path,
    help=f"page to rewrite (default: {report.PAGE} for the default folder)",
  )
  add("--nice", type=int, default=10, help="niceness (default: %(default)s)")
  flags = parser.parse_args(argv)
  for name in flags.names:
    if name not in scenarios.SCENARIOS:
      parser.error(
        f"there is no scenario {name!r}; there are"
        f" {', '.join(scenarios.SCENARIOS)}"
      )
  if flags.steps < 1:
    parser.error(f"--steps is {flags.steps}; use 1 or more")
  return flags


def execute(flags: argparse.Namespace) -> int:
  """Makes the missing runs, and reports."""
  os.nice(max(0, flags.nice - os.nice(0)))
  program_cache.enable()
  path = flags.results / report.FILE
  for name in flags.names or scenarios.SCENARIOS:
    for method in scenarios.METHODS:
      key = f"{method}-{name}-{flags.steps}"
      if key in results.read_all(flags.results):
        continue
      print(f"{method}, {name}", flush=True)
      scenario = scenarios.SCENARIOS[name]
      say = lambda line: print(f"  {line}", flush=True)
      made = runs.make(method, scenario, flags.steps, say=say)
      command = f"python -m train.stability {name} --steps {flags.steps}"
      identity = {"key": key, "method": method, "scenario": name}
      record = identity | {"steps": flags.steps} | made
      results.append(path, record | machine.provenance(command))
  page = flags.page
  if page is None and flags.results == report.FOLDER:
    page = report.PAGE
  report.write(flags.results, page, flags.steps)
  return 0


def main(argv: list[str] | None = None) -> int:
  """Runs the command: 0 when done, 2 for wrong input, 130 if stopped."""
  flags = parse(argv)
  return exit_status.report_errors(lambda: execute(flags))


if __name__ == "__main__":
  sys.exit(main())
