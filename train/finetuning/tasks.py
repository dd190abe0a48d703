"""What can be fine-tuned on: the tasks, their columns, labels and metrics.

The table is that of the sets as they lie on the hub; a local file that has
the same columns serves in their place. The tasks `classify`, `regress`,
`span` and `chat` are for files of one's own, whose columns are named in the
config.
"""

import dataclasses
from typing import Literal

from train.common.errors import UserError

# classify: one of several labels; regress: a number; span: a part of the
# second text answers the first; chat: what the assistant says.
Kind = Literal["classify", "regress", "span", "chat"]
PACKAGE = "package:"  # what the path of a set in an installed package starts by


@dataclasses.dataclass(frozen=True)
class Task:
  """A task: where its examples are, and how answers are scored."""

  name: str
  kind: Kind
  first: str  # column of the text, or of the question, or of the messages
  second: str = ""  # column of the second text; "": there is none
  label: str = "label"  # column of what is to be found
  labels: tuple[str, ...] = ()  # classes; a number in the column counts them
  metrics: tuple[str, ...] = ()  # the first is the one that is compared
  path: str = ""  # where the examples are; "": only where data.path says
  validation: tuple[str, ...] = ("validation",)  # splits that are evaluated
  unanswerable: bool = False  # a span may be missing: the answer is "none"

  def named(
    self, first: str, second: str, label: str, labels: tuple[str, ...]
  ) -> "Task":
    """The same task on other columns; empty names stay as they are."""
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


SPEECH = ("held_out_perplexity",)  # of what the assistant says
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
  Task("chat", "chat", "messages", label="", metrics=SPEECH),
  Task(
    "fiqa",
    "chat",
    "question",
    "answer",
    label="",
    metrics=SPEECH,
    path=f"{PACKAGE}fiqa",
  ),
)
TASKS = {task.name: task for task in (*GLUE, *OTHERS)}


def find(name: str) -> Task:
  """The task of a name.

  Raises:
    UserError: there is none.
  """
  if name not in TASKS:
    raise UserError(
      f"--task {name!r} is unknown; the tasks are {', '.join(TASKS)}"
    )
  return TASKS[name]
