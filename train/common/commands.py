"""How a command ends: its errors in one line, its exit status, signals."""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from train.common.errors import TrainingError, UserError

INTERRUPTED = 130  # the exit status that shells give to Ctrl-C


def run(action: Callable[[], int | None]) -> int:
  """Runs a command and prints its errors in one line.

  Returns:
    The exit status: that of `action`, 0 if it returns None; 1 if training
    failed, 2 for wrong input, 130 if interrupted.
  """
  try:
    with _interruptible():
      return action() or 0
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except TrainingError as error:
    print(f"stopped: {error}", file=sys.stderr)
    return 1
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    print(
      f"stopped: {error.filename or '--out'}: {error.strerror}; make room and"
      " run the same command, which continues from the newest checkpoint",
      file=sys.stderr,
    )
    return 1
  except KeyboardInterrupt as interrupt:
    print(str(interrupt) or "interrupted", file=sys.stderr)
    return INTERRUPTED


def handle_imports() -> None:
  """Makes Ctrl-C end the program in one line while modules are imported.

  A KeyboardInterrupt would not do: several packages lose it there, report it
  as an ImportError, or crash. `run` takes the handler away.
  """
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: object) -> None:
  os.write(2, b"interrupted\n")
  os._exit(INTERRUPTED)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
  """Makes both Ctrl-C and SIGTERM raise KeyboardInterrupt.

  So whatever the command leaves behind is cleared up in both cases.
  """
  if threading.current_thread() is not threading.main_thread():
    yield  # which alone can handle signals
    return
  if signal.getsignal(signal.SIGINT) is _end:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  before = signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
