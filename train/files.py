"""Files that are either there whole or not at all."""

import os
import pathlib
import tempfile

from train.errors import UserError


def make_folder(path: pathlib.Path, what: str) -> pathlib.Path:
  """Creates a folder and its parents; `what` names it in the error."""
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"{what} {path} cannot be made ({error.strerror}); name a folder that"
      " can be written"
    ) from None
  if not os.access(path, os.W_OK):
    raise UserError(f"{what} {path} cannot be written; name another folder")
  return path


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes through a neighbour and a rename, so no reader sees half a file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
  with os.fdopen(descriptor, "w", encoding="utf-8") as file:
    file.write(text)
  pathlib.Path(name).replace(path)
