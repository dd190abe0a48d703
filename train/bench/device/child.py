"""One part of the benchmark, in this process.

python -m train.bench.device.child PART SETTINGS ROWS
"""

import pathlib
import sys

from train.bench.device import facts, numerics, pools, steps
from train.bench.device.rows import Part, Settings

PARTS = {"numerics": numerics.run, "steps": steps.run, "pools": pools.run}


def main(argv: list[str]) -> None:
  """Runs the part that the arguments name."""
  name, told, file = argv
  settings, path = Settings.from_json(told), pathlib.Path(file)
  if not settings.device:
    Part("device", path).add(**facts.describe(settings))
  PARTS[name](Part(name, path), settings)


if __name__ == "__main__":
  main(sys.argv[1:])
