"""The tasks for fine-tuning: their columns, labels and metrics.

Columns are those of the data sets on the hub; local files with the same
columns work as well. The tasks `classify`, `regress`, `span` and `chat` are
for your own files, whose columns you name in the config.
"""

import dataclasses
from typing import Literal

from train.common.errors import UserError

# What is predicted. classify: one of several labels; regress: a number; span:
# the part of the second text that answers the first; chat: the replies.
Kind = Literal["classify", "regress", "span", "chat"]
PACKAGE = "package:"  # prefix of a data.path in an installed package


@dataclasses.dataclass(frozen=True)
class Task:
  """A task: where its examples are, and how predictions are scored."""

  name: str
  kind: Kind
  first: str  # column of the text, the question or the messages
  second: str = ""  # column of the second text; "": there is none
  label: str = "label"  # column of the label
  labels: tuple[str, ...] = ()  # classes, by the indices in that column
  metrics: tuple[str, ...] = ()  # runs are compared by the first
  path: str = ""  # where the examples are; "": data.path must say it
  validation: tuple[str, ...] = ("validation",)  # splits that are evaluated
  unanswerable: bool = False  # whether a question may have no answer

  def with_columns(
    self, first: str, second: str, label: str, labels: tuple[str, ...]
  ) -> "Task":
    """The task with other columns and classes; empty arguments change none."""
    return dataclasses.replace(
      self,
      first=first or self.first,
      second=second or self.second,
      label=label or self.label,
      labels=labels or self.labels,
    )


def _glue(
  name: str,
  columns: tuple[str, ...],
  labels: tuple[str, ...],
  metrics: tuple[str, ...] = ("accuracy",),
  validation: tuple[str, ...] = ("validation",),
) -> Task:
  first, second = (*columns, "")[:2]
  kind: Kind = "classify" if labels else "regress"
  return Task(
    name,
    kind,
    first,
    second,
    labels=labels,
    metrics=metrics,
    path=f"hub:nyu-mll/glue:{name}",
    validation=validation,
  )


PAIR = ("sentence1", "sentence2")
ENTAILED = ("entailment", "not_entailment")

GLUE = (
  _glue("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
  _glue("stsb", PAIR, (), ("pearson", "spearman")),
  _glue("mrpc", PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
  _glue("rte", PAIR, ENTAILED),
  _glue("sst2", ("sentence",), ("negative", "positive")),
  _glue(
    "mnli",
    ("premise", "hypothesis"),
    ("entailment", "neutral", "contradiction"),
    validation=("validation_matched", "validation_mismatched"),
  ),
  _glue("qnli", ("question", "sentence"), ENTAILED),
  _glue(
    "qqp",
    ("question1", "question2"),
    ("not_duplicate", "duplicate"),
    ("accuracy", "f1"),
  ),
)


def _span(name: str, path: str, unanswerable: bool) -> Task:
  return Task(
    name,
    "span",
    "question",
    "context",
    "answers",
    metrics=("f1", "exact_match"),
    path=path,
    unanswerable=unanswerable,
  )


CHAT_METRICS = ("held_out_perplexity",)  # of the assistant's messages
OTHERS = (
  _span("squad", "hub:rajpurkar/squad", unanswerable=False),
  _span("squad_v2", "hub:rajpurkar/squad_v2", unanswerable=True),
  Task(
    "rotten_tomatoes",
    "classify",
    "text",
    labels=("neg", "pos"),
    metrics=("accuracy",),
    path=f"{PACKAGE}rotten_tomatoes",
  ),
  Task(
    "imdb",
    "classify",
    "text",
    labels=("neg", "pos"),
    metrics=("accuracy",),
    path=f"{PACKAGE}imdb",
  ),
  Task(
    "boolq",
    "classify",
    "question",
    "passage",
    label="answer",
    labels=("false", "true"),
    metrics=("accuracy", "f1"),
    path=f"{PACKAGE}boolq",
  ),
  _span("disflqa", f"{PACKAGE}disflqa", unanswerable=True),
  Task("classify", "classify", "text", metrics=("accuracy", "macro_f1")),
  Task("regress", "regress", "text", metrics=("pearson", "spearman")),
  _span("span", "", unanswerable=True),
  Task("chat", "chat", "messages", label="", metrics=CHAT_METRICS),
  Task(
    "fiqa",
    "chat",
    "question",
    "answer",
    label="",
    metrics=CHAT_METRICS,
    path=f"{PACKAGE}fiqa",
  ),
)
TASKS = {task.name: task for task in (*GLUE, *OTHERS)}


def find(name: str) -> Task:
  """The task with a name, or raises a `UserError` that lists all."""
  if name not in TASKS:
    raise UserError(
      f"--task {name!r} is unknown; the tasks are {', '.join(TASKS)}"
    )
  return TASKS[name]
