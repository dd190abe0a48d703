"""Links from the documentation to files of the repository.

A page may link to source files, such as `../../train/config/presets.py`. On
GitHub these links work. The site does not contain the files, so that there
only the text of the link remains.
"""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(((?!https?://|#)[^)\s]+)\)")


def on_page_markdown(markdown: str, /, page, **kwargs) -> str:
  """Removes links to files outside of docs/; a hook of mkdocs.

  Args:
    markdown: The page's source.
    page: The page.
    **kwargs: Not used.
  """
  folder = (ROOT / "docs" / page.file.src_uri).parent

  def unlink(match: re.Match[str]) -> str:
    target = (folder / match[2].partition("#")[0]).resolve()
    inside = target.is_relative_to(ROOT / "docs")
    return match[0] if inside or not target.exists() else match[1]

  return LINK.sub(unlink, markdown)
