"""The table and the figure of the long runs."""

import pathlib
import statistics
from typing import Any

from train.experiments import results
from train.experiments.results import Record
from train.measure import figure
from train.measure import page as page_lib
from train.measure.tables import markdown_table, short
from train.stability import scenarios

FOLDER = pathlib.Path("docs/results/stability")
PAGE = pathlib.Path("docs/results/stability.md")
FILE = "runs.jsonl"
FIGURE = "runs.png"
HEAD = (
  "",
  "",
  "learning rate",
  "mean held-out loss of the second half",
  "of AdamW's",
  "largest orthonormality error",
  "all numbers finite",
  "gradients not finite",
  "largest number of the state",
)


def write(folder: pathlib.Path, page: pathlib.Path | None, steps: int) -> None:
  """Rewrites a page's table and the figure; prints the table without a page."""
  records = [
    record
    for record in results.read(folder / FILE)
    if record["steps"] == steps and record["seed"] == 0
  ]
  if not records:
    return
  text = table(records)
  draw(records, folder / FIGURE)
  if page is None:
    print(text)
    return
  page_lib.rewrite(
    page, lambda name: text if name == "stability" else None, "stability"
  )
  print(f"wrote {page} from {len(records)} runs")


def table(records: list[Record]) -> str:
  """A row for each scenario and method, in the order of their tables."""
  by_key = {(r["scenario"], r["method"]): r for r in records}
  rows = []
  for scenario in scenarios.SCENARIOS.values():
    base = by_key.get((scenario.name, "adamw"))
    for method, (label, _) in scenarios.METHODS.items():
      record = by_key.get((scenario.name, method))
      if record:
        title = f"**{scenario.title}**" if method == "adamw" else ""
        rows.append([title, label, *_cells(record, base)])
  return markdown_table(HEAD, rows)


def _cells(record: Record, base: Record | None) -> list[str]:
  loss, reference = late_loss(record), base and late_loss(base)
  ratio = loss / reference if loss is not None and reference else None
  errors = [x for x in record["basis_error"] if x is not None]
  return [
    f"{record['rate']:g}",
    "not finite" if loss is None else f"{loss:.4f}",
    "" if ratio is None else f"{ratio:.2f}",
    f"{max(errors):.0e}" if errors else "",
    "yes" if record["finite"] else "no",
    str(record["faulty"]),
    short(max((x for x in record["largest"] if x is not None), default=None)),
  ]


def late_loss(record: Record) -> float | None:
  """The mean over the second half of a run; None if any is not finite."""
  losses = record["loss"][len(record["loss"]) // 2 :]
  return None if None in losses else statistics.mean(losses)


def draw(records: list[Record], path: pathlib.Path) -> None:
  """Draws losses by scenario, and the orthonormality errors of all."""
  present = [
    scenario
    for scenario in scenarios.SCENARIOS.values()
    if any(r["scenario"] == scenario.name for r in records)
  ]
  with figure.axes(path, count=len(present) + 1, width=4.6, height=2.5) as axes:
    for scenario, axis in zip(present, axes, strict=False):
      axis.set_title(scenario.title, fontsize="small")
      _draw_losses([r for r in records if r["scenario"] == scenario.name], axis)
    axes[0].legend(frameon=False, fontsize="x-small")
    _draw_errors(records, axes[-1])


def _draw_losses(records: list[Record], axis: Any) -> None:
  for i, (method, (label, _)) in enumerate(scenarios.METHODS.items()):
    for record in (r for r in records if r["method"] == method):
      values = [float("nan") if x is None else x for x in record["loss"]]
      axis.plot(record["step"], values, color=f"C{i}", lw=1, label=label)
  axis.set_yscale("log")
  axis.set_xlabel("step")
  axis.set_ylabel("held-out loss")
  axis.grid(alpha=0.25)


def _draw_errors(records: list[Record], axis: Any) -> None:
  axis.set_title("orthonormality error, all scenarios", fontsize="small")
  for i, method in enumerate(scenarios.METHODS):
    for record in (r for r in records if r["method"] == method):
      if any(record["basis_error"]):
        axis.plot(
          record["step"],
          record["basis_error"],
          color=f"C{i}",
          lw=0.6,
          alpha=0.7,
        )
  axis.set_yscale("log")
  axis.set_xlabel("step")
  axis.set_ylabel("largest |PᵀP - I|")
  axis.grid(alpha=0.25)
