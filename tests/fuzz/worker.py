"""Reads mutants one after another, under a clock and a limit of memory.

    python -m tests.fuzz.worker FOLDER FIRST COUNT READER...

writes to FOLDER/outcomes.jsonl a line before each mutant, and one after it. A
hang or a crash ends the process, so the mutant without a second line did it.
"""

import contextlib
import faulthandler
import io
import json
import pathlib
import resource
import sys
import traceback
from typing import Any

from tests.fuzz import mutants, readers
from train.common.errors import UserError
from train.run import checkpoint

SECONDS = 20  # for one mutant, on a busy machine
ROOM = 3 * 2**30  # bytes that reading may take
OUT_OF_MEMORY = ("MemoryError", "Unable to allocate", "bad_alloc")


def limit_memory() -> None:
  """Limits the memory to what the process has now, and ROOM."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  limit = pages * resource.getpagesize() + ROOM
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def read(reader: readers.Reader, folder: pathlib.Path) -> tuple[str, str]:
  """What became of reading a folder: the outcome, and its text."""
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      return "read", reader.read(folder)
  except UserError as error:
    text = str(error)
    if any(word in text for word in OUT_OF_MEMORY):
      return "out of memory", text
    return "refused" if len(text.splitlines()) == 1 else "several lines", text
  except BaseException:
    return "traceback", traceback.format_exc()


def judge(
  reader: readers.Reader, mutant: mutants.Mutant, outcome: str, changed: bool
) -> str:
  """The outcome, with a change that should have been noticed as one."""
  if outcome != "read" or not changed:
    return outcome
  typed = mutant.how == "type" and mutant.file in reader.typed
  guarded = mutant.file.startswith(reader.guarded) if reader.guarded else False
  return "silent" if typed or guarded else "other result"


def run(name: str, base: pathlib.Path, seeds: range, write: Any) -> None:
  """Makes a reader's mutants and reads each."""
  reader, sound = readers.READERS[name], base / f"{name}-sound"
  if not sound.exists():
    sound.mkdir()
    reader.make(sound)
  folder = base / name
  mutants.copy(sound, folder)  # a reader may write
  outcome, wanted = read(reader, folder)
  write({"reader": name, "seed": -1, "outcome": outcome, "text": wanted})
  for seed in seeds:
    mutant = mutants.make(sound, folder, seed)
    at = {"reader": name, "seed": seed, **mutant._asdict()}
    write(at)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    outcome, text = read(reader, folder)
    faulthandler.cancel_dump_traceback_later()
    outcome = judge(reader, mutant, outcome, text != wanted)
    write(at | {"outcome": outcome, "text": text})


def main() -> None:
  """Runs the command."""
  base, first, count = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:4])
  limit_memory()
  with (base / "outcomes.jsonl").open("a", encoding="utf-8") as file:

    def write(record: dict[str, Any]) -> None:
      file.write(json.dumps(record) + "\n")
      file.flush()

    for name in sys.argv[4:]:
      run(name, base, range(first, first + count), write)


if __name__ == "__main__":
  faulthandler.enable()
  checkpoint.silence_orbax()
  main()
