"""Files that are either there whole or not at all."""

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

from train.common.errors import UserError


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


@contextlib.contextmanager
def new_folder(path: pathlib.Path, what: str) -> Iterator[None]:
  """Fills a new or empty folder; what fails leaves it as it was.

  Raises:
    UserError: it is not empty, or cannot be made or written.
  """
  if path.is_dir() and any(path.iterdir()):
    raise UserError(f"{what} {path} is not empty; name a new folder")
  existed = path.exists()
  make_folder(path, what)
  try:
    yield
  except BaseException as error:
    shutil.rmtree(path, ignore_errors=True)
    if existed:
      path.mkdir()
    if isinstance(error, OSError):
      raise UserError(f"{what} {path} cannot be written ({error})") from None
    raise


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes UTF-8; see `write_bytes`."""
  write_bytes(path, text.encode("utf-8"))


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Writes through a neighbour and a rename, so no reader sees half a file.

  A link in the place of the file is replaced, not written through.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  neighbour = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
  try:
    # Opened in the plain way, for the permissions that other files get.
    with neighbour.open("xb") as file:
      file.write(content)
    neighbour.replace(path)
  except BaseException:
    neighbour.unlink(missing_ok=True)
    raise
