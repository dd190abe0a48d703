"""Starts a benchmark again in a process with other settings for XLA."""

import os
import sys

import jax

from train.measure import machine

_ONE_THREAD = {
  f"{name}_NUM_THREADS": "1"
  for name in ("OMP", "OPENBLAS", "MKL", "VECLIB_MAXIMUM", "NUMEXPR")
}


def with_flags(argv: list[str], flags: str, **environment: str) -> None:
  """Replaces this process by the same command with more flags for XLA.

  XLA reads its flags only once, when a process first uses it. Does nothing if
  the flags are set already.

  Args:
    argv: The arguments of `python -m train.bench`.
    flags: What to add to `XLA_FLAGS`.
    **environment: Other variables to set.
  """
  old = os.environ.get("XLA_FLAGS", "")
  if flags in old:
    return
  new = {**os.environ, "XLA_FLAGS": f"{old} {flags}".strip(), **environment}
  sys.stdout.flush()
  command = [sys.executable, "-m", "train.bench", *argv]
  os.execve(sys.executable, command, new)


def with_one_thread(argv: list[str]) -> None:
  """Like `with_flags`, with one thread for XLA and one for BLAS."""
  with_flags(argv, machine.ONE_XLA_THREAD, **_ONE_THREAD)


def with_devices(argv: list[str], count: int) -> None:
  """Like `with_flags`, with `count` CPU devices if there are fewer devices."""
  if count > 1 and len(jax.devices()) < count:
    flag = f"--xla_force_host_platform_device_count={count}"
    with_flags(argv, flag, JAX_PLATFORMS="cpu")
