"""What a new device does: numerics, times and memory, in five minutes.

    python -m train.bench device

runs on the first device that JAX finds, and needs nothing but jax, flax and
optax. It has three parts:

- numerics: the core at the device's own precision of products, beside float64
  NumPy, each with a bound;
- steps: training steps of AdamW and GaLore at LLaMA shapes, in alternation, and
  their memory beside the compiler's forecast;
- pools: LLaMA-7B layer by layer inside memory pools of 24 and 16 GB.

Each part is a process of its own. What a device cannot do, or has no time for,
is left out with the reason. The exit status is 1 if a check failed.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from train.bench import options
from train.bench.device import facts, pools, steps, table
from train.bench.device.rows import LeftOut, Settings, read
from train.common import units
from train.config import presets

BY_DEVICE = True  # a record for each kind of device
QUICK = {"seconds": 600.0}
# When a part should be done, of all the time; what it leaves is for the next.
SHARES = {"numerics": 0.25, "steps": 0.65}
PATIENCE = 0.1  # of all the time, until a part that is late is ended

tables, text = table.markdown, table.text


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of this benchmark."""
  parser.add_argument(
    "--seconds",
    type=float,
    default=270.0,
    help="what would take longer is left out (default: %(default)s)",
  )
  parser.add_argument(
    "--sizes",
    default=",".join(steps.SIZES),
    metavar="PRESET,PRESET",
    help="what is trained in the second part (default: %(default)s)",
  )


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """Runs all parts; returns what is known of the device, and their rows."""
  with tempfile.TemporaryDirectory() as folder:
    bench = _Bench(flags, pathlib.Path(folder) / "rows")
    bench.run()
    rows = bench.rows()
  results = {"device": bench.device, "quick": flags.quick, "rows": rows}
  print(f"\n{text(results)}", flush=True)
  return results


def part_of(results: dict[str, Any]) -> str:
  """The name of the device in its record's file name."""
  kind = results["device"].get("kind", "unknown")
  return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def failed(results: dict[str, Any]) -> bool:
  """Whether a check of the numerics, or a part, failed."""
  return any(
    row.get("passed") is False or "failed" in row for row in results["rows"]
  )


class _Bench:
  """The processes of the parts, one after the other.

  This process leaves the device alone, because the others need its memory.
  """

  def __init__(self, flags: argparse.Namespace, path: pathlib.Path):
    self._quick, self._seconds, self._path = flags.quick, flags.seconds, path
    self._sizes = options.choose("--sizes", flags.sizes, presets.PRESETS)
    self._begin = time.time()
    self._own: list[dict[str, Any]] = []  # rows of this process
    self.device: dict[str, Any] = {}

  def rows(self) -> list[dict[str, Any]]:
    """What the parts and this process have found."""
    found = [row for row in read(self._path) if row["part"] != "device"]
    return sorted(found + self._own, key=lambda row: _ORDER[row["part"]])

  def run(self) -> None:
    """Runs the parts."""
    for name, share in SHARES.items():
      self._part(name, share)
      found = [row for row in read(self._path) if row["part"] == "device"]
      if not found:
        return  # the part's row says why
      self.device = found[0]
    self._pools()

  def _pools(self) -> None:
    """Runs the cases of the last part."""
    try:
      cases = pools.cases(self.device, self._quick)
    except LeftOut as reason:
      self._note("pools", "llama_7b in a memory pool", left_out=str(reason))
      return
    for way, pool in cases:
      name = pools.name_of(way, pool, self._quick)
      if self._left() < 0:
        self._note("pools", name, left_out="no time was left")
        continue
      known = [row for row in read(self._path) if row.get("way") == way]
      needs = max((row.get("forecast", 0) for row in known), default=0)
      if pool and needs > pool * units.GB:
        reason = f"needs {needs / units.GIB:.1f} GiB by the compiler's forecast"
        self._note("pools", name, left_out=reason)
        continue
      fraction = facts.ALL
      if pool:
        fraction = pool * units.GB / self.device["memory"]
      self._part("pools", 1.0, name, fraction, case=way, pool_gb=pool)

  def _left(self) -> float:
    return self._begin + self._seconds - time.time()

  def _note(self, part: str, name: str, **row: str) -> None:
    self._own.append({"part": part, "name": name, **row})

  def _part(
    self,
    name: str,
    share: float,
    title: str = "",
    fraction: float = facts.ALL,
    **more: Any,
  ) -> None:
    """Runs a part in a process; what goes wrong with it becomes a row."""
    print(f"{title or name} ...", flush=True)
    until = self._begin + share * self._seconds
    more["sizes"] = tuple(self._sizes)
    settings = Settings(self._quick, until, self.device, **more)
    patience = max(until - time.time(), 0) + PATIENCE * self._seconds
    module = f"{__name__}.child"
    command = [sys.executable, "-m", module, name, settings.as_json()]
    try:
      done = subprocess.run(
        [*command, str(self._path)],
        env=facts.environment(fraction),
        capture_output=True,
        text=True,
        timeout=patience,
        check=False,
      )
    except subprocess.TimeoutExpired:
      self._note(name, title or name, left_out="ended: no time was left")
      return
    if done.returncode:
      last = (done.stderr.strip().splitlines() or ["no message"])[-1]
      status = f"exit status {done.returncode}"
      self._note(name, title or name, failed=f"{status}: {last}")


_ORDER = {"device": 0, "numerics": 1, "steps": 2, "pools": 3}
