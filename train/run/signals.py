"""Ctrl-C and SIGTERM as requests to stop that the loop asks for."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from train.parallel import mesh as mesh_lib


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
  """Turns Ctrl-C and SIGTERM into a request that the loop asks for.

  A signal may come while a step holds the donated state, which cannot be
  saved then: the step is finished first. A second signal ends the program.

  Yields:
    A function that says whether a stop was asked for.
  """
  asked = []

  def handle(number: int, frame: object) -> None:
    if asked:
      raise KeyboardInterrupt
    asked.append(number)

  signals = (signal.SIGINT, signal.SIGTERM)
  before = {number: signal.signal(number, handle) for number in signals}
  try:
    yield lambda: bool(asked)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def agreed_stop(
  stopped: Callable[[], bool], mesh: jax.sharding.Mesh
) -> Callable[[], bool]:
  """Makes all processes stop after the same step, whichever was asked to.

  Args:
    stopped: says whether this process was asked to.
    mesh: the devices of the run.

  Returns:
    A function to call once a step, in every process. With several of them
    its answer is a step old: it was under way while the device worked.
  """
  if jax.process_count() == 1:
    return stopped
  sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  whole = NamedSharding(mesh, PartitionSpec())
  anyone = jax.jit(jnp.max, out_shardings=whole)
  waiting: list[jax.Array] = []

  def ask() -> bool:
    own = np.full(mesh.local_mesh.size, stopped(), np.int32)
    waiting.append(anyone(mesh_lib.put_batch(own, sharding)))
    return len(waiting) > 1 and bool(jax.device_get(waiting.pop(0)))

  return ask
