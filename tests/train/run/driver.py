"""Runs `train.pretrain` in a process of its own that comes to harm.

python -m tests.train.run.driver HARM ARGUMENT -- FLAGS...
"""

import os
import pathlib
import signal
import sys
import threading

from train import pretrain
from train.run import loop


def killed_when(event: str, ending: str) -> None:
  """`kill -9` at the first system call `event` on a path that ends so."""

  def hook(found: str, arguments: tuple) -> None:
    if found == event and any(
      os.fsdecode(a).rstrip("/").endswith(ending)
      for a in arguments
      if isinstance(a, str | bytes | os.PathLike)
    ):
      os.kill(os.getpid(), signal.SIGKILL)

  sys.addaudithook(hook)


def killed_after(step: int) -> None:
  """`kill -9` as soon as the numbers of a step are recorded."""
  record = loop.Reporter.record

  def then_die(self, index, values):
    found = record(self, index, values)
    if index == step:
      self._job.checkpoints.settle()  # no save is under way
      os.kill(os.getpid(), signal.SIGKILL)
    return found

  loop.Reporter.record = then_die


def killed_soon_after(step: int, seconds: float) -> None:
  """`kill -9` that long after the numbers of a step, whatever is going on."""
  record = loop.Reporter.record

  def then_die(self, index, values):
    if index == step:
      kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
      threading.Timer(seconds, kill).start()
    return record(self, index, values)

  loop.Reporter.record = then_die


def fill_disk(filler: pathlib.Path) -> None:
  """Takes all the room that is left on the disk of `filler`."""
  with filler.open("wb", buffering=0) as file:
    for size in (4096, 1):
      try:
        while file.write(b"0" * size):
          pass
      except OSError:
        continue


def full_disk(folder: str, flags: list[str]) -> int:
  """The disk is full from step 5 on; then there is room, and a second run."""
  filler, record = pathlib.Path(folder) / "filler", loop.Reporter.record

  def then_fill(self, index, values):
    found = record(self, index, values)
    if index == 5:
      self._job.checkpoints.settle()
      fill_disk(filler)
    return found

  loop.Reporter.record = then_fill
  print("status", pretrain.main(flags))
  left = pathlib.Path(folder).glob("run/checkpoints/*")
  print("checkpoints", *sorted(p.name for p in left if p.name.isdigit()))
  loop.Reporter.record = record
  status = pretrain.main(flags)
  print("status", status, "with a full disk")
  filler.unlink()
  return pretrain.main(flags)


def main() -> int:
  harm, argument, _, *flags = sys.argv[1:]
  if harm == "full-disk":
    return full_disk(argument, flags)
  if harm == "killed-after":
    killed_after(int(argument))
  elif harm == "killed-soon-after":
    step, seconds = argument.split(":")
    killed_soon_after(int(step), float(seconds))
  else:
    killed_when(harm, argument)
  return pretrain.main(flags)


if __name__ == "__main__":
  sys.exit(main())
