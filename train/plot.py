"""The picture of a run from its metrics: `python -m train.plot DIR`."""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")  # no display needed, and none touched
import numpy as np
from matplotlib import pyplot as plt

from train import metrics
from train.errors import UserError

FILE = "run.png"


def draw(out: pathlib.Path, title: str) -> pathlib.Path:
  """Draws loss, held-out perplexity, learning rate and speed of a run.

  Args:
    out: the run's folder, with a metrics.jsonl.
    title: the figure's title.

  Returns:
    The PNG it wrote.

  Raises:
    UserError: there is nothing to draw.
  """
  records = metrics.read(out / metrics.FILE)
  if not any("loss" in r for r in records):
    raise UserError(f"{out / metrics.FILE} holds no training step to draw")
  figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
  figure.suptitle(title)
  _loss(axes[0, 0], records)
  _perplexity(axes[0, 1], records)
  _line(axes[1, 0], records, "lr", "learning rate")
  _line(axes[1, 1], records, "tokens_per_second", "tokens/s")
  axes[1, 1].set_ylim(bottom=0)
  for axis in axes.flat:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("step")
  path = out / FILE
  figure.savefig(path, dpi=120)
  plt.close(figure)
  return path


def _series(records: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
  found = [(r["step"], r[name]) for r in records if name in r]
  steps, values = zip(*found, strict=True) if found else ((), ())
  return np.array(steps), np.array(values)


def _line(axis: plt.Axes, records: list[dict], name: str, label: str) -> None:
  axis.plot(*_series(records, name), color="C0")
  axis.set_ylabel(label)


def _loss(axis: plt.Axes, records: list[dict]) -> None:
  axis.plot(*_series(records, "loss"), color="C0", lw=1, label="training")
  steps, values = _series(records, "held_out_loss")
  axis.plot(steps, values, color="C1", marker="o", label="held-out")
  axis.set_ylabel("loss (nats a token)")
  axis.legend(frameon=False)


def _perplexity(axis: plt.Axes, records: list[dict]) -> None:
  steps, values = _series(records, "held_out_perplexity")
  axis.plot(steps, values, color="C1", marker="o", label="held-out")
  _, unigram = _series(records, "unigram_perplexity")
  if len(unigram):
    label = f"unigram model, {unigram[-1]:,.0f}"
    axis.axhline(unigram[-1], color="0.4", ls="--", label=label)
  axis.set_yscale("log")
  axis.set_ylabel("perplexity (log)")
  if len(values):
    axis.annotate(
      f"{values[-1]:.1f}",
      (steps[-1], values[-1]),
      textcoords="offset points",
      xytext=(0, 8),
      ha="center",
    )
  axis.legend(frameon=False)


def main() -> int:
  """Draws the run in the folder that the command line names."""
  if len(sys.argv) != 2:
    print("usage: python -m train.plot DIR", file=sys.stderr)
    return 2
  out = pathlib.Path(sys.argv[1])
  try:
    saved = json.loads((out / "config.json").read_text(encoding="utf-8"))
    print(draw(out, f"{saved['preset']}, {saved['optimizer.name']}"))
  except (OSError, ValueError, UserError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
