"""Draws figures of runs: `python -m train.plot RUN...`.

A figure shows one or several runs: loss, held-out perplexity or scores,
learning rate, gradient norm, speed, and the subspaces of the watched matrices.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")  # needs no display
import numpy as np
from matplotlib import colors, ticker
from matplotlib import pyplot as plt

from train.common import commands
from train.measure import figure as figure_lib
from train.run import history
from train.run.history import Run

FILE = "run.png"
SMOOTH = 1 / 40  # width of the running mean, as a share of the points
# Names of the scores that evaluations of fine-tuning tasks log.
SCORES = (
  "accuracy",
  "f1",
  "macro_f1",
  "exact_match",
  "matthews",
  "pearson",
  "spearman",
)
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v")


def draw(out: pathlib.Path, title: str) -> pathlib.Path:
  """Draws one run into its own folder.

  Args:
    out: The run's folder, with config.json and metrics.jsonl.
    title: The figure's title.

  Returns:
    The path of the PNG.

  Raises:
    UserError: The run has no training step to draw.
  """
  return overlay([history.load(out)], out / FILE, "steps", title)


def overlay(
  runs: list[Run], path: pathlib.Path, axis: str, title: str = ""
) -> pathlib.Path:
  """Draws several runs into the same panels.

  Args:
    runs: The runs, in the sequence of the legend.
    path: The figure; the suffix of its name selects the file format.
    axis: `steps`, `tokens` or `hours`.
    title: The figure's title, empty for none.

  Returns:
    The file: `path`, with the suffix of the format if it has none.

  Raises:
    UserError: The figure cannot be written, or a run does not have this axis.
  """
  panels = _panels(runs)
  columns = 3
  rows = -(-len(panels) // columns)
  figure, axes = plt.subplots(
    rows,
    columns,
    figsize=(12.6, 3.3 * rows),
    layout="constrained",
    sharex=True,
  )
  for draw_panel, panel in zip(panels, axes.flat, strict=False):
    draw_panel(panel, runs, axis)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel(history.AXES[axis])
    panel.tick_params(labelbottom=True)
    panel.xaxis.set_major_locator(ticker.MaxNLocator(6))
    if axis == "tokens":
      panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
  for panel in axes.flat[len(panels) :]:
    panel.set_visible(False)
  _add_title_and_legend(figure, runs, title)
  try:
    return figure_lib.save(figure, path, 120)
  finally:
    plt.close(figure)


DrawPanel = Callable[[plt.Axes, list[Run], str], None]


def _panels(runs: list[Run]) -> list[DrawPanel]:
  """Functions that draw the panels for which the runs have data."""
  panels: list[DrawPanel] = [_loss]
  panels += [_perplexity] if _has(runs, "held_out_perplexity") else []
  panels += [_score(name) for name in SCORES if _has(runs, name)]
  panels.append(_series("lr", "learning rate"))
  speed = _series("tokens_per_second", "tokens per second", bottom=0)
  panels += [_norm, speed]
  panels += [_bits] if _has(runs, "held_out_bits_per_byte") else []
  if any(run.watched() for run in runs):
    panels += [_energy, _overlap, _rank]
  return panels


def _has(runs: list[Run], name: str) -> bool:
  return any(name in record for run in runs for record in run.records)


def _color(runs: list[Run], index: int) -> str | tuple:
  if len(runs) <= 10:
    return f"C{index}"
  return plt.get_cmap("viridis")(index / (len(runs) - 1))


def _add_title_and_legend(
  figure: plt.Figure, runs: list[Run], title: str
) -> None:
  """Adds the title, and below the panels the legend of several runs."""
  if title:
    figure.suptitle(title)
  if len(runs) == 1:
    return
  handles = [
    plt.Line2D([], [], color=_color(runs, i), lw=2) for i in range(len(runs))
  ]
  texts = history.labels(runs)
  longest = max(map(len, texts))
  figure.legend(
    handles,
    texts,
    loc="outside lower center",
    ncols=max(1, min(len(runs), 150 // (longest + 8))),
    frameon=False,
  )


def smooth(values: np.ndarray) -> np.ndarray:
  """A centered running mean, without lag; its width grows with the run."""
  half = round(SMOOTH * len(values) / 2)
  sums = np.concatenate([[0.0], np.cumsum(values)])
  i = np.arange(len(values))
  reach = np.minimum(half, np.minimum(i, i[::-1]))  # shorter at the ends
  return (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)


def _loss(panel: plt.Axes, runs: list[Run], axis: str) -> None:
  """Draws the training loss, raw and smoothed, and the held-out loss."""
  for i, run in enumerate(runs):
    color = _color(runs, i)
    xs, values = run.series("loss", axis)
    panel.plot(xs, values, color=color, lw=0.8, alpha=0.25)
    panel.plot(xs, smooth(values), color=color, lw=1.5)
    xs, values = run.series("held_out_loss", axis)
    panel.plot(xs, values, color=color, ls="", marker="o", ms=3)
  of_tasks = any("task.name" in run.config for run in runs)
  panel.set_ylabel("loss" if of_tasks else "loss (nats per token)")
  kinds = [
    plt.Line2D([], [], color="0.3", lw=1.5),
    plt.Line2D([], [], color="0.3", ls="", marker="o", ms=3),
  ]
  panel.legend(kinds, ["training, smoothed", "held-out"], frameon=False)


def _perplexity(panel: plt.Axes, runs: list[Run], axis: str) -> None:
  """Draws the held-out perplexity; the legend names each run's last value."""
  lines, texts = [], []
  for i, run in enumerate(runs):
    xs, values = run.series("held_out_perplexity", axis)
    if len(values):
      lines += panel.plot(xs, values, color=_color(runs, i), marker="o", ms=3)
      texts.append(f"{values[-1]:,.2f}")
  known = {
    record["unigram_perplexity"]
    for run in runs
    for record in run.records
    if "unigram_perplexity" in record
  }
  if len(known) == 1:
    level = known.pop()
    lines.append(panel.axhline(level, color="0.4", ls="--", lw=1))
    texts.append(f"unigram model {level:,.0f}")
  panel.set_yscale("log")
  _label_decades(panel)
  panel.set_ylabel("held-out perplexity (log)")
  if lines:
    panel.legend(lines, texts, title="final value", edgecolor="none")


def _label_decades(panel: plt.Axes) -> None:
  """Labels 1, 2 and 5 of each decade of a log axis with plain numbers."""
  panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  panel.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
  panel.yaxis.set_minor_formatter(ticker.NullFormatter())


def _series(name: str, label: str, bottom: float | None = None) -> DrawPanel:
  """A panel with a line per run of a logged number."""

  def draw_panel(panel: plt.Axes, runs: list[Run], axis: str) -> None:
    for i, run in enumerate(runs):
      panel.plot(*run.series(name, axis), color=_color(runs, i), lw=1.2)
    panel.set_ylabel(label)
    if bottom is not None:
      panel.set_ylim(bottom=bottom)

  return draw_panel


def _norm(panel: plt.Axes, runs: list[Run], axis: str) -> None:
  """Draws the gradient norm, raw and smoothed."""
  for i, run in enumerate(runs):
    xs, values = run.series("grad_norm", axis)
    panel.plot(xs, values, color=_color(runs, i), lw=0.8, alpha=0.3)
    panel.plot(xs, smooth(values), color=_color(runs, i), lw=1.2)
  panel.set_ylabel("gradient norm")
  low, high = panel.get_ylim()
  if low > 0 and high > 20 * low:
    panel.set_yscale("log")
    _label_decades(panel)


def _score(name: str) -> DrawPanel:
  """A panel of a fine-tuning task's score."""

  def draw_panel(panel: plt.Axes, runs: list[Run], axis: str) -> None:
    for i, run in enumerate(runs):
      xs, values = run.series(name, axis)
      panel.plot(xs, values, color=_color(runs, i), marker="o", ms=3)
    panel.set_ylabel(f"held-out {name.replace('_', ' ')}")

  return draw_panel


def _bits(panel: plt.Axes, runs: list[Run], axis: str) -> None:
  """Draws the held-out loss in bits per byte."""
  for i, run in enumerate(runs):
    xs, values = run.series("held_out_bits_per_byte", axis)
    panel.plot(xs, values, color=_color(runs, i), marker="o", ms=3)
  panel.set_ylabel("held-out bits per byte")


def _energy(panel: plt.Axes, runs: list[Run], axis: str) -> None:
  """Draws the gradient energy that a basis captures at its refresh.

  For a single run, also the energy that the old basis captures then.
  """
  _subspace(panel, runs, axis, "energy", refreshed=True)
  _matrix_legend(panel, runs)
  title = "at refreshes, with the new basis"
  if len(runs) == 1:
    _subspace(panel, runs, axis, "energy_before", ls=":")
    title = "at refreshes: new basis solid, old dotted"
  panel.set_ylabel("captured share of gradient energy")
  panel.set_ylim(0, 1.02)
  panel.set_title(title, fontsize="medium")


def _overlap(panel: plt.Axes, runs: list[Run], axis: str) -> None:
  """Draws the overlap of new and old bases."""
  _subspace(panel, runs, axis, "overlap")
  panel.set_ylabel("overlap of new and old basis")
  panel.set_ylim(0, 1.02)


def _rank(panel: plt.Axes, runs: list[Run], axis: str) -> None:
  """Draws the stable rank of the gradients."""
  _subspace(panel, runs, axis, "stable_rank")
  panel.set_ylabel("stable rank of the gradient")
  panel.set_ylim(bottom=0)


def _subspace(
  panel: plt.Axes,
  runs: list[Run],
  axis: str,
  name: str,
  refreshed: bool = False,
  ls: str = "",
) -> None:
  """Draws a line per watched matrix, for a number of its subspace.

  Args:
    panel: The axes to draw on.
    runs: The runs. Matrices have colors of their own in a single run, and tints
      of the run's color in several.
    axis: `steps`, `tokens` or `hours`.
    name: Name of the number.
    refreshed: Whether to draw only the steps of refreshes.
    ls: Line style, if not the matrix's own.
  """
  for i, run in enumerate(runs):
    for k, matrix in enumerate(_watched(runs)):
      key = f"subspace/{matrix}/"
      needed = key + "overlap" if refreshed else ""
      xs, values = run.series(key + name, axis, needed)
      if not len(values):
        continue
      style = _matrix_style(runs, _color(runs, i), k)
      style |= {"ls": ls} if ls else {}
      panel.plot(xs, values, **style)


def _watched(runs: list[Run]) -> list[str]:
  """Names of the matrices that any of the runs watched."""
  return sorted({matrix for run in runs for matrix in run.watched()})


def _matrix_style(runs: list[Run], color: Any, k: int) -> Any:
  """Line style of the k-th watched matrix, for a run of this color."""
  if len(runs) == 1:
    return {"color": f"C{k % 10}", "ls": "-", "marker": ".", "lw": 1.2}
  # Tints go towards white, but the last one remains visible.
  share = 0.55 * k / max(1, len(_watched(runs)) - 1)
  tint = [x + share * (1 - x) for x in colors.to_rgb(color)]
  marker = MARKERS[k % len(MARKERS)]
  style = STYLES[k % len(STYLES)]
  return {"color": tint, "ls": style, "marker": marker, "ms": 3.5, "lw": 1.2}


def _matrix_legend(panel: plt.Axes, runs: list[Run]) -> None:
  """Adds a legend of the matrices; the figure's legend names the runs."""
  names = _watched(runs)
  if len(names) > 6:
    return
  styles = [_matrix_style(runs, "0.15", k) for k in range(len(names))]
  handles = [plt.Line2D([], [], **style) for style in styles]
  panel.legend(handles, names, frameon=False, fontsize="small")


def main(argv: list[str] | None = None) -> int:
  """Runs the command: 0 done, 2 wrong input, 130 interrupted."""
  parser = argparse.ArgumentParser(
    prog="python -m train.plot",
    description="Draws one or several runs into one figure. The legend labels"
    " each run with the config fields in which the runs differ.",
  )
  parser.add_argument(
    "runs",
    nargs="+",
    type=pathlib.Path,
    metavar="RUN",
    help="folder of a run, as given to --out of train.pretrain",
  )
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    metavar="FILE",
    help="file of the figure, such as a .png, .svg or .pdf (default:"
    " RUN/run.png for one run, runs.png for several)",
  )
  parser.add_argument(
    "--x",
    choices=history.AXES,
    default="steps",
    help="quantity on the horizontal axis (default: %(default)s)",
  )
  flags = parser.parse_args(argv)
  return commands.run(lambda: draw_all(flags))


def draw_all(flags: argparse.Namespace) -> None:
  """Draws the runs of the command line, and prints the figure's path."""
  runs = [history.load(out) for out in flags.runs]
  single = len(runs) == 1
  path = pathlib.Path("runs.png")
  if flags.out:
    path = flags.out.resolve() if flags.out.is_symlink() else flags.out
  elif single:
    path = flags.runs[0] / FILE
  title = history.labels(runs)[0] if single else ""
  print(overlay(runs, path, flags.x, title))


if __name__ == "__main__":
  sys.exit(main())
