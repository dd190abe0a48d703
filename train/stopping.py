"""Ctrl-C and SIGTERM as requests to stop that the loop asks for."""

import contextlib
import signal
from collections.abc import Callable, Iterator


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
