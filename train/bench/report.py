"""Rewrites the tables of the benchmarks' page from the kept records.

The section `<!-- step: begin -->` of the page holds the tables of `step`, and
likewise for the other benchmarks (see train/measure/page.py).
"""

import importlib
import pathlib
from types import ModuleType
from typing import Any

from train.bench import record as record_lib
from train.measure import page as page_lib

PAGE = pathlib.Path("docs/results/benchmarks.md")
BENCHMARKS = (
  "step",
  "lean",
  "reduce",
  "refresh",
  "compile",
  "shard",
  "cost",
  "chips",
  "device",
)


def module(benchmark: str) -> ModuleType:
  """The module that measures a benchmark and renders its record."""
  return importlib.import_module(f"train.bench.{benchmark}")


def write(folder: pathlib.Path, page: pathlib.Path) -> None:
  """Rewrites the tables of a page, and the figures beside the records.

  Args:
    folder: The folder of the records.
    page: A Markdown file with marked sections.

  Raises:
    UserError: The page cannot be read, or has no section of a benchmark.
  """
  render = lambda name: section(name, folder)
  count = page_lib.rewrite(page, render, BENCHMARKS[0])
  drawn = [draw(path) for path in sorted(folder.glob("*.json"))]
  print(f"wrote {count} sections of {page}; drew {sum(drawn)} figures")


def section(name: str, folder: pathlib.Path) -> str | None:
  """The tables of a benchmark; None if there is no benchmark of this name."""
  if name not in BENCHMARKS:
    return None
  records = [record_lib.load(path) for path in _paths(folder, name)]
  if not records:
    return f"Not measured yet: `python -m train.bench {name}`."
  return "\n\n".join(_tables(record) for record in records)


def draw(path: pathlib.Path) -> bool:
  """Draws a record's figure beside its file; False if it has no figure."""
  record = record_lib.load(path)
  draw_results = getattr(module(record["benchmark"]), "draw", None)
  if draw_results is None:
    return False
  draw_results(record["results"], path.with_suffix(".png"))
  return True


def _paths(folder: pathlib.Path, name: str) -> list[pathlib.Path]:
  """The records of a benchmark: its only one, or one for each part."""
  if getattr(module(name), "BY_DEVICE", False):
    return sorted(folder.glob(f"{name}-*.json"))
  parts = getattr(module(name), "part_names", lambda: [""])()
  paths = [folder / record_lib.file_name(name, part) for part in parts]
  return [path for path in paths if path.is_file()]


def _tables(record: dict[str, Any]) -> str:
  """A record's tables, and where they come from."""
  tables = module(record["benchmark"]).tables(record["results"])
  return f"{tables}\n\n{record_lib.origin(record)}"
