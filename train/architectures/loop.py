"""One training run: steps, validation, test, and the record of it."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import galore_optax as go
from train.architectures import optimizers
from train.architectures.catalog import Entry
from train.architectures.trainer import Batch, Data, Trainer

POINTS = 50  # of a recorded curve


class Rates(NamedTuple):
  """A method and its two learning rates."""

  method: str
  rate: float
  multiplier: float


class Run(NamedTuple):
  """A finished run: its record, and what samples are drawn from."""

  record: dict[str, Any]
  trainer: Trainer
  state: Any


def build(entry: Entry, config: Any, rates: Rates) -> Trainer:
  """The trainer of an architecture under a method."""
  tx = optimizers.make(*rates, options(entry, config))
  return entry.module().make(config, tx)


def options(entry: Entry, config: Any) -> optimizers.Options:
  """What an architecture's methods share."""
  module = entry.module()
  kernels = getattr(module, "KERNELS", None)
  return optimizers.Options(
    config.steps, config.rank, config.gap, module.RULES, kernels
  )


def run(
  entry: Entry,
  config: Any,
  rates: Rates,
  seed: int,
  say: Callable[[str], None] = lambda line: None,
) -> Run:
  """Trains and evaluates.

  Args:
    entry: The architecture.
    config: Its sizes.
    rates: The method.
    seed: Of the weights and of the order of the data.
    say: Prints a line of progress.

  Returns:
    The run. Its record has `status`, and if that is `done`: `validation_loss`,
    `test_loss` and the other scores, `curve` and `bytes`.
  """
  data = entry.prepare(config)
  trainer = build(entry, config, rates)
  state = trainer.start(seed)
  begin = time.perf_counter()
  state, losses = _train(trainer, state, data, config.steps, seed, say)
  seconds = time.perf_counter() - begin
  record: dict[str, Any] = {
    "bytes": {
      "optimizer": go.state_bytes(trainer.opt_state(state)),
      "weights": go.state_bytes(trainer.params(state)),
    },
    "seconds": round(seconds, 1),
    "curve": _averaged(losses),
  }
  scores = {
    "validation": mean_scores(trainer, state, data.validation),
    "test": mean_scores(trainer, state, data.test),
  }
  finite = all(
    math.isfinite(x) for part in scores.values() for x in part.values()
  )
  record["status"] = "done" if finite else "diverged"
  if finite:
    record |= {
      f"{part}_{name}": round(value, 5)
      for part, values in scores.items()
      for name, value in values.items()
    }
  return Run(record, trainer, state)


def _train(
  trainer: Trainer,
  state: Any,
  data: Data,
  steps: int,
  seed: int,
  say: Callable[[str], None],
) -> tuple[Any, np.ndarray]:
  losses = []
  for step, batch in zip(range(1, steps + 1), data.batches(seed), strict=False):
    state, loss = trainer.step(state, batch)
    losses.append(loss)
    if step % max(1, steps // 10) == 0 or step == steps:
      say(f"step {step}/{steps}  loss {float(loss):.4f}")
  return state, np.array(jax.device_get(losses))


def mean_scores(
  trainer: Trainer, state: Any, batches: list[Batch]
) -> dict[str, float]:
  """Means of all scores over batches of one size."""
  scores = [jax.device_get(trainer.evaluate(state, x)) for x in batches]
  return {
    name: float(np.mean([score[name] for score in scores]))
    for name in scores[0]
  }


def _averaged(losses: np.ndarray) -> list[list[float]]:
  """Last step and mean loss of each of `POINTS` stretches; finite ones only."""
  steps = np.arange(1, len(losses) + 1)
  stretches = np.array_split(np.arange(len(losses)), min(POINTS, len(losses)))
  means = [(int(steps[x[-1]]), float(losses[x].mean())) for x in stretches]
  return [[step, round(loss, 4)] for step, loss in means if math.isfinite(loss)]
