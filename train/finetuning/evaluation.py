"""The scores of a model on the splits that are evaluated."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from train.common.errors import Diverged
from train.finetuning import scores, spans
from train.finetuning.batches import Batch, in_order
from train.finetuning.tasks import Task
from train.run import metrics


def evaluate(
  learner: Any,
  evaluated: list[Any],
  batch: int,
  run: Callable[[Batch], tuple[Any, Any, Any]],
) -> dict[str, float]:
  """Scores and loss of each split; those after the first under its name.

  Args:
    learner: the model.
    evaluated: splits that it has prepared.
    batch: rows in a batch.
    run: outputs, summed loss and count of a batch.
  """
  found: dict[str, float] = {}
  for number, prepared in enumerate(evaluated):
    prefix = f"{prepared.split.name}_" if number else ""
    values = _split(learner, prepared, batch, run)
    found |= {prefix + name: value for name, value in values.items()}
  return found


def _split(
  learner: Any,
  prepared: Any,
  batch: int,
  run: Callable[[Batch], tuple[Any, Any, Any]],
) -> dict[str, float]:
  outputs: dict[int, Any] = {}
  total = count = 0.0
  collate = lambda rows, size: learner.collate(prepared, rows, size)
  for rows, made in in_order(prepared.lengths, collate, batch):
    found, loss, weight = run(made)
    total, count = total + float(loss), count + float(weight)
    for place, row in enumerate(rows):
      outputs[int(row)] = jax.tree.map(
        lambda x, i=place: np.asarray(x[i]), found
      )
  loss = total / max(count, 1.0)
  values = {"held_out_loss": loss}
  task: Task = learner.task
  if task.kind == "chat":
    return values | {"held_out_perplexity": math.exp(min(loss, 700))}
  answers = learner.decide(prepared, outputs)
  if task.kind == "span":
    return values | spans.score(answers, prepared.split.answers)
  right = np.asarray(prepared.split.answers)
  return values | scores.score(task.metrics, answers, right)


def rank(task: Task, found: dict[str, float]) -> float:
  """The score that is compared, the better the lower."""
  if task.kind == "chat":
    return found["held_out_loss"]
  return -found[task.metrics[0]]


def last(out: pathlib.Path, step: int) -> dict[str, float]:
  """The scores of a run whose last step is done.

  Args:
    out: the run's folder.
    step: the last step.

  Raises:
    Diverged: the loss was not finite then, which scores do not show.
  """
  loss = "held_out_loss"
  records = metrics.read(out / metrics.FILE)
  # What is no number is left out of the log.
  found = [r for r in records if math.isfinite(r.get(loss, math.nan))]
  if not found or found[-1]["step"] != step:
    raise Diverged(
      f"the loss on what is evaluated is not finite after step {step}; what"
      f" was finite is in {out / metrics.FILE}. Try a smaller"
      " optimizer.learning_rate"
    )
  return {name: value for name, value in found[-1].items() if name != "step"}


def text(found: dict[str, float]) -> str:
  """Scores in a line."""
  return ", ".join(
    f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items()
  )
