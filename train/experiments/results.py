"""Results of finished runs: a JSON line each."""

import json
import pathlib
from typing import Any

from train.common import atomic_files
from train.common.errors import UserError

FOLDER = pathlib.Path("docs/results/evidence")
Record = dict[str, Any]


def read(path: pathlib.Path) -> list[Record]:
  """The results in a file; none where there is no file.

  Raises:
    UserError: a line is not a JSON object.
  """
  if not path.exists():
    return []
  lines = path.read_text(encoding="utf-8").splitlines()
  try:
    records = [dict(json.loads(line)) for line in lines if line.strip()]
  except (ValueError, TypeError) as error:
    raise UserError(
      f"{path} has a line that is not the result of a run ({error})"
    ) from None
  return records


def read_all(folder: pathlib.Path) -> dict[str, Record]:
  """The results of all tables by key: a run that tables share is made once.

  Raises:
    UserError: a line is not a JSON object with a key.
  """
  by_key = {}
  for path in sorted(folder.glob("*.jsonl")):
    for record in read(path):
      if "key" not in record:
        raise UserError(f"{path} has a line without the key of its run")
      by_key[record["key"]] = record
  return by_key


def append(path: pathlib.Path, *records: Record) -> None:
  """Adds results; neither a reader nor a crash ever leaves half a line."""
  lines = [json.dumps(each) for each in [*read(path), *records]]
  atomic_files.write_text(path, "\n".join(lines) + "\n")
