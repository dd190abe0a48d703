"""Prepares batches in a background thread.

Loading, tokenizing and cutting run a few batches ahead of the step. The
position of a loader is the one after the last batch that it returned, not that
of the thread, so a resumed run continues with the next batch.
"""

import queue
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any, Generic, TypeVar

import numpy as np

from train.common.errors import UserError
from train.common.fields import is_integer, shown

T = TypeVar("T")
State = dict[str, int]  # a position; can be stored as JSON
PATIENCE = 5.0  # seconds that `close` waits for the thread to end


def check_position(state: Any) -> State:
  """A position that a checkpoint saved, if it can be one.

  Raises:
    UserError: it is something else than names and whole numbers.
  """
  if not isinstance(state, dict) or not all(
    is_integer(value) and value >= 0 for value in state.values()
  ):
    raise UserError(
      f"the checkpoint's position in the data is {shown(state)}; it must be an"
      " object of whole numbers. Delete the checkpoint to continue from the one"
      " before it"
    )
  return state


class Prefetch(Iterator[T], Generic[T]):
  """Runs an iterator in a thread, a few items ahead of its consumer.

  `next` raises an error of the iterator after the items that came before it.
  `close` ends the thread.
  """

  def __init__(self, items: Iterator[T], ahead: int):
    """Starts the thread.

    Args:
      items: the iterator; the thread closes it if it is a generator.
      ahead: number of items to hold ready, at least 1.
    """
    self._items = items
    self._ready: queue.Queue[tuple[str, Any]] = queue.Queue(ahead)
    self._closing = threading.Event()
    self._last: BaseException | None = None
    self._thread = threading.Thread(
      target=self._fill, name="prefetch", daemon=True
    )
    self._thread.start()

  def _fill(self) -> None:
    try:
      for item in self._items:
        if not self._put("item", item):
          break
      else:
        self._put("error", StopIteration())
    # Every error is raised in the consumer's thread.
    except BaseException as error:
      self._put("error", error)
    finally:
      close = getattr(self._items, "close", None)
      if close is not None:
        close()

  def _put(self, kind: str, value: Any) -> bool:
    """Waits for room in the queue; False if the consumer has closed."""
    while not self._closing.is_set():
      try:
        self._ready.put((kind, value), timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def __next__(self) -> T:
    """The next item; raises the iterator's error or StopIteration."""
    if self._last is not None:
      raise self._last
    if self._closing.is_set():
      raise ValueError("the prefetcher is closed")
    kind, value = self._ready.get()
    if kind == "error":
      self._last = value
      raise value
    return value

  def close(self) -> None:
    """Ends the thread; a thread that hangs in a read is abandoned."""
    self._closing.set()
    self._thread.join(PATIENCE)


class Loader(Iterator[np.ndarray]):
  """The batches of one process, prepared ahead of the step."""

  def __init__(
    self,
    batches: Generator[tuple[np.ndarray, State], None, None],
    state: State,
    ahead: int,
  ):
    """Starts to prepare batches.

    Args:
      batches: yields each batch with the position after it.
      state: the position before the first batch.
      ahead: number of batches to hold ready; 0: batches are made on demand.
    """
    self._batches: Generator | Prefetch = (
      Prefetch(batches, ahead) if ahead else batches
    )
    self._state = state
    self.waited = 0.0  # seconds spent in all calls of `next`

  def __next__(self) -> np.ndarray:
    """The next rows of this process: (B / parts, length + 1) int32 ids.

    The id -1 is padding, which is never predicted.
    """
    begin = time.perf_counter()
    try:
      rows, self._state = next(self._batches)
    finally:
      self.waited += time.perf_counter() - begin
    return rows

  def state(self) -> State:
    """The position after the last batch that was returned.

    A loader that starts from it returns the next batch first.
    """
    return dict(self._state)

  def close(self) -> None:
    """Ends the background work; do not call `next` afterwards."""
    self._batches.close()

  def __enter__(self) -> "Loader":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
