"""The config of a fine-tuning run: the fields all runs share, and a task."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from train.common.checks import check_above
from train.common.errors import UserError
from train.config import schema

TemplateName = Literal["chatml", "llama3", "plain", "own"]
USE_ACCUMULATE = "To use less memory in a step, set train.accumulate"


@dataclasses.dataclass(frozen=True)
class DataConfig(schema.SharedDataConfig):
  """Where the examples are, and how they are put into batches."""

  # file, folder or glob; hub:NAME or hub:NAME:SUBSET; package:NAME. "": the
  # task's own data.
  path: str = ""
  # splits or files to evaluate, with commas. "": the task's own; none: a part
  # of the training split is held out.
  validation: str = ""
  # how conversations share rows. packed: several in a row; padded: one a row.
  rows: Literal["packed", "padded"] = "packed"
  length: int = 128  # tokens of a row, at most
  holdout_every: int = 20  # hold out one example in so many, if none are named
  eval_rows: int = 10**9  # examples of each split to evaluate, at most
  cache: str = ""  # folder for memory-mapped files; "": ~/.cache/galore_optax


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """What is learned, and how its examples are read."""

  name: str = "rotten_tomatoes"  # the task; set by --task
  first: str = ""  # column of the text or question; "": the task's own
  second: str = ""  # column of the second text; "": the task's own
  label: str = ""  # column of the label or answers; "": the task's own
  labels: str = ""  # names of the classes, with commas; "": the task's own
  epochs: float = 3.0  # passes over the examples; 0: train.steps decides
  evaluations: int = 1  # number of evaluations in an epoch
  group: bool = True  # whether texts of similar length share a batch
  multiple: int = 32  # rows of a batch are padded to a multiple of this length
  # what an encoder's head reads: the first token, or the mean of all. "": as
  # the checkpoint was trained, or the first.
  pool: Literal["", "first", "mean"] = ""
  dropout: float = -1.0  # all dropout rates of an encoder; -1: the checkpoint's
  # regular expression of the paths of weights that stay frozen, which need no
  # gradient and no optimizer state, such as ^embed/
  freeze: str = ""
  query: int = 64  # tokens of a question, at most
  stride: int = 128  # tokens that successive windows of a context share
  answer: int = 30  # tokens of an answer, at most
  n_best: int = 20  # candidates for the start and for the end of an answer
  null_threshold: float = 0.0  # margin by which "no answer" must win
  # prompt with which a LLaMA classifies; it contains {first}, and {second} if
  # there is a second text.
  prompt: str = ""
  system: str = ""  # system message for conversations that have none
  export: bool = True  # write the trained model to the run's folder model/
  # how the messages of a chat are written; own: as by the checkpoint's own
  # chat_template
  template: TemplateName = "chatml"

  def __post_init__(self):
    check_above("task", self, ("epochs", "stride"), low=-1e-9)
    check_above(
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

  data: DataConfig = DataConfig()
  task: TaskConfig = TaskConfig()
