"""Settings of the whole test run: eight CPU devices, and a quick compiler.

The tests run small programs a few times, and most of their time would go into
optimizing them. `XLA_FLAGS= pytest` compiles them as users do.
"""

import gc
import importlib.metadata
import os
import shutil
import tempfile


def quick_flags() -> str:
  """The compiler flags of a quick run; XLA aborts at flags it does not know."""
  flags = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
  ]
  version = importlib.metadata.version("jaxlib").split(".")
  if tuple(map(int, version[:2])) < (0, 12):
    flags.append("--xla_cpu_use_fusion_emitters=false")
  return " ".join(flags)


os.environ.setdefault("XLA_FLAGS", quick_flags())
# Operations of a compiled program need no line numbers here.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# A program that several tests, workers or subprocesses run is compiled once.
_CACHE = None  # the folder, in the process that makes and deletes it
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Tracing makes a great many small objects that live for long; looking through
# all of them every few hundred takes a twentieth of the run.
gc.set_threshold(100_000, 20, 50)

import jax  # noqa: E402

# Before the first use of a device, also in every worker of pytest-xdist.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


def pytest_unconfigure():
  """Deletes the compiled programs."""
  if _CACHE:
    shutil.rmtree(_CACHE, ignore_errors=True)
