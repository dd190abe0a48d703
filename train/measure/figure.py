"""Figures of the benchmarks."""

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
) -> Iterator:
  """Axes side by side, or in rows of two; written to a file at the end.

  Args:
    path: the PNG.
    count: number of axes.
    width: of one of them, inches.
    height: likewise.

  Yields:
    A list of the axes.
  """
  import matplotlib

  matplotlib.use("Agg")  # no display needed, and none touched
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
