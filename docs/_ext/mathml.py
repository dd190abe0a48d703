"""Turns LaTeX into MathML, which browsers render without any script."""

import html
import re

from latex2mathml import converter

MATH = re.compile(
  r'<(?P<tag>span|div) class="arithmatex">(?P<text>.*?)</(?P=tag)>', re.S
)


def on_page_content(page_html: str, /, **kwargs) -> str:
  """Replaces the formulas of a page; a hook of mkdocs.

  Args:
    page_html: The page, its formulas marked by pymdownx.arithmatex.
    **kwargs: Not used.
  """
  return MATH.sub(_mathml, page_html)


def _mathml(match: re.Match[str]) -> str:
  display = "block" if match["tag"] == "div" else "inline"
  text = html.unescape(match["text"]).strip()
  text = text.removeprefix(r"\(").removesuffix(r"\)")
  text = text.removeprefix(r"\[").removesuffix(r"\]")
  return converter.convert(text.strip(), display=display)
