"""Figures that are written to PNG files without a display."""

import contextlib
import io
import pathlib
from collections.abc import Iterator
from typing import Any

from train.common import atomic_files
from train.common.errors import UserError

DPI = 110


def save(figure: Any, path: pathlib.Path, dpi: int) -> pathlib.Path:
  """Writes a figure whole or not at all, in the format of the path's suffix.

  Returns:
    The file, with the suffix of the default format if `path` has none.

  Raises:
    UserError: there is no such format, or the file cannot be written.
  """
  import matplotlib

  suffix = path.suffix or f".{matplotlib.rcParams['savefig.format']}"
  path = path.with_suffix(suffix)
  content = io.BytesIO()
  try:
    if not path.parent.is_dir():
      raise FileNotFoundError(f"{path.parent} is no folder")
    figure.savefig(content, dpi=dpi, format=suffix[1:])
    atomic_files.write_bytes(path, content.getvalue())
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be written ({error})") from None
  return path


@contextlib.contextmanager
def axes(
  path: pathlib.Path,
  count: int = 1,
  width: float = 4.2,
  height: float = 3.1,
) -> Iterator[list[Any]]:
  """Makes axes to draw on, and writes the figure when the block ends.

  Up to three axes stand side by side, more of them in rows of two.

  Args:
    path: The PNG to write.
    count: Number of axes.
    width: Width of one of them in inches.
    height: Height of one of them in inches.

  Yields:
    The axes.
  """
  import matplotlib

  matplotlib.use("Agg")  # needs no display
  from matplotlib import pyplot as plt

  columns = count if count <= 3 else 2
  rows = -(-count // columns)
  figure, grid = plt.subplots(
    rows,
    columns,
    figsize=(width * columns, height * rows),
    layout="constrained",
    squeeze=False,
  )
  flat: list[Any] = list(grid.flat)
  try:
    yield flat[:count]
    for axis in flat:
      axis.spines[["top", "right"]].set_visible(False)
    for axis in flat[count:]:
      axis.set_axis_off()
    save(figure, path, DPI)
  finally:
    plt.close(figure)
