"""Other receivers of a run's metrics: TensorBoard and Weights & Biases.

Both are optional extras; `metrics.jsonl` has all metrics without them.
"""

import hashlib
import importlib.util
import os
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

from train.common import atomic_files, inputs, links
from train.common.errors import UserError


class Sink(Protocol):
  """Receives the metrics of a step."""

  def write(self, step: int, values: dict[str, float]) -> None:
    """Receives named metrics of a step; steps never decrease."""
    ...

  def close(self) -> None:
    """Writes whatever is still buffered."""
    ...


class TensorBoard:
  """Event files in the run's folder, under `tensorboard`."""

  def __init__(
    self, out: pathlib.Path, config: dict[str, Any], resumed_at: int
  ):
    import tensorboardX  # an extra: only imported where it is asked for

    # Steps after the last checkpoint of a killed run are repeated.
    self._writer = tensorboardX.SummaryWriter(
      str(out / "tensorboard"), purge_step=resumed_at + 1
    )
    if not resumed_at:
      lines = "\n".join(f"    {k} = {v}" for k, v in config.items())
      self._writer.add_text("config", lines, 0)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Adds one scalar for each number."""
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes the event file."""
    self._writer.close()


class Wandb:
  """A W&B run, which a resumed training continues.

  With WANDB_MODE=offline it stays in the run's folder until `wandb sync`.
  WANDB_PROJECT sets the project, which is galore-optax by default.
  """

  def __init__(
    self, out: pathlib.Path, config: dict[str, Any], resumed_at: int
  ):
    import wandb

    path = str(out.resolve())
    try:
      self._run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "galore-optax"),
        name=out.name,
        id=_run_id(out, new=not resumed_at),
        resume="allow",
        dir=path,
        config=config,
        settings=wandb.Settings(console="off", silent=True),
      )
    except wandb.Error as error:
      raise UserError(
        f"run.sinks=wandb: {error} Or set WANDB_MODE=offline: the run then"
        " stays in its folder until `wandb sync`"
      ) from None

  def write(self, step: int, values: dict[str, float]) -> None:
    """Logs the metrics; those of one step may come in several calls."""
    self._run.log(values, step=step)

  def close(self) -> None:
    """Ends the run."""
    self._run.finish()


def _run_id(out: pathlib.Path, new: bool) -> str:
  """The W&B id of the training in this folder."""
  file = out / "wandb" / "id"
  if new or not file.exists():
    name = hashlib.sha256(os.urandom(16)).hexdigest()[:12]
    atomic_files.write_text(file, name)
  return inputs.read_text(links.inside(file.parent, file.name))


SINKS: dict[str, tuple[str, Callable[..., Sink]]] = {
  "tensorboard": ("tensorboardX", TensorBoard),
  "wandb": ("wandb", Wandb),
}


def parse_names(setting: str) -> list[str]:
  """The names in `run.sinks`.

  Raises:
    UserError: a sink is unknown, or not installed.
  """
  names = [name.strip() for name in setting.split(",") if name.strip()]
  for name in names:
    if name not in SINKS:
      raise UserError(
        f"run.sinks: {name!r} is unknown; metrics.jsonl is always written, and"
        f" the others are {', '.join(SINKS)}"
      )
    package = SINKS[name][0]
    if importlib.util.find_spec(package) is None:
      raise UserError(
        f"run.sinks={name} needs the package {package}, which is not"
        f" installed; `pip install -e '.[{name}]'`"
      )
  return names


def open_sinks(
  setting: str, out: pathlib.Path, config: dict[str, Any], resumed_at: int
) -> list[Sink]:
  """Opens the sinks of `run.sinks`.

  Args:
    setting: names, separated by commas.
    out: the run's folder, which exists.
    config: the run's fields, flat.
    resumed_at: step of the checkpoint from which the run goes on, or 0.
  """
  return [
    SINKS[name][1](out, config, resumed_at) for name in parse_names(setting)
  ]
