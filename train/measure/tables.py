"""Tables of text, for a terminal or for a Markdown page."""

from collections.abc import Sequence


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table for a terminal: first column left-aligned, others right-aligned."""
  columns = list(zip(head, *rows, strict=True))
  widths = [max(map(len, column)) for column in columns]
  lines = []
  for row in [head, *rows]:
    cells = [
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table, aligned as `text_table` does."""
  rule = ["---"] + ["--:"] * (len(head) - 1)
  return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def short(value: float | None) -> str:
  """A number with three significant digits, or a dash for None."""
  if value is None:
    return "-"
  if abs(value) >= 100:
    return f"{value:,.0f}"
  return f"{value:#.3g}".rstrip(".")
