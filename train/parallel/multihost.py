"""Runs of several processes: how they join, and what only the first one does.

Every process runs the same program on its own devices. Only the first one
prints and writes the run's files. All of them write checkpoints.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.common.errors import UserError
from train.config.schema import MeshConfig

# Variables that launchers set if they start more than one process.
COUNTS = (
  "SLURM_STEP_NUM_TASKS",
  "OMPI_COMM_WORLD_SIZE",
  "JAX_NUM_PROCESSES",
  "MEGASCALE_NUM_SLICES",
)
LISTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
COORDINATOR = "JAX_COORDINATOR_ADDRESS"

# Number of processes, index of this one, and its index among those of its host.
# JAX reads the address of process 0 by itself, but these only where it knows
# the launcher: not from Kubeflow's trainer, nor from Open MPI 5. One pair has
# the names of the trainer, which the files of `train/launch` use too.
PLACES = (
  ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", ""),
  (
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
  ),
)


def several(environment: Mapping[str, str]) -> bool:
  """Whether the environment says that this is one process of several."""
  counts = (environment.get(name, "") for name in COUNTS)
  lists = (environment.get(name, "") for name in LISTS)
  return (
    any(count.isdigit() and int(count) > 1 for count in counts)
    or any("," in names for names in lists)
    or COORDINATOR in environment
  )


def place(environment: Mapping[str, str]) -> dict[str, Any]:
  """Arguments of `jax.distributed.initialize` that JAX does not find itself.

  Args:
    environment: the variables of this process.

  Returns:
    The number of processes and the index of this one, if the environment gives
    the address of process 0 and a launcher's pair of them; otherwise nothing.

  Raises:
    UserError: a variable is missing or not a number.
  """
  if COORDINATOR not in environment:
    return {}
  for count, index, local in PLACES:
    if count in environment or index in environment:
      found: dict[str, Any] = {
        "num_processes": _number(environment, count),
        "process_id": _number(environment, index),
      }
      if local in environment and "JAX_LOCAL_DEVICE_IDS" not in environment:
        # One process a device, as JAX has it with the launchers it knows.
        found["local_device_ids"] = [_number(environment, local)]
      if "KUBERNETES_SERVICE_HOST" in environment:
        # JAX would ask the cluster, which takes a package and permissions.
        found["cluster_detection_method"] = "deactivate"
      return found
  return {}


def _number(environment: Mapping[str, str], name: str) -> int:
  value = environment.get(name, "")
  if not value.isdigit():
    raise UserError(
      f"{COORDINATOR} is set, but {name} is {value!r}; give the number of"
      " processes and, from 0 on, the index of this one, or unset all three"
    )
  return int(value)


def connect(config: MeshConfig) -> None:
  """Joins the processes of the run; does nothing if there is only one.

  It must be called before the first use of a device.

  Raises:
    UserError: the processes cannot be joined.
  """
  if not config.coordinator and not several(os.environ):
    _check_alone()
    return
  if config.processes == 1:
    return
  settings: Any = jax.config  # which makes its attributes as it goes
  if (settings.jax_platforms or "").startswith("cpu"):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  arguments: dict[str, Any] = {
    # Later than `peers`, which says more.
    "heartbeat_timeout_seconds": max(100, 3 * config.lost_after)
  }
  if config.coordinator in ("", "auto"):
    arguments |= place(os.environ)
  else:
    arguments["coordinator_address"] = config.coordinator
  if config.processes:
    arguments["num_processes"] = config.processes
  if config.process >= 0:
    arguments["process_id"] = config.process
  try:
    jax.distributed.initialize(**arguments)
  except (RuntimeError, ValueError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(
      f"the processes of the run could not be joined ({reason}). Set"
      " mesh.coordinator=host:port of process 0, mesh.processes, and"
      " mesh.process from 0 on each; or the variables"
      " JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; or"
      " mesh.coordinator=auto under SLURM, Open MPI or on a TPU pod"
    ) from error


def _check_alone() -> None:
  """Raises if the devices belong to several processes that were not joined."""
  if jax.process_count() > 1:
    raise UserError(
      f"the devices belong to {jax.process_count()} processes, and nothing in"
      " the environment says how to join them; set mesh.coordinator=auto"
    )


def is_first() -> bool:
  """Whether this process is the one that prints and writes."""
  return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
  """The JSON-able `value` of every process, by process, on all of them."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([text.size], np.int32))
  padded = np.pad(text, (0, int(sizes.max()) - text.size))
  texts = multihost_utils.process_allgather(padded)
  return [
    json.loads(row[:size].tobytes())
    for row, size in zip(texts, sizes.reshape(-1), strict=True)
  ]


# What may differ between the processes of a run.
OWN = ("mesh.coordinator", "mesh.process", "data.cache")


def check_alike(fields: Mapping[str, Any]) -> None:
  """Raises in all processes unless they were started with the same settings.

  With others they would train a mixture, or wait for each other for ever.

  Args:
    fields: the settings of this process by their names.

  Raises:
    UserError: they differ; it names the first setting that does.
  """
  shared = {name: str(x) for name, x in fields.items() if name not in OWN}
  first, *others = gather(shared)
  for index, other in enumerate(others, 1):
    for name in first | other:
      if first.get(name) != other.get(name):
        raise UserError(
          f"the processes of a run must have the same settings, but {name} is"
          f" {first.get(name)!r} in process 0 and {other.get(name)!r} in"
          f" process {index}"
        )


def run_on_first(action: Callable[[], None]) -> None:
  """Runs `action` in the first process while the others wait.

  Raises:
    Exception: what `action` raised; a UserError with its text in the others.
  """
  _together(action if is_first() else lambda: None)


def run_on_first_then_others(action: Callable[[], Any]) -> Any:
  """Runs `action` in the first process, then in the others.

  So the others find in a cache what the first one has left there.

  Raises:
    Exception: what it raised; a UserError with its text in the processes that
      did not fail themselves.
  """
  nothing = lambda: None
  first = _together(action if is_first() else nothing)
  others = _together(nothing if is_first() else action)
  return first if is_first() else others


def _together(action: Callable[[], Any]) -> Any:
  """Runs `action` in every process; if it fails in one, all of them raise."""
  result, own = None, None
  try:
    result = action()
  except Exception as raised:  # any error: the other processes wait for it
    own = raised
  messages = gather(own and (str(own) or type(own).__name__))
  if own is not None:
    raise own
  errors = [message for message in messages if message]
  if errors:
    raise UserError(errors[0])
  return result


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
  """Silences the output of all processes but the first."""
  if is_first():
    yield
    return
  with (
    open(os.devnull, "w") as nowhere,
    contextlib.redirect_stdout(nowhere),
    contextlib.redirect_stderr(nowhere),
  ):
    yield
