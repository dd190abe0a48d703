"""The benchmarks' page: tables between markers, from the kept records.

    <!-- step: begin -->
    ...
    <!-- step: end -->

What lies between is replaced; everything else on the page is written by hand.
"""

import importlib
import pathlib
import re

from train.common.errors import UserError
from train.measure import machine

PAGE = pathlib.Path("docs/results/benchmarks.md")
_MARKED = re.compile(
  r"(<!-- (?P<name>\w+): begin -->\n).*?(<!-- (?P=name): end -->)",
  re.DOTALL,
)


def write(folder: pathlib.Path, page: pathlib.Path) -> None:
  """Renders the tables of a page, and the pictures beside the records.

  Args:
    folder: holds the records.
    page: a Markdown file with markers.

  Raises:
    UserError: the page has no markers, or cannot be read or written.
  """
  try:
    text = page.read_text(encoding="utf-8")
  except OSError as error:
    raise UserError(f"--page {page}: cannot read ({error})") from None
  new, count = render(text, folder)
  if not count:
    raise UserError(
      f"--page {page}: no place for tables, such as a line"
      " <!-- step: begin --> and a line <!-- step: end -->"
    )
  page.write_text(new, encoding="utf-8")
  drawn = [draw(path) for path in sorted(folder.glob("*.json"))]
  print(f"wrote {page}, {count} places; drew {sum(drawn)} pictures")


def draw(path: pathlib.Path) -> bool:
  """Draws a record beside its file; whether there is a picture of its kind."""
  kept = machine.load(path)
  module = importlib.import_module(f"train.bench.{kept['benchmark']}")
  if not getattr(module, "draw", None):
    return False
  module.draw(kept["results"], path.with_suffix(".png"))
  return True


def render(text: str, folder: pathlib.Path) -> tuple[str, int]:
  """The page's text with the tables of all records that there are.

  Args:
    text: the page.
    folder: holds the records.

  Returns:
    The new text, and how many places were found.
  """

  def fill(found: re.Match) -> str:
    name = found["name"]
    paths = _paths(folder, name)
    body = "\n".join(_tables(name, machine.load(path)) for path in paths)
    if not paths:
      body = f"Not measured yet: `python -m train.bench {name}`.\n"
    return f"{found[1]}\n{body}\n{found[3]}"

  return _MARKED.subn(fill, text)


def _paths(folder: pathlib.Path, name: str) -> list[pathlib.Path]:
  """The records of a benchmark: one, or its parts in their order."""
  module = importlib.import_module(f"train.bench.{name}")
  parts = getattr(module, "part_names", lambda: [""])()
  paths = [folder / machine.name(name, part) for part in parts]
  return [path for path in paths if path.is_file()]


def _tables(name: str, kept: dict) -> str:
  """A record's tables and where they come from."""
  module = importlib.import_module(f"train.bench.{name}")
  return f"{module.tables(kept['results'])}\n\n{machine.origin(kept)}\n"
