"""Ctrl-C and SIGTERM as requests to stop, which the loop polls."""

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
  """Turns Ctrl-C and SIGTERM into a request that the loop polls.

  While a step runs, the state is donated to it and cannot be saved, so the
  step is finished first. A second signal ends the program at once.

  Yields:
    A function that says whether a stop was requested.
  """
  received = []

  def handle(number: int, frame: object) -> None:
    if received:
      raise KeyboardInterrupt
    received.append(number)

  signals = (signal.SIGINT, signal.SIGTERM)
  before = {number: signal.signal(number, handle) for number in signals}
  try:
    yield lambda: bool(received)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def agreed_stop(
  stopped: Callable[[], bool], mesh: jax.sharding.Mesh
) -> Callable[[], bool]:
  """Makes all processes stop after the same step.

  Args:
    stopped: says whether this process was asked to stop.
    mesh: the devices of the run.

  Returns:
    A function to call once a step in every process: whether any of them was
    asked to stop. With several processes the answer is one step old, so that
    no step waits for it.
  """
  if jax.process_count() == 1:
    return stopped
  sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  whole = NamedSharding(mesh, PartitionSpec())
  anyone = jax.jit(jnp.max, out_shardings=whole)
  answers: list[jax.Array] = []

  def ask() -> bool:
    own = np.full(mesh.local_mesh.size, stopped(), np.int32)
    answers.append(anyone(mesh_lib.put_batch(own, sharding)))
    return len(answers) > 1 and bool(jax.device_get(answers.pop(0)))

  return ask
