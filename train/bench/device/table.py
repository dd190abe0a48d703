"""The table of the device benchmark."""

from collections.abc import Sequence
from typing import Any

from train.bench.device import facts
from train.common import units
from train.measure import tables as tables_lib
from train.measure.tables import short

HEAD = (
  "",
  "error",
  "bound",
  "time / AdamW's",
  "s a step",
  "peak GiB",
  "forecast GiB",
  "result",
)


def text(results: dict[str, Any]) -> str:
  """The table for the terminal, and the reasons for what is missing."""
  body = tables_lib.text_table(HEAD, _cells(results["rows"]))
  return "\n".join([_title(results), "", body, *_reasons(results["rows"])])


def markdown(results: dict[str, Any]) -> str:
  """The table for the page, and the reasons for what is missing."""
  body = tables_lib.markdown_table(HEAD, _cells(results["rows"]))
  reasons = _reasons(results["rows"], "- ")
  parts = [f"**{_title(results)}**", body]
  return "\n\n".join([*parts, *(["\n".join(reasons)] if reasons else [])])


def _title(results: dict[str, Any]) -> str:
  known = results["device"]
  return facts.sentence(known) if known else "No device was found."


def _cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
  return [
    [
      f"{row['part']}: {row['name']}",
      _power(row.get("error")),
      _power(row.get("bound")),
      short(row.get("ratio")),
      short(row.get("seconds")),
      _gib(row.get("peak")),
      _gib(row.get("forecast")),
      _result(row),
    ]
    for row in rows
  ]


def _power(value: Any) -> str:
  """An error: a number, or the text of one that is not finite."""
  return f"{value:.3g}" if isinstance(value, float | int) else value or "-"


def _gib(size: int | None) -> str:
  return "-" if size is None else f"{size / units.GIB:.2f}"


def _result(row: dict[str, Any]) -> str:
  if "failed" in row or row.get("passed") is False:
    return "FAILED"
  if "left_out" in row:
    return "left out"
  if "tokens" in row:
    return f"ran, {row['tokens']:,} tokens"
  if "passed" not in row:
    return "compiled"
  return "-" if row["passed"] is None else "passed"


def _reasons(rows: Sequence[dict[str, Any]], mark: str = "") -> list[str]:
  return [
    f"{mark}{row['part']}: {row['name']}:"
    f" {row.get('failed') or row['left_out']}."
    for row in rows
    if "failed" in row or "left_out" in row
  ]
