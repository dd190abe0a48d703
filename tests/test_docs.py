"""Runs the blocks of code in README.md and docs/ that are marked runnable."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BLOCK = re.compile(r"<!-- runnable -->\n```python\n(.*?)^```", re.S | re.M)
BLOCKS = {
  f"{path.relative_to(ROOT)}:{i}": code
  for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
  for i, code in enumerate(BLOCK.findall(path.read_text(encoding="utf-8")))
}
TRAINING = ("docs/memory.md:0", "docs/memory.md:1")


@pytest.mark.parametrize("name", BLOCKS)
def test_runnable_blocks_run(name, capsys):
  found = {"__name__": "__main__"}
  exec(compile(BLOCKS[name], name, "exec"), found)
  if name in TRAINING:
    assert found["losses"][-1] < 0.5 * found["losses"][0]


def test_every_mark_is_that_of_a_block():
  marks = sum(
    path.read_text(encoding="utf-8").count("<!-- runnable -->")
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
  )
  assert marks == len(BLOCKS) and set(TRAINING) <= set(BLOCKS)
