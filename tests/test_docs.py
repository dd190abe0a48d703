"""Runs the marked blocks of README.md and docs/, and follows their links."""

import itertools
import pathlib
import re

import markdown_it
import pytest

ROOT = pathlib.Path(__file__).parents[1]
BLOCK = re.compile(r"<!-- runnable -->\n```python\n(.*?)^```", re.S | re.M)
PAGES = (
  ROOT / "README.md",
  ROOT / "CHANGELOG.md",
  *sorted((ROOT / "docs").rglob("*.md")),
)
BLOCKS = {
  f"{path.relative_to(ROOT)}:{i}": code
  for path in PAGES
  for i, code in enumerate(BLOCK.findall(path.read_text(encoding="utf-8")))
}
TRAINING = (
  "docs/how-to/save-memory.md:0",
  "docs/how-to/save-memory.md:1",
)


@pytest.mark.parametrize("name", BLOCKS)
def test_runnable_blocks_run(name, capsys):
  found = {"__name__": "__main__"}
  exec(compile(BLOCKS[name], name, "exec"), found)
  if name in TRAINING:
    assert found["losses"][-1] < 0.5 * found["losses"][0]


def test_every_mark_is_that_of_a_block():
  marks = sum(
    path.read_text(encoding="utf-8").count("<!-- runnable -->")
    for path in PAGES
  )
  assert marks == len(BLOCKS) and set(TRAINING) <= set(BLOCKS)


def parsed(path):
  return markdown_it.MarkdownIt("commonmark").parse(
    path.read_text(encoding="utf-8")
  )


def anchors(path):
  """Names that a page's headings have on the web: words joined by hyphens."""
  tokens = parsed(path)
  return {
    re.sub(r"[^\w\- ]", "", text.content.lower()).replace(" ", "-")
    for opening, text in itertools.pairwise(tokens)
    if opening.type == "heading_open"
  }


def links(path):
  """Where a page's links and pictures lead within the repository."""
  inline = [part for token in parsed(path) for part in token.children or ()]
  found = [part.attrGet("href") or part.attrGet("src") for part in inline]
  return [link for link in found if link and "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  for link in links(page):
    name, _, anchor = link.partition("#")
    there = (page.parent / name) if name else page
    assert there.exists(), f"{page.name}: no file for {link}"
    assert not anchor or anchor in anchors(there), (
      f"{page.name}: no heading for {link}"
    )


def test_links_are_found():
  assert sum(map(len, map(links, PAGES))) > 50
