"""Figures that are written to PNG files without a display."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

DPI = 110


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
    figure.savefig(path, dpi=DPI)
  finally:
    plt.close(figure)
