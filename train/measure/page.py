"""Markdown pages whose tables are generated.

A command replaces what lies between two comments:

    <!-- step: begin -->
    ...
    <!-- step: end -->

The rest of the page is written by hand and stays as it is.
"""

import pathlib
import re
from collections.abc import Callable

from train.common import atomic_files
from train.common.errors import UserError

_SECTION = re.compile(
  r"(<!-- (?P<name>\w+): begin -->\n).*?(<!-- (?P=name): end -->)", re.DOTALL
)
Render = Callable[[str], str | None]


def fill(text: str, render: Render) -> tuple[str, int]:
  """Replaces the generated sections of a page.

  Args:
    text: The page.
    render: From a section's name to its new text, or to None if the section is
      to stay as it is.

  Returns:
    The new page, and the number of sections that were replaced.
  """
  count = 0

  def replace(section: re.Match) -> str:
    nonlocal count
    body = render(section["name"])
    if body is None:
      return section[0]
    count += 1
    return f"{section[1]}\n{body}\n\n{section[3]}"

  return _SECTION.sub(replace, text), count


def rewrite(path: pathlib.Path, render: Render, example: str) -> int:
  """Replaces the generated sections of a file; returns their number.

  Args:
    path: The page, given as `--page`.
    render: As for `fill`.
    example: Name of a section, for the error message.

  Raises:
    UserError: The page cannot be read, or `render` knows none of its sections.
  """
  try:
    text = path.read_text(encoding="utf-8")
  except OSError as error:
    raise UserError(f"--page {path}: cannot read ({error})") from None
  new, count = fill(text, render)
  if not count:
    raise UserError(
      f"--page {path}: no generated section; mark one with the lines"
      f" <!-- {example}: begin --> and <!-- {example}: end -->"
    )
  atomic_files.write_text(path, new)
  return count
