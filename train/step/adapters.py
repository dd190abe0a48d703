"""LoRA and its variants in training: frozen weights and trained adapters.

With them, the parameters of a training state are two trees, `frozen` and
`adapters`. The optimizer only sees the adapters. The model computes with the
weights that result from both. The methods are lora, qlora, relora and
low_rank, as `optimizer.name`.
"""

import dataclasses
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax

import galore_optax
from train.common.errors import UserError
from train.methods import registry
from train.methods.options import OptimizerConfig

# The matrices that get factors: those of the blocks, which GaLore projects.
RULES = (
  ("^layers/.*kernel$", galore_optax.Projection()),
  ("", None),
)


@dataclasses.dataclass(frozen=True)
class Adapters:
  """How weights are divided into frozen and trained ones, and restarted."""

  method: galore_optax.baselines.LowRank
  reset_every: int = 0  # updates between two restarts; 0: none

  def init(self, weights: Any, seed: int | jax.Array = 0) -> dict[str, Any]:
    """Divides the weights of a model into `frozen` and `adapters`."""
    # Random numbers that differ from those of the weights.
    key = jax.random.fold_in(jax.random.key(seed), 1)
    frozen, adapters = self.method.init(key, weights)
    return {"frozen": frozen, "adapters": adapters}

  def read(self, params: dict[str, Any]) -> Any:
    """The weights that the model computes with."""
    return self.method.apply(params["frozen"], params["adapters"])

  def differentiable(
    self, params: dict[str, Any]
  ) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
    """The weights, and a function from their gradient to the adapters'."""
    frozen = params["frozen"]
    read = lambda adapters: self.method.apply(frozen, adapters)
    weights, back = jax.vjp(read, params["adapters"])
    return weights, lambda grads: back(grads)[0]

  def restart_if_due(
    self,
    params: dict[str, Any],
    opt_state: Any,
    updates: Any,
    seed: int | jax.Array,
  ) -> tuple[dict[str, Any], Any]:
    """Merges and restarts the factors every `reset_every` updates.

    Args:
      params: `frozen` and `adapters`.
      opt_state: the optimizer's state of the adapters.
      updates: number of updates of the adapters so far, traced.
      seed: seed of the run.
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
    """An optimizer of adapters as one whose `init` takes the weights."""
    init = lambda weights: tx.init(self.init(weights)["adapters"])
    return types.SimpleNamespace(init=init)


def make(
  config: OptimizerConfig, full: Sequence[str] = ("",)
) -> Adapters | None:
  """The adapters of a method, or None if it trains the weights themselves.

  Args:
    config: options of the optimizer.
    full: regular expressions of leaves that are trained without factors; by
      default all leaves that have none.

  Raises:
    UserError: an option is out of range.
  """
  method = registry.get(config.name)
  if method.factors is None:
    return None
  try:
    factors = method.factors(config, rules=RULES, full=full)
  except (TypeError, ValueError) as error:
    raise UserError(f"optimizer.name={config.name}: {error}") from None
  return Adapters(factors, config.reset_every if method.restarts else 0)


def weights_text(params: dict[str, Any]) -> str:
  """Bytes of the frozen and of the trained weights, in one line."""
  frozen, trained = (
    galore_optax.state_bytes(params[part]) for part in ("frozen", "adapters")
  )
  return f"{frozen:,} bytes frozen, {trained:,} bytes trained"
