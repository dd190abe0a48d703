"""Options of GaLore for tests, with the fields of `Refresh` among them."""

import dataclasses
from typing import Any

from galore_optax import Refresh

_FIELDS = [field.name for field in dataclasses.fields(Refresh)]


def gathered(options: dict[str, Any]) -> dict[str, Any]:
  """The options, with those that are fields of `Refresh` as one `refresh`."""
  fields = {k: v for k, v in options.items() if k in _FIELDS}
  others = {k: v for k, v in options.items() if k not in _FIELDS}
  return others | {"refresh": Refresh(**fields)} if fields else others
