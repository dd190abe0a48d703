"""Weights that stay as they are: no gradient, no optimizer state."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

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
  """Weights of which only some are trained; in the place of `Adapters`.

  What is trained is a tree with the paths of the model, so that the rules of
  an optimizer find it there.
  """

  method: Any = None
  pattern: str = ""  # of the paths that stay

  def init(self, weights: dict, seed: int = 0) -> dict[str, Any]:
    """`frozen` and `adapters`, which here are the trained weights."""
    del seed
    flat = _flat(weights)
    stays = {path for path in flat if re.search(self.pattern, path)}
    frozen = {
      p: x if p in stays else optax.MaskedNode() for p, x in flat.items()
    }
    trained = {p: x for p, x in flat.items() if p not in stays}
    return {"frozen": _nested(frozen), "adapters": _nested(trained)}

  def read(self, params: dict[str, Any]) -> dict:
    """The weights that the model computes with."""
    return _nested(_flat(params["frozen"]) | _flat(params["adapters"]))

  def differentiable(
    self, params: dict[str, Any]
  ) -> tuple[dict, Callable[[dict], dict]]:
    """The weights, and from their gradient to that of the trained ones."""
    trained = _flat(params["adapters"])

    def back(grads: dict) -> dict:
      flat = _flat(grads)
      return _nested({path: flat[path] for path in trained})

    return self.read(params), back


def make(pattern: str, weights: dict) -> Frozen:
  """What stays of a model.

  Args:
    pattern: a regular expression, looked for in the paths of the weights.
    weights: the model's, or their shapes.

  Raises:
    UserError: it is none, or fits no weight, or all of them.
  """
  try:
    hits = [bool(re.search(pattern, path)) for path in _flat(weights)]
  except re.error as error:
    raise UserError(
      f"task.freeze={pattern} is no regular expression ({error})"
    ) from None
  if not any(hits) or all(hits):
    raise UserError(
      f"task.freeze={pattern} fits {'all' if any(hits) else 'none'} of the"
      f" model's weights, which are {', '.join(_flat(weights))}"
    )
  return Frozen(pattern=pattern)
