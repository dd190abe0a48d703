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


def check_tree(folder: pathlib.Path) -> None:
  """Checks a folder whose files another library opens.

  A link in it would be read through, and a pipe would be waited for.

  Raises:
    UserError: something in it is no file and no folder, or is a link that
      leads out of it.
  """
  root = os.path.realpath(folder)
  for path in pathlib.Path(root).rglob("*"):
    if not pathlib.Path(os.path.realpath(path)).is_relative_to(root):
      raise UserError(f"{path} is a link that leads out of the checkpoint")
    if not path.is_file() and not path.is_dir():
      raise UserError(f"{path} is not a regular file")


def remove_folder(path: pathlib.Path) -> None:
  """Removes a folder, or a link in its place but not what it stands for."""
  if path.is_symlink():
    path.unlink()
  shutil.rmtree(path, ignore_errors=True)
