"""What a part of the benchmark is told, and how it reports row by row.

Each part runs in a process of its own and appends its rows to a file, so that a
part that crashes, or is ended because time is over, loses no row.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from train.common.errors import first_line


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a part is told.

  Attributes:
    quick: Whether to take tiny shapes.
    until: When the part should be done, in seconds of `time.time`.
    device: What is known of the device, from `describe` in facts.py.
    sizes: Presets to train in the second part.
    pool_gb: Size of the memory pool of the process, in GB; 0 for all memory.
    case: Name of the only case to run, or "" for all.
  """

  quick: bool
  until: float
  device: dict[str, Any] = dataclasses.field(default_factory=dict)
  pool_gb: float = 0.0
  case: str = ""
  sizes: tuple[str, ...] = ()

  def left(self) -> float:
    """Seconds that are left."""
    return self.until - time.time()

  def as_json(self) -> str:
    """The settings for a command line; `from_json` reads them."""
    return json.dumps(dataclasses.asdict(self))

  @classmethod
  def from_json(cls, text: str) -> "Settings":
    """Settings that `as_json` wrote."""
    found = json.loads(text)
    return cls(**found | {"sizes": tuple(found["sizes"])})


class Part:
  """The rows of a part.

  Args:
    name: The part's name.
    path: The file to which rows are appended.
  """

  def __init__(self, name: str, path: pathlib.Path):
    self.name, self._path = name, path

  def add(self, **row: Any) -> None:
    """Appends a row; numbers that are not finite become text."""
    row = {"part": self.name} | {k: _plain(v) for k, v in row.items()}
    with self._path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(row, allow_nan=False) + "\n")

  @contextlib.contextmanager
  def guarded(
    self, name: str, row: dict[str, Any] | None = None
  ) -> Iterator[None]:
    """Makes an error a row, so that the next case can run.

    Args:
      name: Of the case.
      row: What else its row says; it may grow until the error.
    """
    try:
      yield
    except LeftOut as reason:
      self.add(name=name, **(row or {}), left_out=str(reason))
    except Exception as error:
      found = f"{type(error).__name__}: {first_line(error)}"
      self.add(name=name, **(row or {}), failed=found)


class LeftOut(Exception):
  """A case that this device cannot run; its text says why."""


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows that parts have appended to a file; a cut last line is left.

  Rows of the same part and name are one: later ones add to the first.
  """
  found: dict[tuple, dict[str, Any]] = {}
  text = path.read_text(encoding="utf-8") if path.exists() else ""
  for line in text.splitlines():
    with contextlib.suppress(ValueError):
      row = json.loads(line)
      found.setdefault((row["part"], row.get("name")), {}).update(row)
  return list(found.values())


def _plain(value: Any) -> Any:
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value
