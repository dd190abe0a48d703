"""The machine, package versions and commit that a measurement was made with."""

import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

from train.common import units

PACKAGES = ("jax", "jaxlib", "optax", "numpy", "flax", "torch", "galore-torch")
ONE_XLA_THREAD = "--xla_cpu_multi_thread_eigen=false"  # in XLA_FLAGS


def provenance(command: str) -> dict[str, Any]:
  """Where a measurement of today comes from, for its record.

  Args:
    command: The command that repeats it.

  Returns:
    `date`, `command`, `machine` and `versions`.
  """
  return {
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "command": command,
    "machine": describe(),
    "versions": versions(),
  }


def describe() -> dict[str, Any]:
  """The properties of this machine that affect times."""
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


def single_threaded() -> bool:
  """Whether this process was started with one thread for each library."""
  return ONE_XLA_THREAD in os.environ.get("XLA_FLAGS", "")


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
  return round(size / units.GIB, 1)


def versions() -> dict[str, str]:
  """Versions of Python and the installed packages, and the source's commit."""
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
  """The commit of this source tree, with "+" if files have changed since.

  Empty outside of a git checkout.
  """
  root = pathlib.Path(__file__).parents[2]
  git = lambda *arguments: subprocess.run(
    ("git", *arguments), cwd=root, capture_output=True, text=True, check=False
  )
  try:
    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("diff", "--quiet", "HEAD", "--", "galore_optax", "train")
  except OSError:
    return ""
  if head.returncode:
    return ""
  return head.stdout.strip() + "+" * bool(changed.returncode)
