"""Pictures of runs: `python -m train.plot RUN...`.

One figure for any number of runs: loss, held-out perplexity, learning rate,
gradient norm, speed, and the subspaces of the watched matrices.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed, and none touched
import numpy as np
from matplotlib import colors, ticker
from matplotlib import pyplot as plt

from train.common.errors import UserError
from train.run import history
from train.run.history import Run

FILE = "run.png"
SMOOTH = 1 / 40  # of the points: width of the running mean of a loss
# Scores of tasks, as an evaluation logs them.
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
    out: the run's folder, with config.json and metrics.jsonl.
    title: the figure's title.

  Returns:
    The PNG it wrote.

  Raises:
    UserError: there is nothing to draw.
  """
  return overlay([history.load(out)], out / FILE, "steps", title)


def overlay(
  runs: list[Run], path: pathlib.Path, axis: str, title: str = ""
) -> pathlib.Path:
  """Draws runs on top of each other.

  Args:
    runs: those to draw, in the order of the legend.
    path: the picture; its suffix says which kind.
    axis: `steps`, `tokens` or `hours`.
    title: the figure's title, if any.

  Returns:
    `path`.

  Raises:
    UserError: the picture cannot be written, or the axis is not known.
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
  for panel, place in zip(panels, axes.flat, strict=False):
    panel(place, runs, axis)
    place.grid(alpha=0.25)
    place.spines[["top", "right"]].set_visible(False)
    place.set_xlabel(history.AXES[axis])
    place.tick_params(labelbottom=True)
    place.xaxis.set_major_locator(ticker.MaxNLocator(6))
    if axis == "tokens":
      place.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
  for place in axes.flat[len(panels) :]:
    place.set_visible(False)
  _entitle(figure, runs, title)
  try:
    figure.savefig(path, dpi=120)
  except (OSError, ValueError) as error:
    raise UserError(f"--out {path} cannot be written: {error}") from None
  finally:
    plt.close(figure)
  return path


Panel = Callable[[plt.Axes, list[Run], str], None]


def _panels(runs: list[Run]) -> list[Panel]:
  """What there is to draw."""
  panels: list[Panel] = [_loss]
  panels += [_perplexity] if _has(runs, "held_out_perplexity") else []
  panels += [_score(name) for name in SCORES if _has(runs, name)]
  panels.append(_plain("lr", "learning rate"))
  panels += [_norm, _plain("tokens_per_second", "tokens/s", bottom=0)]
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


def _entitle(figure: plt.Figure, runs: list[Run], title: str) -> None:
  """The title, and the legend of several runs under the panels."""
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
  """A centred running mean whose width grows with the run: it has no lag."""
  half = round(SMOOTH * len(values) / 2)
  sums = np.concatenate([[0.0], np.cumsum(values)])
  at = np.arange(len(values))
  reach = np.minimum(half, np.minimum(at, at[::-1]))  # shorter at the ends
  return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def _loss(place: plt.Axes, runs: list[Run], axis: str) -> None:
  """Training loss, smoothed over the raw one, and the held-out loss."""
  for i, run in enumerate(runs):
    color = _color(runs, i)
    at, values = run.series("loss", axis)
    place.plot(at, values, color=color, lw=0.8, alpha=0.25)
    place.plot(at, smooth(values), color=color, lw=1.5)
    at, values = run.series("held_out_loss", axis)
    place.plot(at, values, color=color, ls="", marker="o", ms=3)
  of_tasks = any("task.name" in run.config for run in runs)
  place.set_ylabel("loss" if of_tasks else "loss (nats a token)")
  kinds = [
    plt.Line2D([], [], color="0.3", lw=1.5),
    plt.Line2D([], [], color="0.3", ls="", marker="o", ms=3),
  ]
  place.legend(kinds, ["training, smoothed", "held-out"], frameon=False)


def _perplexity(place: plt.Axes, runs: list[Run], axis: str) -> None:
  lines, texts = [], []
  for i, run in enumerate(runs):
    at, values = run.series("held_out_perplexity", axis)
    if len(values):
      lines += place.plot(at, values, color=_color(runs, i), marker="o", ms=3)
      texts.append(f"{values[-1]:,.2f}")
  known = {
    record["unigram_perplexity"]
    for run in runs
    for record in run.records
    if "unigram_perplexity" in record
  }
  if len(known) == 1:
    level = known.pop()
    lines.append(place.axhline(level, color="0.4", ls="--", lw=1))
    texts.append(f"unigram model {level:,.0f}")
  place.set_yscale("log")
  _label_decades(place)
  place.set_ylabel("held-out perplexity (log)")
  if lines:
    place.legend(lines, texts, title="at the end", edgecolor="none")


def _label_decades(place: plt.Axes) -> None:
  """Ticks at 1, 2 and 5 of each decade of a log axis, as plain numbers."""
  place.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  place.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
  place.yaxis.set_minor_formatter(ticker.NullFormatter())


def _plain(name: str, label: str, bottom: float | None = None) -> Panel:
  """A panel of one line a run."""

  def panel(place: plt.Axes, runs: list[Run], axis: str) -> None:
    for i, run in enumerate(runs):
      place.plot(*run.series(name, axis), color=_color(runs, i), lw=1.2)
    place.set_ylabel(label)
    if bottom is not None:
      place.set_ylim(bottom=bottom)

  return panel


def _norm(place: plt.Axes, runs: list[Run], axis: str) -> None:
  for i, run in enumerate(runs):
    at, values = run.series("grad_norm", axis)
    place.plot(at, values, color=_color(runs, i), lw=0.8, alpha=0.3)
    place.plot(at, smooth(values), color=_color(runs, i), lw=1.2)
  place.set_ylabel("gradient norm")
  low, high = place.get_ylim()
  if low > 0 and high > 20 * low:
    place.set_yscale("log")
    _label_decades(place)


def _score(name: str) -> Panel:
  """A panel of a task's score."""

  def panel(place: plt.Axes, runs: list[Run], axis: str) -> None:
    for i, run in enumerate(runs):
      at, values = run.series(name, axis)
      place.plot(at, values, color=_color(runs, i), marker="o", ms=3)
    place.set_ylabel(f"held-out {name.replace('_', ' ')}")

  return panel


def _bits(place: plt.Axes, runs: list[Run], axis: str) -> None:
  for i, run in enumerate(runs):
    at, values = run.series("held_out_bits_per_byte", axis)
    place.plot(at, values, color=_color(runs, i), marker="o", ms=3)
  place.set_ylabel("held-out bits a byte")


def _energy(place: plt.Axes, runs: list[Run], axis: str) -> None:
  """At refreshes: with the new basis, and in one run with the old one too."""
  alone = len(runs) == 1
  _subspace(place, runs, axis, "energy", refreshed=True)
  _legend(place, runs)
  if alone:
    _subspace(place, runs, axis, "energy_before", ls=":")
  place.set_ylabel("gradient energy in the subspace")
  place.set_ylim(0, 1.02)
  old = ", old one dotted" if alone else ""
  place.set_title(f"new basis{old}", fontsize="medium")


def _overlap(place: plt.Axes, runs: list[Run], axis: str) -> None:
  _subspace(place, runs, axis, "overlap")
  place.set_ylabel("overlap of new and old subspace")
  place.set_ylim(0, 1.02)


def _rank(place: plt.Axes, runs: list[Run], axis: str) -> None:
  _subspace(place, runs, axis, "stable_rank")
  place.set_ylabel("stable rank of the gradient")
  place.set_ylim(bottom=0)


def _subspace(
  place: plt.Axes,
  runs: list[Run],
  axis: str,
  name: str,
  refreshed: bool = False,
  ls: str = "",
) -> None:
  """A line a watched matrix: by colour in one run, by tint in several."""
  names = _watched(runs)
  for i, run in enumerate(runs):
    for k, matrix in enumerate(names):
      key = f"subspace/{matrix}/"
      needed = key + "overlap" if refreshed else ""
      at, values = run.series(key + name, axis, needed)
      if not len(values):
        continue
      look = _look(runs, _color(runs, i), k)
      look |= {"ls": ls} if ls else {}
      place.plot(at, values, **look)


def _watched(runs: list[Run]) -> list[str]:
  """The matrices that any of the runs has looked at."""
  return sorted({matrix for run in runs for matrix in run.watched()})


def _look(runs: list[Run], color: Any, k: int) -> Any:
  """How the k-th matrix is drawn, in a run of this colour."""
  if len(runs) == 1:
    return {"color": f"C{k % 10}", "ls": "-", "marker": ".", "lw": 1.2}
  # Towards white, but for the last one to be seen.
  share = 0.55 * k / max(1, len(_watched(runs)) - 1)
  tint = [x + share * (1 - x) for x in colors.to_rgb(color)]
  marker = MARKERS[k % len(MARKERS)]
  style = STYLES[k % len(STYLES)]
  return {"color": tint, "ls": style, "marker": marker, "ms": 3.5, "lw": 1.2}


def _legend(place: plt.Axes, runs: list[Run]) -> None:
  """The matrices; which run a line is of tells the legend of the figure."""
  names = _watched(runs)
  if len(names) > 6:
    return
  looks = [_look(runs, "0.15", k) for k in range(len(names))]
  handles = [plt.Line2D([], [], **look) for look in looks]
  place.legend(handles, names, frameon=False, fontsize="small")


def main(words: list[str] | None = None) -> int:
  """The command: 0 done, 2 wrong input."""
  parser = argparse.ArgumentParser(
    prog="python -m train.plot",
    description="Draws runs on top of each other. The legend names as few"
    " fields of their configs as tell them apart.",
  )
  parser.add_argument(
    "runs", nargs="+", type=pathlib.Path, metavar="RUN", help="a run's folder"
  )
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    help="the picture; by default RUN/run.png for one run, runs.png for more",
  )
  parser.add_argument("--x", choices=history.AXES, default="steps")
  flags = parser.parse_args(words)
  try:
    found = [history.load(out) for out in flags.runs]
    one = len(found) == 1
    path = flags.out or (
      flags.runs[0] / FILE if one else pathlib.Path("runs.png")
    )
    title = history.labels(found)[0] if one else ""
    print(overlay(found, path, flags.x, title))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
