"""Keeps a program inside of a folder that somebody else may have made.

A file in it may be a link to any other file of this machine. Such a link is
neither read nor written through.
"""

import os
import pathlib
import shutil

from train.common.errors import UserError


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
  """The path of a file to be read in a folder.

  Raises:
    UserError: it is a link that leads out of the folder.
  """
  path = folder / name
  real = pathlib.Path(os.path.realpath(path))
  if path.is_symlink() and not real.is_relative_to(os.path.realpath(folder)):
    raise UserError(
      f"{path} is a link to {real}, which is outside of the folder; put the"
      " file itself there"
    )
  return path


def remove_folder(path: pathlib.Path) -> None:
  """Removes a folder, or a link in its place but not what it stands for."""
  if path.is_symlink():
    path.unlink()
  shutil.rmtree(path, ignore_errors=True)
