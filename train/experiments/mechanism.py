"""Why it works, in figures: are gradients low-rank, and do they become so?

Singular values of a small LLaMA's gradients at four steps of a run under AdamW,
and the share of their energy that the best bases of several ranks keep; beside
it the setting of the theory.
"""

import datetime
import json
import pathlib
from typing import Any

import numpy as np

from train.common import atomic_files
from train.common.errors import UserError
from train.experiments import theory
from train.measure import figure, gradients
from train.measure import machine as machine_lib

FILE = "mechanism.json"
PRESET = "sotu_small"
SETTINGS = ("data.batch=8",)
WHEN = gradients.Moments(early=(1, 20), late=(60, 150))
STAGES = ("early.old", "early.new", "late.old", "late.new")
RANKS = (1, 12, 48, 96)
SHOWN = 96  # singular values in the figure
TIMES = np.unique(np.geomspace(1, 1e5, 60).round()).astype(int)
CASES = {"one pair B, C": 1, "mean of 16 pairs": 16}


def run(
  folder: pathlib.Path,
  settings: tuple[str, ...] = SETTINGS,
  when: gradients.Moments = WHEN,
) -> dict[str, Any]:
  """Measures all and writes it to `mechanism.json`.

  Args:
    folder: of the results.
    settings: of the run whose gradients are looked at.
    when: its steps.
  """
  found = gradients.record(PRESET, settings, when)
  kept = {
    "command": "python -m train.experiments mechanism",
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "machine": machine_lib.machine(),
    "versions": machine_lib.versions(),
    "settings": list(settings),
    "steps": [*when.early, *when.late],
    "gradients": {stage: _stage(found, stage) for stage in STAGES},
    "theory": {
      name: theory.descend(theory.draw(16, 24, count, seed=0), TIMES)
      for name, count in CASES.items()
    },
    "times": TIMES.tolist(),
  }
  atomic_files.write_text(folder / FILE, json.dumps(kept) + "\n")
  print(f"wrote {folder / FILE}")
  return kept


def _stage(found: dict[str, np.ndarray], stage: str) -> dict[str, Any]:
  """Numbers of all matrices at one step, by the kind of matrix."""
  prefix = f"{stage}/layers/"
  kinds = {
    path.removeprefix(prefix).removesuffix("/kernel"): stack
    for path, stack in found.items()
    if path.startswith(prefix)
  }
  return {kind: _of_stack(stack) for kind, stack in sorted(kinds.items())}


def _of_stack(stack: np.ndarray) -> dict[str, Any]:
  """Means over the layers of a stack (layers, m, n)."""
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
  """What was measured, if it was.

  Raises:
    UserError: the file cannot be read.
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


def text(kept: dict[str, Any]) -> str:
  """Table and figures of the page."""
  head = "| step | stable rank, median of kinds (least, most) |"
  head += "".join(f" energy at rank {rank} |" for rank in RANKS)
  lines = [head, "|---|--:|" + "--:|" * len(RANKS)]
  for stage, step in zip(STAGES, kept["steps"], strict=True):
    kinds = list(kept["gradients"][stage].values())
    ranks = [kind["stable_rank"] for kind in kinds]
    cells = [str(step)]
    cells += [f"{np.median(ranks):.1f} ({min(ranks):.1f}, {max(ranks):.1f})"]
    for rank in RANKS:
      share = np.mean([kind["energy"][str(rank)] for kind in kinds])
      cells.append(f"{share:.0%}")
    lines.append(f"| {' | '.join(cells)} |")
  machine = kept["machine"]
  note = f"`{kept['command']}`, {kept['date']}, {machine['processor']}."
  return "\n\n".join(
    [
      "\n".join(lines),
      note,
      "![singular values of gradients](evidence/spectra.png)",
      "![stable rank in the setting of the theory](evidence/theory.png)",
    ]
  )


def draw(kept: dict[str, Any], folder: pathlib.Path) -> None:
  """The figures of the page."""
  folder.mkdir(parents=True, exist_ok=True)
  kinds = sorted(kept["gradients"][STAGES[0]])
  with figure.axes(folder / "spectra.png", count=len(STAGES)) as places:
    looks = zip(places, STAGES, kept["steps"], strict=True)
    for place, stage, step in looks:
      for kind in kinds:
        values = kept["gradients"][stage][kind]["spectrum"]
        place.plot(range(1, len(values) + 1), values, lw=1, label=kind)
      place.set_yscale("log")
      place.set_ylim(3e-3, 1.1)
      place.set_title(f"step {step}", fontsize="medium")
      place.set_xlabel("number of the singular value")
      place.set_ylabel("over the largest")
      place.grid(alpha=0.25)
    places[0].legend(frameon=False, fontsize="x-small", ncols=2)
  with figure.axes(folder / "theory.png", count=len(CASES)) as places:
    for place, (name, case) in zip(places, kept["theory"].items(), strict=True):
      times = kept["times"]
      place.plot(times, case["stable_rank"], label="stable rank of G")
      place.plot(times, case["bound"], ls="--", label="bound of the lemma")
      place.axhline(case["limit"][0], color="0.5", lw=1, ls=":")
      place.set_xscale("log")
      place.set_ylim(0, 1.3 * max(case["stable_rank"]))
      place.set_title(name, fontsize="medium")
      place.set_xlabel("step")
      place.legend(frameon=False, fontsize="small")
      place.grid(alpha=0.25)
