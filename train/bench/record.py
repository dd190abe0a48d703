"""Records: what a benchmark measured, kept as JSON files.

A record is a dict with `benchmark`, `part`, `schema`, `date`, `command`,
`machine`, `versions`, `options` and `results`. The benchmark defines what
`results` holds. A benchmark that is measured in parts has a record for each of
them, and `part` is the part's name.
"""

import argparse
import json
import pathlib
import re
import shlex
from collections.abc import Collection
from typing import Any

from train.common.errors import UserError
from train.measure import machine

SCHEMA = 1
FOLDER = pathlib.Path("docs/results/benchmarks")
# Options that name places on this machine and change no result.
LOCAL_OPTIONS = ("out", "gradients", "keep", "python")


def make(
  benchmark: str,
  argv: list[str],
  flags: argparse.Namespace,
  results: dict[str, Any],
  part: str = "",
) -> dict[str, Any]:
  """Makes the record of a measurement that was just made.

  Args:
    benchmark: The benchmark's name.
    argv: The command-line arguments.
    flags: The same, parsed.
    results: What the benchmark measured.
    part: The part of the benchmark, empty if it has none.
  """
  options = {
    k: v for k, v in sorted(vars(flags).items()) if k not in LOCAL_OPTIONS
  }
  shared = shlex.join(without(argv, LOCAL_OPTIONS))
  return {
    "benchmark": benchmark,
    "part": part,
    "schema": SCHEMA,
    **machine.provenance(f"python -m train.bench {shared}"),
    "options": options,
    "results": results,
  }


def without(argv: list[str], options: Collection[str]) -> list[str]:
  """Command-line arguments without some options and their values."""
  remaining, skip = [], False
  for argument in argv:
    name, has_value, _ = argument.partition("=")
    dropped = name.startswith("--") and name[2:] in options
    if not (dropped or skip):
      remaining.append(argument)
    skip = dropped and not has_value
  return remaining


def file_name(benchmark: str, part: str = "") -> str:
  """Name of a record's file."""
  return f"{benchmark}-{part}.json" if part else f"{benchmark}.json"


def save(record: dict[str, Any], folder: pathlib.Path) -> pathlib.Path:
  """Writes a record into a folder, replacing the benchmark's last one."""
  path = folder / file_name(record["benchmark"], record["part"])
  try:
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(_as_text(record), encoding="utf-8")
  except OSError as error:
    raise UserError(f"--out {folder}: cannot write ({error})") from None
  return path


def _as_text(record: dict[str, Any]) -> str:
  """JSON with each list of numbers on one line."""
  text = json.dumps(_rounded(record), indent=1, allow_nan=False) + "\n"
  return re.sub(
    r"\[[\s\d.,e+\-]+\]", lambda numbers: " ".join(numbers[0].split()), text
  )


def _rounded(x: Any) -> Any:
  """Every number with six digits: the others are noise."""
  if isinstance(x, dict):
    return {k: _rounded(v) for k, v in x.items()}
  if isinstance(x, list | tuple):
    return [_rounded(v) for v in x]
  return float(f"{x:.6g}") if isinstance(x, float) else x


def load(path: pathlib.Path) -> dict[str, Any]:
  """Reads a record.

  Raises:
    UserError: The file is not a record of this schema.
  """
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path}: not a readable record ({error})") from None
  if not isinstance(record, dict) or record.get("schema") != SCHEMA:
    found = record.get("schema") if isinstance(record, dict) else None
    raise UserError(
      f"{path}: schema {found!r}, expected {SCHEMA}; measure it again with"
      f" python -m train.bench {path.stem}"
    )
  return record


def origin(record: dict[str, Any]) -> str:
  """One line that says how, when and where a record was measured."""
  m, v = record["machine"], record["versions"]
  load = "" if m.get("load") is None else f", load {m['load']}"
  names = ", ".join(f"{k} {v[k]}" for k in ("jax", "optax", "torch") if k in v)
  return (
    f"`{record['command']}`, {record['date']}, {m['processor']}, {m['cores']}"
    f" cores, {m['devices']}, threads {m['threads']}{load}, {names}."
  )
