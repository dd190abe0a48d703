"""Where else a run's numbers go: TensorBoard and Weights & Biases.

Both are optional extras; `metrics.jsonl` has everything without them.
"""

import hashlib
import importlib.util
import os
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

from train.common.errors import UserError


class Sink(Protocol):
  """Takes the numbers of a step."""

  def write(self, step: int, values: dict[str, float]) -> None:
    """Takes named numbers of a step; steps never go back."""
    ...

  def close(self) -> None:
    """Hands over what is still held."""
    ...


class TensorBoard:
  """Event files in the run's folder, under `tensorboard`."""

  def __init__(
    self, out: pathlib.Path, config: dict[str, Any], resumed_at: int
  ):
    import tensorboardX  # an extra: only imported where it is asked for

    # What a killed run wrote after its last checkpoint happens again.
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
  """A W&B run that a resumed training goes on with.

  WANDB_MODE=offline keeps it in the run's folder until `wandb sync`;
  WANDB_PROJECT names another project than galore-optax.
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
    """Logs the numbers; those of one step may come in several calls."""
    self._run.log(values, step=step)

  def close(self) -> None:
    """Ends the run."""
    self._run.finish()


def _run_id(out: pathlib.Path, new: bool) -> str:
  """The id under which the training in this folder is known to W&B."""
  file = out / "wandb" / "id"
  if new or not file.exists():
    file.parent.mkdir(exist_ok=True)
    file.write_text(hashlib.sha256(os.urandom(16)).hexdigest()[:12])
  return file.read_text()


SINKS: dict[str, tuple[str, Callable[..., Sink]]] = {
  "tensorboard": ("tensorboardX", TensorBoard),
  "wandb": ("wandb", Wandb),
}


def parse_names(setting: str) -> list[str]:
  """The sinks that `run.sinks` asks for.

  Raises:
    UserError: one is unknown, or not installed.
  """
  found = [name.strip() for name in setting.split(",") if name.strip()]
  for name in found:
    if name not in SINKS:
      raise UserError(
        f"run.sinks: {name!r} is unknown; metrics.jsonl is always written,"
        f" and there are {', '.join(SINKS)}"
      )
    package = SINKS[name][0]
    if importlib.util.find_spec(package) is None:
      raise UserError(
        f"run.sinks={name} needs the package {package}, which is not"
        f" installed; `pip install -e '.[{name}]'`"
      )
  return found


def open_sinks(
  setting: str, out: pathlib.Path, config: dict[str, Any], resumed_at: int
) -> list[Sink]:
  """Opens what `run.sinks` asks for.

  Args:
    setting: names, separated by commas.
    out: the run's folder, which exists.
    config: the run's fields, flat.
    resumed_at: step of the checkpoint from which the run goes on, or 0.
  """
  return [
    SINKS[name][1](out, config, resumed_at) for name in parse_names(setting)
  ]
