"""Batches prepared in the background, with the position after each.

Loading, tokenising and cutting run in a thread of their own, a few batches
ahead of the step. A position is that after the last batch handed out, never
that of the thread, so that a resumed run reads on exactly there.
"""

import queue
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")
State = dict[str, int]  # a position; JSON keeps it as it is
PATIENCE = 5.0  # seconds a thread gets to end when it is told to


class Prefetch(Iterator[T], Generic[T]):
  """Runs an iterator in a thread, a few items ahead of its consumer.

  An error of the iterator is raised by `next` when its turn comes, after the
  items that were ready before it. `close` ends the thread.
  """

  def __init__(self, items: Iterator[T], ahead: int):
    """Starts the thread.

    Args:
      items: what to iterate over; a generator is closed by the thread.
      ahead: items to hold ready, at least 1.
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
    # Whatever went wrong is the consumer's to see, in its own thread.
    except BaseException as error:
      self._put("error", error)
    finally:
      close = getattr(self._items, "close", None)
      if close is not None:
        close()

  def _put(self, kind: str, value: Any) -> bool:
    """Waits for room; False once the consumer has closed."""
    while not self._closing.is_set():
      try:
        self._ready.put((kind, value), timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def __next__(self) -> T:
    """The next item; raises what the iterator raised, StopIteration too."""
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
    """Ends the thread; one that hangs in a read is left to the system."""
    self._closing.set()
    self._thread.join(PATIENCE)


class Loader(Iterator[np.ndarray]):
  """The batches of one process, prepared ahead."""

  def __init__(
    self,
    batches: Generator[tuple[np.ndarray, State], None, None],
    state: State,
    ahead: int,
  ):
    """Starts to prepare batches.

    Args:
      batches: batches, each with the position after it.
      state: the position before the first.
      ahead: batches to hold ready; 0: each is made when it is asked for.
    """
    self._batches: Generator | Prefetch = (
      Prefetch(batches, ahead) if ahead else batches
    )
    self._state = state
    self.waited = 0.0  # seconds that `next` has taken, all calls together

  def __next__(self) -> np.ndarray:
    """The next rows of this process: (B / parts, length + 1) int32 ids.

    The id -1 is padding: never predicted, and no valid id.
    """
    begin = time.perf_counter()
    try:
      rows, self._state = next(self._batches)
    finally:
      self.waited += time.perf_counter() - begin
    return rows

  def state(self) -> State:
    """The position after the last batch handed out: names and whole numbers.

    A loader that is built with it goes on with the batch that comes next.
    """
    return dict(self._state)

  def close(self) -> None:
    """Ends the background work; `next` may not be called after it."""
    self._batches.close()

  def __enter__(self) -> "Loader":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
