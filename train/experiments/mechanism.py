"""Whether gradients are, or become, low-rank: spectra of a small LLaMA.

Records the singular values of gradients at four steps of a run under AdamW, and
the share of their energy that the best bases of several ranks capture. Beside
them it computes the setting of GaLore's theory (see theory.py).
"""

import json
import pathlib
from typing import Any

import numpy as np

from train.common import atomic_files
from train.common.errors import UserError
from train.experiments import theory
from train.measure import figure, gradients
from train.measure import machine as machine_lib
from train.measure import tables as tables_lib

FILE = "mechanism.json"
PRESET = "sotu_small"
SETTINGS = ("data.batch=8",)
WHEN = gradients.Steps(early=(1, 20), late=(60, 150))
STAGES = ("early.old", "early.new", "late.old", "late.new")
RANKS = (1, 12, 48, 96)
SHOWN = 96  # number of singular values in the figure
TIMES = np.unique(np.geomspace(1, 1e5, 60).round()).astype(int)
CASES = {"one pair B, C": 1, "mean of 16 pairs": 16}


def run(
  folder: pathlib.Path,
  settings: tuple[str, ...] = SETTINGS,
  when: gradients.Steps = WHEN,
) -> dict[str, Any]:
  """Measures everything and writes it to `mechanism.json`.

  Args:
    folder: Folder of the results.
    settings: Settings of the run whose gradients are recorded.
    when: Steps of the recorded gradients.
  """
  recorded = gradients.record(PRESET, settings, when)
  measured = {
    **machine_lib.provenance("python -m train.experiments mechanism"),
    "settings": list(settings),
    "steps": [*when.early, *when.late],
    "gradients": {stage: _stage(recorded, stage) for stage in STAGES},
    "theory": {
      name: theory.descend(theory.draw(16, 24, count, seed=0), TIMES)
      for name, count in CASES.items()
    },
    "times": TIMES.tolist(),
  }
  atomic_files.write_text(folder / FILE, json.dumps(measured) + "\n")
  print(f"wrote {folder / FILE}")
  return measured


def _stage(recorded: dict[str, np.ndarray], stage: str) -> dict[str, Any]:
  """Spectra of all matrices at one step, by the kind of matrix."""
  prefix = f"{stage}/layers/"
  kinds = {
    path.removeprefix(prefix).removesuffix("/kernel"): stack
    for path, stack in recorded.items()
    if path.startswith(prefix)
  }
  return {kind: _spectra(stack) for kind, stack in sorted(kinds.items())}


def _spectra(stack: np.ndarray) -> dict[str, Any]:
  """Stable rank, energy and spectrum: means over a stack (layers, m, n)."""
  sigma = np.array([np.linalg.svd(g, compute_uv=False) for g in stack])
  energy = sigma**2 / (sigma**2).sum(1, keepdims=True)
  return {
    "stable_rank": round(float((1 / energy[:, 0]).mean()), 3),
    "energy": {
      str(rank): round(float(energy[:, :rank].sum(1).mean()), 4)
      for rank in RANKS
    },
    "spectrum": (sigma / sigma[:, :1]).mean(0)[:SHOWN].round(5).tolist(),
  }


def load(folder: pathlib.Path) -> dict[str, Any] | None:
  """Reads `mechanism.json`; None if there is no such file.

  Raises:
    UserError: The file cannot be read.
  """
  path = folder / FILE
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(
      f"{path} cannot be read ({error}); delete it and run python -m"
      " train.experiments mechanism"
    ) from None


def text(measured: dict[str, Any]) -> str:
  """The table and the figures of the page."""
  head = ["step", "stable rank, median of kinds (least, most)"]
  head += [f"energy at rank {rank}" for rank in RANKS]
  rows = []
  for stage, step in zip(STAGES, measured["steps"], strict=True):
    kinds = list(measured["gradients"][stage].values())
    ranks = [kind["stable_rank"] for kind in kinds]
    shares = [
      np.mean([kind["energy"][str(rank)] for kind in kinds]) for rank in RANKS
    ]
    rows.append(
      [
        str(step),
        f"{np.median(ranks):.1f} ({min(ranks):.1f}, {max(ranks):.1f})",
        *(f"{share:.0%}" for share in shares),
      ]
    )
  machine = measured["machine"]
  origin = (
    f"`{measured['command']}`, {measured['date']}, {machine['processor']}."
  )
  return "\n\n".join(
    [
      tables_lib.markdown_table(head, rows),
      origin,
      "![singular values of gradients](evidence/spectra.png)",
      "![stable rank in the setting of the theory](evidence/theory.png)",
    ]
  )


def draw(measured: dict[str, Any], folder: pathlib.Path) -> None:
  """Draws the figures of the page."""
  folder.mkdir(parents=True, exist_ok=True)
  _draw_spectra(measured, folder / "spectra.png")
  _draw_theory(measured, folder / "theory.png")


def _draw_spectra(measured: dict[str, Any], path: pathlib.Path) -> None:
  kinds = sorted(measured["gradients"][STAGES[0]])
  with figure.axes(path, count=len(STAGES)) as axes:
    for axis, stage, step in zip(axes, STAGES, measured["steps"], strict=True):
      for kind in kinds:
        values = measured["gradients"][stage][kind]["spectrum"]
        axis.plot(range(1, len(values) + 1), values, lw=1, label=kind)
      axis.set_yscale("log")
      axis.set_ylim(3e-3, 1.1)
      axis.set_title(f"step {step}", fontsize="medium")
      axis.set_xlabel("index of the singular value")
      axis.set_ylabel("relative to the largest")
      axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize="x-small", ncols=2)


def _draw_theory(measured: dict[str, Any], path: pathlib.Path) -> None:
  cases = measured["theory"]
  with figure.axes(path, count=len(cases)) as axes:
    for axis, (name, case) in zip(axes, cases.items(), strict=True):
      times = measured["times"]
      axis.plot(times, case["stable_rank"], label="stable rank of G")
      axis.plot(times, case["bound"], ls="--", label="bound of the lemma")
      axis.axhline(case["limit"][0], color="0.5", lw=1, ls=":", label="limit")
      axis.set_xscale("log")
      axis.set_ylim(0, 1.3 * max(case["stable_rank"]))
      axis.set_title(name, fontsize="medium")
      axis.set_xlabel("step")
      axis.set_ylabel("stable rank")
      axis.legend(frameon=False, fontsize="small")
      axis.grid(alpha=0.25)
