"""A run's folder, which somebody may delete or replace while it is in use."""

import pathlib

from train.common import atomic_files

LARGEST = 64 * 2**20  # bytes of a file that is remembered


class KeptFolder:
  """Remembers a folder's files, so that they outlive it.

  Attributes:
    out: the folder.
  """

  def __init__(self, out: pathlib.Path):
    """Reads the files of the folder, but not its folders."""
    self.out = out
    self._identity = _identity(out)
    self._files = {
      path.name: path.read_bytes()
      for path in (out.iterdir() if out.is_dir() else ())
      if path.is_file()
      and not path.is_symlink()
      and path.stat().st_size <= LARGEST
    }

  def is_lost(self) -> bool:
    """Whether the folder is gone, or another one has its name."""
    return self._identity is not None and _identity(self.out) != self._identity

  def copy(self) -> pathlib.Path:
    """Writes the files to a new folder beside the old one; returns its path."""
    count = 1
    while (new := self.out.with_name(f"{self.out.name}-kept-{count}")).exists():
      count += 1
    atomic_files.make_folder(new, "--out")
    for name, content in self._files.items():
      atomic_files.write_bytes(new / name, content)
    return new


def _identity(out: pathlib.Path) -> tuple[int, int] | None:
  try:
    found = out.stat()
  except FileNotFoundError:
    return None
  return found.st_dev, found.st_ino
