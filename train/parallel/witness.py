"""The last words of a process that was ended before it could say them.

A script without imports of packages, which runs beside a process of a run:

  python witness.py FOLDER REASON

It reads its standard input to the end, which comes when the process ends. If
the process left nothing there, it prints REASON and what FOLDER holds.
"""

import os
import sys


def last_words(reason: str, folder: str) -> str:
  """A line on why a process ended, what is saved, and how to go on.

  Args:
    reason: why.
    folder: of the run's checkpoints.
  """
  try:
    steps = [int(x) for x in os.listdir(folder) if x.isascii() and x.isdigit()]
  except OSError:
    steps = []
  saved = "nothing is saved yet; start all processes again"
  if steps:
    saved = (
      f"step {max(steps)} is saved in {folder}; the same command in all"
      " processes continues from there"
    )
  return f"stopped: {reason}. {saved[0].upper()}{saved[1:]}"


def say(text: str) -> None:
  """Writes a line to the terminal, below a progress bar if there is one."""
  start = "\n" if os.isatty(2) else ""
  os.write(2, f"{start}{text}\n".encode())


if __name__ == "__main__":
  if not sys.stdin.buffer.read():
    say(last_words(sys.argv[2], sys.argv[1]))
