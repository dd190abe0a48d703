"""The table and the figures of the architectures, from the records."""

import math
import pathlib
import statistics
from collections.abc import Callable

import numpy as np

from train.architectures import catalog, gradients, search, tables, times
from train.architectures.catalog import Entry
from train.common import units
from train.experiments.plan import Plan, Record, perplexity
from train.experiments.table import Variant
from train.measure import figure
from train.measure import page as page_lib
from train.measure.tables import markdown_table

PAGE = pathlib.Path("docs/results/architectures.md")
FIGURE = "curves.png"
HEAD = (
  "",
  "",
  "test metric",
  "test loss",
  "difference to AdamW's",
  "within one standard error",
  "seeds",
  "optimizer state, KiB",
  "of AdamW's",
  "gradients at rank r, of AdamW's",
  "step time / AdamW's",
  "learning rate",
  "that of the matrices",
  "points searched",
)
# From a record to the metric, its decimals, and its name.
METRICS: dict[str, tuple[Callable[[Record], float], int, str]] = {
  "error": (lambda record: 100 * record["test_error"], 2, "% wrong"),
  "perplexity": (
    lambda record: perplexity(record["test_loss"]),
    2,
    "perplexity",
  ),
  "loss": (lambda record: record["test_loss"], 4, "squared error"),
}


def write(folder: pathlib.Path, page: pathlib.Path) -> None:
  """Rewrites the table of a page, and the figure beside the records."""
  plans = {
    entry: search.plan(entry, folder)
    for entry in catalog.ENTRIES.values()
    if entry.installed()
  }
  text = table(plans, folder)
  render = lambda name: text if name == "architectures" else None
  page_lib.rewrite(page, render, "architectures")
  draw(plans, folder / FIGURE)
  print(f"wrote {page}")


def table(plans: dict[Entry, Plan], folder: pathlib.Path) -> str:
  """A row for each architecture and method."""
  measured = times.load(folder)
  rows = []
  for entry, plan in plans.items():
    for variant in plan.table.variants:
      of_method = measured.get(entry.name, {}).get(variant.optimizer, {})
      ratio = of_method.get("ratio")
      title = f"**{entry.title}**, {entry.library}"
      title = title if variant == tables.ADAMW else ""
      rows.append([title, variant.label, *_cells(entry, plan, variant, ratio)])
  return markdown_table(HEAD, rows)


def _done(plan: Plan, variant: Variant) -> list[Record]:
  """The runs at the chosen point, as far as the search has come."""
  records = plan.chosen_records(variant)
  return [record for record in records if record["status"] == "done"]


def _cells(
  entry: Entry, plan: Plan, variant: Variant, ratio: float | None
) -> list[str]:
  records = _done(plan, variant)
  if not records:
    return ["not measured yet", *[""] * (len(HEAD) - 3)]
  base = _done(plan, tables.ADAMW)
  compared = _losses(base) if plan.complete(tables.ADAMW) else []
  value, digits, name = METRICS[entry.metric]
  point = plan.chosen(variant) or (math.nan, math.nan)
  searched = str(len(plan.tried(variant)))
  size = records[0]["bytes"]["optimizer"]
  of_base = f"{size / base[0]['bytes']['optimizer']:.0%}" if base else ""
  sizes = [
    f"{size / units.KIB:.0f}",
    of_base,
    _share_of_gradients(entry, variant),
    f"{ratio:.2f}" if ratio else "",
  ]
  if not plan.complete(variant):
    return ["search not done", *[""] * 4, *sizes, "", "", f"{searched} so far"]
  return [
    f"{_with_error([value(x) for x in records], digits)} {name}",
    _with_error(_losses(records), 4),
    *_difference(_losses(records), compared, variant),
    str(len(records)),
    *sizes,
    f"{point[0]:.2g}",
    f"{point[0] * point[1]:.2g}",
    searched,
  ]


def _share_of_gradients(entry: Entry, variant: Variant) -> str:
  whole = gradients.size(entry, tables.ADAMW.optimizer)
  return f"{gradients.size(entry, variant.optimizer) / whole:.0%}"


def _losses(records: list[Record]) -> list[float]:
  return [record["test_loss"] for record in records]


def mean_and_error(values: list[float]) -> tuple[float, float]:
  """Mean and standard error of the mean; the latter nan for one value."""
  mean = statistics.mean(values)
  if len(values) < 2:
    return mean, math.nan
  return mean, statistics.stdev(values) / len(values) ** 0.5


def _with_error(values: list[float], digits: int) -> str:
  mean, error = mean_and_error(values)
  width = f" ± {error:.{digits}f}" if math.isfinite(error) else ""
  return f"{mean:.{digits}f}{width}"


def _difference(
  values: list[float], base: list[float], variant: Variant
) -> list[str]:
  """The difference of two means with its standard error, and the verdict."""
  if variant == tables.ADAMW or len(values) < 2 or len(base) < 2:
    return ["", ""]
  (mean, error), (other, other_error) = map(mean_and_error, (values, base))
  difference, width = mean - other, math.hypot(error, other_error)
  verdict = "yes" if abs(difference) <= width else "better"
  if difference > width:
    verdict = "no"
  return [f"{difference:+.4f} ± {width:.4f}", verdict]


def draw(plans: dict[Entry, Plan], path: pathlib.Path) -> None:
  """Draws the training losses of the chosen runs, the mean over the seeds."""
  known = {
    entry: plan
    for entry, plan in plans.items()
    if _done(plan, tables.ADAMW) and _done(plan, tables.GALORE)
  }
  if not known:
    return
  from matplotlib import ticker

  with figure.axes(path, count=len(known), width=4.2, height=2.6) as axes:
    for (entry, plan), axis in zip(known.items(), axes, strict=True):
      for i, variant in enumerate(plan.table.variants):
        curves = [np.array(x["curve"]) for x in _done(plan, variant)]
        if len({len(curve) for curve in curves}) == 1:
          steps, losses = np.mean(curves, axis=0).T
          axis.plot(steps, losses, color=f"C{i}", lw=1.1, label=variant.label)
      axis.set_title(entry.title, fontsize="small")
      axis.set_yscale("log")
      axis.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 3, 5)))
      axis.yaxis.set_minor_formatter("{x:g}")
      axis.yaxis.set_major_formatter("{x:g}")
      axis.tick_params(which="both", labelsize="x-small")
      axis.set_xlabel("step")
      axis.set_ylabel("training loss")
      axis.grid(alpha=0.25)
      if entry is next(iter(known)) or len(axis.lines) > 2:  # others repeat it
        axis.legend(frameon=False, fontsize="x-small")


def draw_samples(images: np.ndarray, path: pathlib.Path) -> None:
  """Draws a hundred images (100, 28, 28) as ten rows of ten."""
  rows = images.reshape(10, 10, *images.shape[1:])
  grid = rows.transpose(0, 2, 1, 3).reshape(10 * 28, 10 * 28)
  with figure.axes(path, width=3.2, height=3.2) as (axis,):
    axis.imshow(grid, cmap="gray_r", vmin=0, vmax=1)
    axis.set_axis_off()
