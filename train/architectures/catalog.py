"""The architectures: name, library, data, and the metric that is reported."""

import dataclasses
import importlib
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

from train.architectures.trainer import Data
from train.common.errors import UserError


class Entry(NamedTuple):
  """An architecture.

  Attributes:
    name: Its name on the command line, and that of its file in this folder.
    title: Its name in tables.
    library: What it is written in.
    package: The package to import, if the extra `train` does not have it.
    data: `digits` or `speeches`.
    metric: The test metric of the tables: `error`, `perplexity` or `loss`.
  """

  name: str
  title: str
  library: str
  package: str
  data: str
  metric: str

  def installed(self) -> bool:
    """Whether the library is there."""
    return not self.package or bool(importlib.util.find_spec(self.package))

  def module(self) -> ModuleType:
    """The module of the model: its `Config`, `RULES` and `make`.

    Raises:
      UserError: The library is not installed.
    """
    if not self.installed():
      raise UserError(
        f"{self.name} is written in {self.library}, which is not installed:"
        ' pip install -e ".[train,recipes]"'
      )
    return importlib.import_module(f"train.architectures.{self.name}")

  def prepare(self, config: Any) -> Data:
    """The data in batches of the config's size."""
    module = importlib.import_module(f"train.architectures.{self.data}")
    return module.prepare(config.batch, getattr(config, "length", 0))


ENTRIES = {
  entry.name: entry
  for entry in (
    Entry("vit", "vision transformer", "Flax NNX", "", "digits", "error"),
    Entry("cnn", "convolutional network", "Flax Linen", "", "digits", "error"),
    Entry(
      "gru", "GRU language model", "Haiku", "haiku", "speeches", "perplexity"
    ),
    Entry(
      "moe", "LLaMA with experts", "Flax Linen", "", "speeches", "perplexity"
    ),
    Entry(
      "ssm",
      "state-space model (Mamba)",
      "Equinox",
      "equinox",
      "speeches",
      "perplexity",
    ),
    Entry("diffusion", "diffusion model", "Flax NNX", "", "digits", "loss"),
  )
}


def get(name: str) -> Entry:
  """The architecture of a name.

  Raises:
    UserError: There is none.
  """
  if name not in ENTRIES:
    raise UserError(
      f"there is no architecture {name!r}; there are {', '.join(ENTRIES)}"
    )
  return ENTRIES[name]


def override(config: Any, settings: list[str]) -> Any:
  """A config with fields replaced, from texts such as `steps=100`.

  Raises:
    UserError: A text names no field, or has no number for it.
  """
  fields = {x.name: x.type for x in dataclasses.fields(config)}
  values = {}
  for setting in settings:
    name, _, text = setting.partition("=")
    if name not in fields:
      raise UserError(
        f"--set {setting}: there is no field {name!r}; there are"
        f" {', '.join(fields)}"
      )
    kind = type(getattr(config, name))
    try:
      values[name] = kind(text)
    except ValueError:
      raise UserError(
        f"--set {setting}: {text!r} is not of type {kind.__name__}"
      ) from None
    if not values[name] > 0:
      raise UserError(f"--set {setting}: must be above 0")
  return dataclasses.replace(config, **values)
