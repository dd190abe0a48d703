"""Reads finished runs from their folders: metrics, and labels to tell them."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from train.common import inputs, links
from train.common.errors import UserError
from train.common.fields import Fields
from train.methods import registry
from train.run import metrics

AXES = {"steps": "step", "tokens": "tokens", "hours": "hours"}

# Fields that labels do not mention, unless nothing else differs.
UNMENTIONED = ("run.", "mesh.", "data.cache", "data.eval_rows")
# Fields of the optimizer's group that only methods with a subspace use.
OF_GALORE = (
  "rank",
  "update_proj_gap",
  "scale",
  "proj_type",
  "projector",
  "refresh",
  "moments",
)
MAX_FIELDS = 5  # in a label
MAX_LENGTH = 24  # of a value in a label


@dataclasses.dataclass(frozen=True)
class Run:
  """What was read from a run's folder."""

  out: pathlib.Path
  config: dict[str, Any]  # flat: {"optimizer.rank": 48, ...}
  records: list[dict[str, Any]]

  def series(
    self, name: str, axis: str, needed: str = ""
  ) -> tuple[np.ndarray, np.ndarray]:
    """Positions on an axis and values, of the records that have a metric.

    Args:
      name: the metric.
      axis: `steps`, `tokens` or `hours`.
      needed: another metric that a record must have to count.
    """
    found = [
      (r["step"], r[name])
      for r in self.records
      if name in r and (needed or name) in r
    ]
    steps, values = np.array(found, float).reshape(-1, 2).T
    return self._positions(steps, axis), values

  @property
  def _fields(self) -> Fields:
    return Fields(str(self.out / "config.json"), self.config)

  def _positions(self, steps: np.ndarray, axis: str) -> np.ndarray:
    if axis == "steps":
      return steps
    if axis == "tokens":
      if "task.name" in self.config:
        raise UserError(
          f"--x tokens: {self.out} is a fine-tuning run, whose batches vary in"
          " length; use --x steps or --x hours"
        )
      batch = self._fields.integer("data.batch", low=1)
      return steps * batch * self._fields.integer("data.length", low=1)
    known = [(r["step"], r["seconds"]) for r in self.records if "seconds" in r]
    if not known:
      raise UserError(
        f"--x hours: {self.out / metrics.FILE} has no times; use --x steps or"
        " --x tokens"
      )
    at, seconds = np.array([(0, 0.0), *known], float).T
    return np.interp(steps, at, seconds) / 3600

  def watched(self) -> list[str]:
    """Names of the matrices whose subspaces were measured."""
    names = {
      key.split("/")[1]
      for record in self.records
      for key in record
      if key.startswith("subspace/") and key.count("/") == 2
    }
    return sorted(names)


def load(out: pathlib.Path) -> Run:
  """Reads a run's folder.

  Raises:
    UserError: it is not the folder of a run, or has no training steps.
  """
  path = links.inside(out, "config.json")
  if not path.exists():
    raise UserError(f"{out} is not the folder of a run: it has no config.json")
  config = inputs.read_object(path)
  fields = Fields(str(path), config)
  for name in ("preset", "optimizer.name"):  # which labels have
    fields.text(name)
  records = metrics.read(out / metrics.FILE)
  if not any("loss" in record for record in records):
    raise UserError(f"{out / metrics.FILE} holds no training steps")
  return Run(out, config, records)


def labels(runs: list[Run]) -> list[str]:
  """Labels of runs: the fewest fields that tell them apart, or folders."""
  if len(runs) == 1:
    config = runs[0].config
    return [f"{config['preset']}, {config['optimizer.name']}"]
  fields = _enough(runs, _differing(runs))
  if not fields or len(fields) > MAX_FIELDS:
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
  """The shortest ends of the folders' paths that differ."""
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
  telling = [name for name in fields if not name.startswith(UNMENTIONED)]
  return telling or fields


def _enough(runs: list[Run], fields: list[str]) -> list[str]:
  """The fewest fields that give as many different labels as all fields do.

  The method comes first, because other fields often differ only with it.
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
  method = registry.METHODS.get(config["optimizer.name"])
  ranked = method and short == "rank" and method.factors
  projects = method and method.projects
  idle = not projects and not ranked
  if group == "optimizer" and idle and short in OF_GALORE:
    return ""
  text = f"{value:g}" if isinstance(value, float) else str(value)
  text = text.rpartition("/")[2] or '""'  # of a path the file
  text = text if len(text) <= MAX_LENGTH else text[: MAX_LENGTH - 1] + "…"
  return f"{short} {text}"
