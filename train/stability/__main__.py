"""Long runs of a small model: `python -m train.stability`.

  python -m train.stability                  # makes what is missing
  python -m train.stability restarts nans    # only these
  python -m train.stability --steps 1000 --results /tmp/short

Short runs of another seed choose the learning rate of each method. Then every
method makes 20,000 steps in each scenario, and a record of what could
drift is added to docs/results/stability/runs.jsonl. Then the table and the
figure of docs/results/stability.md are rewritten. It can be stopped at any
time; runs that are recorded are not made again.
"""

import argparse
import os
import pathlib
import sys

from train.common import commands
from train.common.errors import Diverged
from train.experiments import results
from train.measure import machine
from train.run import program_cache
from train.stability import report, runs, scenarios

STEPS = 20_000
TUNING = 4  # runs that choose a rate have a quarter of the steps


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
  for name in flags.names or scenarios.SCENARIOS:
    for method in scenarios.METHODS:
      scenario = scenarios.SCENARIOS[name]
      _run(flags, method, scenario, flags.steps, _rate(flags, method), seed=0)
  page = flags.page
  if page is None and flags.results == report.FOLDER:
    page = report.PAGE
  report.write(flags.results, page, flags.steps)
  return 0


def _rate(flags: argparse.Namespace, method: str) -> float:
  """The rate of the least loss in short runs of another seed, unharmed."""
  steps = -(-flags.steps // TUNING)
  scenario = scenarios.SCENARIOS["float32"]
  losses = {
    rate: report.late_loss(_run(flags, method, scenario, steps, rate, seed=1))
    for rate in scenarios.RATES
  }
  finite = {rate: loss for rate, loss in losses.items() if loss is not None}
  if not finite:
    raise Diverged(f"{method} has no finite loss at any of {scenarios.RATES}")
  return min(finite, key=lambda rate: finite[rate])


def _run(
  flags: argparse.Namespace,
  method: str,
  scenario: scenarios.Scenario,
  steps: int,
  rate: float,
  seed: int,
) -> results.Record:
  """The record of a run, which is made if there is none."""
  path = flags.results / report.FILE
  key = f"{method}-{scenario.name}-{steps}-{rate:g}-{seed}"
  known = {record["key"]: record for record in results.read(path)}
  if key in known:
    return known[key]
  print(f"{method}, {scenario.name}, rate {rate:g}, {steps} steps", flush=True)
  say = lambda line: print(f"  {line}", flush=True)
  made = runs.make(method, scenario, steps, rate, seed, say)
  command = f"python -m train.stability {scenario.name} --steps {flags.steps}"
  record = {
    "key": key,
    "method": method,
    "scenario": scenario.name,
    "steps": steps,
    "rate": rate,
    "seed": seed,
    **made,
    **machine.provenance(command),
  }
  results.append(path, record)
  return record


def main(argv: list[str] | None = None) -> int:
  """Runs the command: 0 when done, 2 for wrong input, 130 if stopped."""
  flags = parse(argv)
  return commands.run(lambda: execute(flags))


if __name__ == "__main__":
  sys.exit(main())
