"""Runs as they lie in their folders, to be compared: numbers and labels."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from train.common.errors import UserError
from train.methods import table as methods
from train.run import metrics

AXES = {"steps": "step", "tokens": "tokens", "hours": "hours"}

# Fields that make no difference to what is drawn, unless nothing else does.
QUIET = ("run.", "mesh.", "data.cache", "data.eval_rows")
# Fields of the optimizer's group that say nothing about one without GaLore.
OF_GALORE = (
  "rank",
  "update_proj_gap",
  "scale",
  "proj_type",
  "projector",
  "refresh",
  "moments",
)
MOST = 5  # fields in a label
LONGEST = 24  # characters of a value in it


@dataclasses.dataclass(frozen=True)
class Run:
  """A run's folder, read."""

  out: pathlib.Path
  config: dict[str, Any]  # flat: {"optimizer.rank": 48, ...}
  records: list[dict[str, Any]]

  def series(
    self, name: str, axis: str, needed: str = ""
  ) -> tuple[np.ndarray, np.ndarray]:
    """Places on the axis and values, of the records that have `name`.

    Args:
      name: of the number.
      axis: `steps`, `tokens` or `hours`.
      needed: a number without which a record does not count.
    """
    found = [
      (r["step"], r[name])
      for r in self.records
      if name in r and (needed or name) in r
    ]
    steps, values = np.array(found, float).reshape(-1, 2).T
    return self._places(steps, axis), values

  def _places(self, steps: np.ndarray, axis: str) -> np.ndarray:
    if axis == "steps":
      return steps
    if axis == "tokens":
      if "task.name" in self.config:
        raise UserError(
          f"--x tokens: the batches of {self.out}, a run of fine-tuning, are as"
          " long as their longest rows; use --x steps or --x hours"
        )
      return steps * self.config["data.batch"] * self.config["data.length"]
    known = [(r["step"], r["seconds"]) for r in self.records if "seconds" in r]
    if not known:
      raise UserError(
        f"--x hours: {self.out / metrics.FILE} does not tell the time; use"
        " --x steps or --x tokens"
      )
    at, seconds = np.array([(0, 0.0), *known], float).T
    return np.interp(steps, at, seconds) / 3600

  def watched(self) -> list[str]:
    """Names of the matrices whose subspace was looked at."""
    names = {
      key.split("/")[1]
      for record in self.records
      for key in record
      if key.startswith("subspace/")
    }
    return sorted(names)


def load(out: pathlib.Path) -> Run:
  """Reads a run's folder.

  Raises:
    UserError: it is no run's, or holds nothing to draw.
  """
  try:
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"{out} is no folder of a run: no config.json") from None
  except (OSError, ValueError) as error:
    raise UserError(f"{out / 'config.json'} cannot be read: {error}") from None
  try:
    records = metrics.read(out / metrics.FILE)
  except (OSError, ValueError) as error:
    raise UserError(f"{out / metrics.FILE} cannot be read: {error}") from None
  if not any("loss" in record for record in records):
    raise UserError(f"{out / metrics.FILE} holds no training step to draw")
  return Run(out, config, records)


def labels(runs: list[Run]) -> list[str]:
  """A label for each run: as few fields as tell them apart, or its folder."""
  if len(runs) == 1:
    config = runs[0].config
    return [f"{config['preset']}, {config['optimizer.name']}"]
  fields = _enough(runs, _differing(runs))
  if not fields or len(fields) > MOST:
    return _folders(runs)
  texts = _texts(runs, fields)
  return [
    f"{text} ({folder})" if texts.count(text) > 1 else text
    for text, folder in zip(texts, _folders(runs), strict=True)
  ]


def _texts(runs: list[Run], fields: list[str]) -> list[str]:
  return [
    ", ".join(filter(None, (_field(name, run.config) for name in fields)))
    for run in runs
  ]


def _folders(runs: list[Run]) -> list[str]:
  """The ends of the folders' paths that differ."""
  parts = [run.out.resolve().parts for run in runs]
  for count in range(1, max(map(len, parts)) + 1):
    ends = [str(pathlib.Path(*part[-count:])) for part in parts]
    if len(set(ends)) == len({*parts}):
      return ends
  raise AssertionError("whole paths differ")


def _differing(runs: list[Run]) -> list[str]:
  names = dict.fromkeys(name for run in runs for name in run.config)
  fields = [
    name
    for name in names
    if len({repr(run.config.get(name)) for run in runs}) > 1
  ]
  telling = [name for name in fields if not name.startswith(QUIET)]
  return telling or fields


def _enough(runs: list[Run], fields: list[str]) -> list[str]:
  """As few of the fields as make as many different labels as all of them.

  The method comes first: what differs because of it goes without saying.
  """
  kinds = lambda chosen: len(set(_texts(runs, chosen)))
  found = [name for name in fields if name == "optimizer.name"]
  while kinds(found) < kinds(fields):
    rest = [name for name in fields if name not in found]
    found.append(max(rest, key=lambda name: kinds([*found, name])))
  return [name for name in fields if name in found]


def _field(name: str, config: dict[str, Any]) -> str:
  group, _, short = name.partition(".")
  value = config.get(name)
  if name in ("preset", "optimizer.name"):
    return str(value)
  method = methods.METHODS.get(config["optimizer.name"])
  ranked = method and short == "rank" and method.factors
  projects = method and method.projects
  idle = not projects and not ranked
  if group == "optimizer" and idle and short in OF_GALORE:
    return ""
  text = f"{value:g}" if isinstance(value, float) else str(value)
  text = text.rpartition("/")[2] or '""'  # of a path the file
  text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
  return f"{short} {text}"
