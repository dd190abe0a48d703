"""Generated sections of Markdown pages."""

import pytest

from train.common.errors import UserError
from train.measure import page, tables

TEXT = """By hand.

<!-- step: begin -->
old
<!-- step: end -->

More by hand.
<!-- other: begin -->
stays
<!-- other: end -->
"""


def test_sections_are_replaced_and_all_else_stays():
  render = {"step": "| new |"}.get
  new, count = page.fill(TEXT, render)
  assert count == 1
  assert new == TEXT.replace("old\n", "\n| new |\n\n")
  assert page.fill(new, render) == (new, 1)


def test_a_page_that_cannot_be_rewritten_is_named(tmp_path):
  path = tmp_path / "page.md"
  with pytest.raises(UserError, match=r"page\.md: cannot read"):
    page.rewrite(path, lambda _: "", "step")
  path.write_text(TEXT, encoding="utf-8")
  with pytest.raises(UserError, match=r"no generated section; .* step: begin"):
    page.rewrite(path, lambda _: None, "step")
  assert path.read_text(encoding="utf-8") == TEXT


def test_tables_are_aligned():
  head, rows = ["", "seconds"], [["adamw", "1.0"], ["galore", "10"]]
  assert tables.text_table(head, rows).splitlines() == [
    "        seconds",
    "adamw       1.0",
    "galore       10",
  ]
  assert tables.markdown_table(head, rows).splitlines() == [
    "|  | seconds |",
    "| --- | --: |",
    "| adamw | 1.0 |",
    "| galore | 10 |",
  ]


@pytest.mark.parametrize(
  "value, text",
  [(None, "-"), (1234.5, "1,234"), (99.96, "100."), (0.01234, "0.0123")],
)
def test_numbers_have_three_digits(value, text):
  assert tables.short(value) == text.rstrip(".")
