"""The config of a fine-tuning run: the fields all runs share, and a task."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from train.common.errors import UserError
from train.config import schema

TemplateName = Literal["chatml", "plain"]
USE_ACCUMULATE = "To use less memory in a step, set train.accumulate"


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """What is learned, and how its examples are read."""

  name: str = "rotten_tomatoes"  # what --task sets
  first: str = ""  # column of the text or question; "": the task's own
  second: str = ""  # column of the second text; "": the task's own
  label: str = ""  # column of the label or the answers; "": the task's own
  labels: str = ""  # classes in their order, with commas; "": the task's own
  epochs: float = 3.0  # passes over the examples; 0: train.steps says it
  evaluations: int = 1  # in an epoch
  group: bool = True  # whether texts of like length share a batch
  multiple: int = 32  # of tokens, to which a batch's longest row is rounded up
  # What an encoder's head reads; "": what it was trained with, or the first.
  pool: Literal["", "first", "mean"] = ""
  dropout: float = -1.0  # of an encoder, everywhere; -1: the checkpoint's
  # Weights that stay as they are and need no gradient nor state, as a regular
  # expression of their paths: ^embed/
  freeze: str = ""
  query: int = 64  # tokens of a question that are kept
  stride: int = 128  # tokens that neighbouring windows of a context share
  answer: int = 30  # tokens of an answer, at most
  n_best: int = 20  # beginnings and ends of answers that are tried
  null_threshold: float = 0.0  # by how much "no answer" must win
  # How a LLaMA is asked for a class: the texts for {first} and {second}.
  prompt: str = ""
  system: str = ""  # message that opens conversations that have none such
  export: bool = True  # write the trained model to the run's folder model/
  template: TemplateName = "chatml"  # how turns of a conversation are written

  def __post_init__(self):
    schema.check_above("task", self, ("epochs", "stride"), low=-1e-9)
    schema.check_above(
      "task", self, ("evaluations", "multiple", "query", "answer", "n_best")
    )
    if not (self.dropout == -1 or 0 <= self.dropout < 1):
      raise UserError(
        f"task.dropout must lie in [0, 1), or be -1, got {self.dropout}"
      )


@dataclasses.dataclass(frozen=True)
class Config(schema.SharedConfig):
  """A fine-tuning run."""

  HINTS: ClassVar[Mapping[str, str]] = {
    "model": "The checkpoint of --from decides the model's sizes",
    "data.tokenizer": "The tokenizer is that of the checkpoint of --from",
    "data.text_field": "A task's columns are named by task.first, task.second"
    " and task.label",
    "optimizer.accumulate": USE_ACCUMULATE,
    "train.layerwise": USE_ACCUMULATE,
  }

  task: TaskConfig = TaskConfig()
