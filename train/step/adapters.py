"""LoRA and its kin in training: what is frozen, and what is trained instead.

With them the parameters of a training state are two trees, `frozen` and
`adapters`. The optimizer knows of the adapters only; the model computes with
the weights that both stand for. In a run of its own each of GaLore's peers is
`optimizer.name`: lora, qlora, relora, low_rank.
"""

import dataclasses
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax

import galore_optax
from train.common.errors import UserError
from train.methods import table as methods
from train.methods.options import OptimizerConfig

# The matrices that have factors: those of the blocks, which GaLore projects.
RULES = (
  ("^layers/.*kernel$", galore_optax.Projection()),
  ("", None),
)


@dataclasses.dataclass(frozen=True)
class Adapters:
  """How a run's weights are divided, and when its factors start anew."""

  method: galore_optax.baselines.LowRank
  reset_every: int = 0  # updates between two restarts; 0: none

  def init(self, weights: Any, seed: int = 0) -> dict[str, Any]:
    """`frozen` and `adapters` of the weights of a model."""
    # Other random numbers than those of the weights.
    key = jax.random.fold_in(jax.random.key(seed), 1)
    frozen, adapters = self.method.init(key, weights)
    return {"frozen": frozen, "adapters": adapters}

  def read(self, params: dict[str, Any]) -> Any:
    """The weights that the model computes with."""
    return self.method.apply(params["frozen"], params["adapters"])

  def differentiable(
    self, params: dict[str, Any]
  ) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
    """The weights, and from their gradient to that of the adapters."""
    frozen = params["frozen"]
    read = lambda adapters: self.method.apply(frozen, adapters)
    weights, back = jax.vjp(read, params["adapters"])
    return weights, lambda grads: back(grads)[0]

  def restart_if_due(
    self, params: dict[str, Any], opt_state: Any, updates: Any, seed: int
  ) -> tuple[dict[str, Any], Any]:
    """Merges the factors and starts them anew every so many updates.

    Args:
      params: `frozen` and `adapters`.
      opt_state: the optimizer's state of the adapters.
      updates: how many the adapters have had, traced.
      seed: of the run.
    """
    if not self.reset_every:
      return params, opt_state

    def restart() -> tuple[dict[str, Any], Any]:
      key = jax.random.fold_in(jax.random.key(seed), 2)
      frozen, adapters, state = self.method.restart(
        jax.random.fold_in(key, updates),
        params["frozen"],
        params["adapters"],
        opt_state,
      )
      return {"frozen": frozen, "adapters": adapters}, state

    due = updates % self.reset_every == 0
    return jax.lax.cond(due, restart, lambda: (params, opt_state))

  def over_weights(self, tx: Any) -> Any:
    """An optimizer of adapters as one whose `init` is given the weights."""
    init = lambda weights: tx.init(self.init(weights)["adapters"])
    return types.SimpleNamespace(init=init)


def make(
  config: OptimizerConfig, full: Sequence[str] = ("",)
) -> Adapters | None:
  """The adapters of a method that has any.

  Args:
    config: of the optimizer.
    full: regular expressions of the leaves that are trained as they are; of
      pre-training all that have no factors.

  Raises:
    UserError: a number is out of range.
  """
  method = methods.get(config.name)
  if method.factors is None:
    return None
  try:
    factors = method.factors(config, rules=RULES, full=full)
  except (TypeError, ValueError) as error:
    raise UserError(f"optimizer.name={config.name}: {error}") from None
  return Adapters(factors, config.reset_every if method.restarts else 0)


def weights_text(params: dict[str, Any]) -> str:
  """Bytes of the frozen and of the trained weights, in a line."""
  frozen, trained = (
    galore_optax.state_bytes(params[part]) for part in ("frozen", "adapters")
  )
  return f"{frozen:,} bytes frozen, {trained:,} bytes trained"


def initial(config: OptimizerConfig, tx: Any) -> Any:
  """The optimizer as one whose `init` is given the weights of a model."""
  adapters = make(config)
  return tx if adapters is None else adapters.over_weights(tx)
