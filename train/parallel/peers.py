"""Ends this process soon, and with a clear line, if another one is lost.

Without that, JAX lets the others wait in a collective for a minute or more and
then aborts them with a C++ stack. So every process writes into the store of
process 0 that it is alive, and reads what the others wrote. When process 0
itself is lost, JAX aborts the others before Python hears of it. Then the last
words come from a small process beside each of them, the witness.
"""

import contextlib
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed  # the only way to the store

from train.common.errors import TrainingError, UserError
from train.parallel import witness

PERIOD = 1.0  # seconds between two signs of life
LEFT = "left"  # the last sign of a process that ended as it should
ALIVE = "galore/alive/"  # where they are in the store
# Process 0 goes last, because the others are aborted with it.
LAST = 5.0


@contextlib.contextmanager
def watched(checkpoints: pathlib.Path, lost_after: int) -> Iterator[None]:
  """Ends this process with status 1 if another one of the run is lost.

  Args:
    checkpoints: the folder of the run's checkpoints.
    lost_after: seconds without a sign of life until a process is lost.
  """
  count, own = jax.process_count(), jax.process_index()
  if count == 1:
    yield
    return
  beside = _start_witness(checkpoints, own, count)

  def end(lost: int) -> None:
    reason = (
      f"process {lost} of {count} gave no sign of life for {lost_after} s"
      " (mesh.lost_after)"
    )
    if own == 0:
      time.sleep(LAST)
    with contextlib.suppress(OSError, ValueError):
      sys.stdout.flush()
    _dismiss(beside)
    witness.say(witness.last_words(reason, str(checkpoints)))
    # Nothing else could end threads that wait for the lost process.
    os._exit(1)

  store = distributed.global_state.client
  watch = Watch(store, own, count, lost_after, end)
  watch.start()
  try:
    yield
  except (UserError, TrainingError):
    watch.leave()
    raise
  except Exception:
    # A collective fails as soon as the other side is gone.
    watch.wait_for_end()
    raise
  else:
    watch.leave()
  finally:
    watch.stop()
    _dismiss(beside)


def _start_witness(
  checkpoints: pathlib.Path, own: int, count: int
) -> subprocess.Popen:
  reason = (
    f"process {own} of {count} was killed, or aborted by JAX"
    + ("" if own == 0 else " because process 0 was lost")
    + "; the lines above and the other processes may say more"
  )
  # In a session of its own, Ctrl-C does not end it.
  return subprocess.Popen(
    [sys.executable, "-I", "-S", witness.__file__, str(checkpoints), reason],
    stdin=subprocess.PIPE,
    start_new_session=True,
  )


def _dismiss(beside: subprocess.Popen) -> None:
  """Ends the witness without a word."""
  with contextlib.suppress(OSError, ValueError):
    beside.communicate(b"done", timeout=5)


class Watch:
  """Signs of life of this process, and of the others.

  Args:
    store: of process 0.
    own: the index of this process.
    count: the number of processes.
    lost_after: seconds without a sign of life until a process is lost.
    end: called with the index of a lost process.
  """

  def __init__(
    self,
    store: Any,
    own: int,
    count: int,
    lost_after: int,
    end: Callable[[int], None],
  ):
    self._store, self._own, self._end = store, own, end
    self._lost_after, self._round = lost_after, 0
    others = set(range(count)) - {own}
    self._signs: dict[int, str | None] = dict.fromkeys(others)  # the last ones
    # Rounds, not seconds: while this process is suspended, nobody is lost.
    self._silent = dict.fromkeys(others, 0)
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._run, name="peers", daemon=True)

  def start(self) -> None:
    """Begins to watch, in the background."""
    self._thread.start()

  def stop(self) -> None:
    """Ends the watch, and with it the signs of life."""
    self._stopped.set()
    self._thread.join()

  def leave(self) -> None:
    """Ends the watch and tells the others that all is well."""
    self.stop()
    self._write(LEFT)

  def wait_for_end(self) -> None:
    """Waits for as long as it takes to notice that a process is lost."""
    self._thread.join(self._lost_after + 3 * PERIOD + LAST)

  def _run(self) -> None:
    while not self._stopped.wait(PERIOD):
      lost = self.look()
      if lost is not None:
        self._end(lost)
        return

  def look(self) -> int | None:
    """Gives a sign of life; returns a process that gave none for too long."""
    self._round += 1
    self._write(str(self._round))
    found = self._read()
    for index, before in self._signs.items():
      if found is None and index != 0:
        continue  # without the store only process 0 is known to be silent
      sign = found.get(index) if found else None
      if sign != LEFT and sign in (None, before):
        self._silent[index] += 1
      else:
        self._signs[index], self._silent[index] = sign, 0
      if self._silent[index] * PERIOD >= self._lost_after:
        return index
    return None

  def _write(self, sign: str) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      name = f"{ALIVE}{self._own}"
      self._store.key_value_set(name, sign, allow_overwrite=True)

  def _read(self) -> dict[int, str] | None:
    """The last sign of each process; None if process 0 does not answer."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      pairs = self._store.key_value_dir_get(ALIVE)
      return {int(name.rpartition("/")[2]): sign for name, sign in pairs}
    return None
