"""Finished runs: a JSON line each, in a file a table."""

import json
import pathlib
from typing import Any

from train.common import atomic_files
from train.common.errors import UserError

FOLDER = pathlib.Path("docs/results/evidence")
Record = dict[str, Any]


def read(path: pathlib.Path) -> list[Record]:
  """The runs of a file; none where there is no file.

  Raises:
    UserError: a line is no record.
  """
  if not path.exists():
    return []
  lines = path.read_text(encoding="utf-8").splitlines()
  try:
    found = [json.loads(line) for line in lines if line.strip()]
    by_key = {record["key"]: record for record in found}
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} holds a line that is no run ({error})") from None
  return list(by_key.values())


def read_all(folder: pathlib.Path) -> dict[str, Record]:
  """The runs of all tables by their keys: what tables share is run once."""
  paths = sorted(folder.glob("*.jsonl"))
  return {record["key"]: record for path in paths for record in read(path)}


def append(path: pathlib.Path, record: Record) -> None:
  """Adds a run; a reader, or a kill, never sees half a line."""
  lines = [json.dumps(found) for found in [*read(path), record]]
  atomic_files.write_text(path, "\n".join(lines) + "\n")
