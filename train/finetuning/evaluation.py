"""Scores of a model on the evaluated splits of a task."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from train.common.errors import Diverged, UserError
from train.finetuning import scores, spans
from train.finetuning.batches import Batch, longest_first
from train.finetuning.task_model import TaskModel
from train.finetuning.tasks import Task
from train.run import metrics

# From a batch: the outputs, the summed loss and the number of items in it.
EvalStep = Callable[[Batch], tuple[Any, Any, Any]]


def evaluate(
  model: TaskModel, evaluated: list[Any], batch: int, eval_step: EvalStep
) -> dict[str, float]:
  """The loss and scores of each split.

  Args:
    model: the model.
    evaluated: the splits, tokenized by the model.
    batch: rows in a batch.
    eval_step: evaluates a batch.

  Returns:
    The values by name; those of the second and later splits have the split's
    name as a prefix.
  """
  values: dict[str, float] = {}
  for number, tokenized in enumerate(evaluated):
    prefix = f"{tokenized.split.name}_" if number else ""
    for name, value in _split(model, tokenized, batch, eval_step).items():
      values[prefix + name] = value
  return values


def _split(
  model: TaskModel, tokenized: Any, batch: int, eval_step: EvalStep
) -> dict[str, float]:
  outputs: dict[int, Any] = {}
  total = count = 0.0
  collate = lambda rows, size: model.collate(tokenized, rows, size)
  for rows, made in longest_first(tokenized.lengths, collate, batch):
    output, loss, items = eval_step(made)
    total, count = total + float(loss), count + float(items)
    for index, row in enumerate(rows):
      outputs[int(row)] = jax.tree.map(
        lambda x, i=index: np.asarray(x[i]), output
      )
  loss = total / max(count, 1.0)
  values = {"held_out_loss": loss}
  task: Task = model.task
  if task.kind == "chat":
    return values | {"held_out_perplexity": math.exp(min(loss, 700))}
  predictions = model.predict(tokenized, outputs)
  labels = tokenized.split.labels
  if task.kind == "span":
    return values | spans.score(predictions, labels)
  return values | scores.score(task.metrics, predictions, np.asarray(labels))


def objective(task: Task, values: dict[str, float]) -> float:
  """The number by which runs of a task are compared; lower is better."""
  if task.kind == "chat":
    return values["held_out_loss"]
  return -values[task.metrics[0]]


def final_scores(out: pathlib.Path, last_step: int) -> dict[str, float]:
  """The scores of a complete run, from its log.

  Args:
    out: the run's folder.
    last_step: the run's last step.

  Raises:
    Diverged: the loss was not finite at that step. Scores can be finite
      nevertheless.
    UserError: the log does not reach that step.
  """
  loss = "held_out_loss"
  records = metrics.read(out / metrics.FILE)
  if not any(r["step"] == last_step for r in records):
    raise UserError(
      f"{out / metrics.FILE} has no record of step {last_step}, the last of the"
      f" run; the scores of the run are lost, and {out / 'result.json'} is left"
      " as it is. --overwrite trains again"
    )
  # The log leaves out numbers that are not finite.
  records = [r for r in records if math.isfinite(r.get(loss, math.nan))]
  if not records or records[-1]["step"] != last_step:
    raise Diverged(
      f"the held-out loss is not finite after step {last_step};"
      f" {out / metrics.FILE} has the finite values. Try a smaller"
      " optimizer.learning_rate"
    )
  return {name: value for name, value in records[-1].items() if name != "step"}


def describe(values: dict[str, float]) -> str:
  """The scores in one line."""
  return ", ".join(
    f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items()
  )
