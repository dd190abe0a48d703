"""What a benchmark found, on which machine, kept as JSON.

A record is a dict with `benchmark`, `schema`, `date`, `command`, `machine`,
`versions`, `options` and `results`; the last is the benchmark's own. Where one
is measured in parts, each has a record, and `part` is its name.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Collection
from typing import Any

import jax

from train.common.errors import UserError

SCHEMA = 1
FOLDER = pathlib.Path("docs/results/benchmarks")
PACKAGES = ("jax", "jaxlib", "optax", "numpy", "flax", "torch", "galore-torch")


def make(
  benchmark: str,
  words: list[str],
  flags: argparse.Namespace,
  results: dict[str, Any],
  part: str = "",
) -> dict[str, Any]:
  """A record of what was measured just now.

  Args:
    benchmark: its name.
    words: of the command line.
    flags: what they were read as.
    results: what it found.
    part: which part of the benchmark, empty if it has none.
  """
  options = {k: v for k, v in sorted(vars(flags).items()) if k not in _LOCAL}
  return {
    "benchmark": benchmark,
    "part": part,
    "schema": SCHEMA,
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "command": f"python -m train.bench {shlex.join(without(words, _LOCAL))}",
    "machine": machine(),
    "versions": versions(),
    "options": options,
    "results": results,
  }


# Where something lies on this machine, which changes no result.
_LOCAL = ("out", "gradients", "keep", "python")


def without(words: list[str], options: Collection[str]) -> list[str]:
  """The words of a command line without some options and their values."""
  kept, skip = [], False
  for word in words:
    name, given, _ = word.partition("=")
    dropped = name.startswith("--") and name[2:] in options
    if not (dropped or skip):
      kept.append(word)
    skip = dropped and not given
  return kept


def machine() -> dict[str, Any]:
  """The machine, as far as it bears on times."""
  devices = jax.devices()
  return {
    "system": f"{platform.system()} {platform.machine()}",
    "processor": _processor(),
    "cores": len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else os.cpu_count(),
    "memory_gib": _memory_gib(),
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "backend": jax.default_backend(),
    "threads": "one" if single_threaded() else "as they are",
    "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
  }


def _processor() -> str:
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
  except OSError:
    return platform.processor() or "unknown"
  names = [
    x.partition(":")[2].strip() for x in text.splitlines() if "model name" in x
  ]
  return names[0] if names else platform.processor() or "unknown"


def _memory_gib() -> float | None:
  try:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  except (AttributeError, ValueError, OSError):
    return None
  return round(size / 2**30, 1)


def versions() -> dict[str, str]:
  """Python's and the packages' that are installed, and the checkout's."""
  found = {"python": platform.python_version()}
  if commit := _commit():
    found["commit"] = commit
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


@functools.cache
def _commit() -> str:
  """Of the checkout that this code is from, "+" if it was changed since.

  "" if it is from none.
  """
  root = pathlib.Path(__file__).parents[2]
  git = lambda *words: subprocess.run(
    ("git", *words), cwd=root, capture_output=True, text=True, check=False
  )
  try:
    found = git("rev-parse", "--short=12", "HEAD")
    changed = git("diff", "--quiet", "HEAD", "--", "galore_optax", "train")
  except OSError:
    return ""
  if found.returncode:
    return ""
  return found.stdout.strip() + "+" * bool(changed.returncode)


def name(benchmark: str, part: str = "") -> str:
  """Of a record's file."""
  return f"{benchmark}-{part}.json" if part else f"{benchmark}.json"


def save(record: dict[str, Any], folder: pathlib.Path) -> pathlib.Path:
  """Writes a record into a folder, in place of the benchmark's last one."""
  path = folder / name(record["benchmark"], record["part"])
  try:
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(_as_text(record), encoding="utf-8")
  except OSError as error:
    raise UserError(f"--out {folder}: cannot write ({error})") from None
  return path


def _as_text(record: dict[str, Any]) -> str:
  """JSON, lists of numbers on one line."""
  text = json.dumps(_rounded(record), indent=1, allow_nan=False) + "\n"
  return re.sub(
    r"\[[\s\d.,e+\-]+\]", lambda found: " ".join(found[0].split()), text
  )


def _rounded(x: Any) -> Any:
  """Six digits of every number: more is noise."""
  if isinstance(x, dict):
    return {k: _rounded(v) for k, v in x.items()}
  if isinstance(x, list | tuple):
    return [_rounded(v) for v in x]
  return float(f"{x:.6g}") if isinstance(x, float) else x


def load(path: pathlib.Path) -> dict[str, Any]:
  """Reads a record.

  Raises:
    UserError: the file is no record of this schema.
  """
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path}: no readable record ({error})") from None
  if not isinstance(record, dict) or record.get("schema") != SCHEMA:
    found = record.get("schema") if isinstance(record, dict) else None
    raise UserError(
      f"{path}: schema {found!r}, expected {SCHEMA}; measure it anew with"
      f" python -m train.bench {path.stem}"
    )
  return record


def origin(record: dict[str, Any]) -> str:
  """One line that says how and where a record was made."""
  m, v = record["machine"], record["versions"]
  load = "" if m.get("load") is None else f", load {m['load']}"
  names = ", ".join(f"{k} {v[k]}" for k in ("jax", "optax", "torch") if k in v)
  return (
    f"`{record['command']}`, {record['date']}, {m['processor']}, {m['cores']}"
    f" cores, {m['devices']}, threads {m['threads']}{load}, {names}."
  )


# --- One thread ---------------------------------------------------------------

_ONE_THREAD = {
  f"{name}_NUM_THREADS": "1"
  for name in ("OMP", "OPENBLAS", "MKL", "VECLIB_MAXIMUM", "NUMEXPR")
}
_EIGEN = "--xla_cpu_multi_thread_eigen=false"


def single_threaded() -> bool:
  """Whether this process was started with one thread for each library."""
  return _EIGEN in os.environ.get("XLA_FLAGS", "")


def restart_with(words: list[str], flags: str, **environment: str) -> None:
  """Runs the same command again in place of this process, with flags for XLA.

  XLA reads its flags when a process first uses it. Nothing happens where they
  are set already.

  Args:
    words: of the command line.
    flags: what `XLA_FLAGS` is to have in addition.
    **environment: other variables.
  """
  old = os.environ.get("XLA_FLAGS", "")
  if flags in old:
    return
  new = {**os.environ, "XLA_FLAGS": f"{old} {flags}".strip(), **environment}
  sys.stdout.flush()
  command = [sys.executable, "-m", "train.bench", *words]
  os.execve(sys.executable, command, new)


def restart_with_one_thread(words: list[str]) -> None:
  """As `restart_with`, with one thread for XLA and BLAS."""
  restart_with(words, _EIGEN, **_ONE_THREAD)


def restart_with_devices(words: list[str], count: int) -> None:
  """As `restart_with`, with so many CPU devices if there are fewer devices."""
  if count > 1 and len(jax.devices()) < count:
    flag = f"--xla_force_host_platform_device_count={count}"
    restart_with(words, flag, JAX_PLATFORMS="cpu")
