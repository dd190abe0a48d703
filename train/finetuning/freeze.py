"""Frozen weights, which have neither a gradient nor an optimizer state."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import traverse_util

from train.common.errors import UserError
from train.step.adapters import Adapters

SEPARATOR = "/"


def _flat(tree: dict) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep=SEPARATOR)


def _nested(flat: dict[str, Any]) -> dict:
  return traverse_util.unflatten_dict(flat, sep=SEPARATOR)


@dataclasses.dataclass(frozen=True)
class Frozen(Adapters):
  """Weights of which only some are trained, with the interface of `Adapters`.

  The trained ones keep their paths in the model, which the rules of an
  optimizer match.
  """

  method: Any = None
  pattern: str = ""  # regular expression of the frozen weights' paths

  def init(self, weights: dict, seed: int | jax.Array = 0) -> dict[str, Any]:
    """Divides weights into `frozen` ones and `adapters`: the trained ones."""
    del seed
    flat = _flat(weights)
    is_frozen = {path for path in flat if re.search(self.pattern, path)}
    frozen = {
      p: x if p in is_frozen else optax.MaskedNode() for p, x in flat.items()
    }
    trained = {p: x for p, x in flat.items() if p not in is_frozen}
    return {"frozen": _nested(frozen), "adapters": _nested(trained)}

  def read(self, params: dict[str, Any]) -> dict:
    """All weights, in the model's tree."""
    return _nested(_flat(params["frozen"]) | _flat(params["adapters"]))

  def differentiable(
    self, params: dict[str, Any]
  ) -> tuple[dict, Callable[[dict], dict]]:
    """All weights, and a function that picks the trained ones' gradient."""
    trained = _flat(params["adapters"])

    def back(grads: dict) -> dict:
      flat = _flat(grads)
      return _nested({path: flat[path] for path in trained})

    return self.read(params), back


def make(pattern: str, weights: dict) -> Frozen:
  """Freezes the weights whose paths match a pattern.

  Args:
    pattern: a regular expression, searched for in the paths of the weights.
    weights: the model's weights, or their shapes.

  Raises:
    UserError: the pattern is not valid, or matches no weight or all weights.
  """
  try:
    matches = [bool(re.search(pattern, path)) for path in _flat(weights)]
  except re.error as error:
    raise UserError(
      f"task.freeze={pattern} is not a regular expression ({error})"
    ) from None
  if not any(matches) or all(matches):
    raise UserError(
      f"task.freeze={pattern} matches {'all' if any(matches) else 'none'} of"
      f" the model's weights, which are {', '.join(_flat(weights))}"
    )
  return Frozen(pattern=pattern)
