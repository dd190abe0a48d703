"""Answers that are parts of a context: targets, decoding and scores of SQuAD.

The score follows the definition of SQuAD 2.0's evaluation: answers are compared
without case, punctuation, articles and repeated white space, with the best of
the right answers counting, but for those of which nothing is left then; where
there is no answer, the empty text is right.
"""

import collections
import re
import string
from collections.abc import Sequence

import numpy as np

from train.finetuning.config import TaskConfig
from train.finetuning.examples import Split
from train.finetuning.labels import Span
from train.finetuning.tasks import Task
from train.pretrained.encoder_tokenizer import Window

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
  """Lower case, no punctuation, no articles, single spaces."""
  text = text.lower().translate(PUNCTUATION)
  return " ".join(ARTICLES.sub(" ", text).split())


def exact(found: str, right: str) -> float:
  """1 where the two are the same, else 0."""
  return float(normalise(found) == normalise(right))


def overlap(found: str, right: str) -> float:
  """F1 of the words that both have."""
  a, b = normalise(found).split(), normalise(right).split()
  if not a or not b:
    return float(a == b)
  shared = sum((collections.Counter(a) & collections.Counter(b)).values())
  if not shared:
    return 0.0
  precision, recall = shared / len(a), shared / len(b)
  return 2 * precision * recall / (precision + recall)


def score(found: Sequence[str], answers: Sequence[Span]) -> dict[str, float]:
  """`f1` and `exact_match` as fractions, and both of either kind of question.

  Args:
    found: the answer to each question; "" where there is none.
    answers: the right ones.
  """
  rights = [tuple(filter(normalise, span.texts)) or ("",) for span in answers]
  pairs = list(zip(found, rights, strict=True))
  f1 = np.array([max(overlap(x, y) for y in right) for x, right in pairs])
  em = np.array([max(exact(x, y) for y in right) for x, right in pairs])
  values = {"f1": float(f1.mean()), "exact_match": float(em.mean())}
  has = np.array([bool(span.texts) for span in answers])
  if not has.all() and has.any():
    values["has_answer_f1"] = float(f1[has].mean())
    values["has_answer_exact_match"] = float(em[has].mean())
    values["no_answer_accuracy"] = float(em[~has].mean())
  return values


def targets(
  windows: Sequence[Window], answers: Sequence[Span]
) -> dict[str, np.ndarray]:
  """First and last token of the answer in each window.

  A window that does not hold all of the answer points at its first token,
  which means that there is none.
  """
  start = np.zeros(len(windows), np.int32)
  end = np.zeros(len(windows), np.int32)
  for i, window in enumerate(windows):
    span = answers[window.example]
    if span.texts:
      text = span.texts[0]
      # White space at its ends is in no token of its own.
      first = span.starts[0] + len(text) - len(text.lstrip())
      last = span.starts[0] + len(text.rstrip())
      start[i], end[i] = _tokens(window, first, last)
  return {"start": start, "end": end}


def _tokens(window: Window, first: int, last: int) -> tuple[int, int]:
  """The tokens that hold the characters from `first` up to `last`."""
  begins, ends = window.offsets[:, 0], window.offsets[:, 1]
  inside = np.flatnonzero(begins >= 0)
  if not len(inside):
    return 0, 0
  if begins[inside[0]] > first or ends[inside[-1]] < last:
    return 0, 0
  # All tokens that touch them: a character may be made of several.
  touched = inside[(ends[inside] > first) & (begins[inside] < last)]
  return (int(touched[0]), int(touched[-1])) if len(touched) else (0, 0)


def decode(
  windows: Sequence[Window],
  logits: Sequence[tuple[np.ndarray, np.ndarray]],
  split: Split,
  config: TaskConfig,
  task: Task,
) -> list[str]:
  """The best answer to each question over all windows of its context.

  Args:
    windows: of all questions.
    logits: of the first and of the last token of the answer, for each window.
    split: the questions and contexts.
    config: how many candidates are tried, how long an answer may be, and by
      how much "no answer" must win.
    task: whether there need be an answer.

  Returns:
    For each question a part of its context; "" where there is none.
  """
  best = [(-np.inf, "")] * len(split)
  null = [np.inf] * len(split)
  assert split.second is not None
  for window, (start, end) in zip(windows, logits, strict=True):
    i = window.example
    # The least sure window decides about "no answer": another may hold it.
    null[i] = min(null[i], float(start[0] + end[0]))
    found, place = _best(window, start, end, config)
    if found > best[i][0]:
      best[i] = (found, split.second[i][place])
  return [
    ""
    if task.unanswerable and null[i] - best[i][0] > config.null_threshold
    else best[i][1]
    for i in range(len(split))
  ]


def _best(
  window: Window, start: np.ndarray, end: np.ndarray, config: TaskConfig
) -> tuple[float, slice]:
  """The score of the best span of a window and its characters."""
  size = len(window.ids)
  inside = window.offsets[:, 0] >= 0
  firsts = _top(np.where(inside, start[:size], -np.inf), config.n_best)
  lasts = _top(np.where(inside, end[:size], -np.inf), config.n_best)
  sums = start[firsts][:, None] + end[lasts]
  length = lasts - firsts[:, None] + 1
  allowed = (length >= 1) & (length <= config.answer)
  if not allowed.any():
    return -np.inf, slice(0, 0)
  sums = np.where(allowed, sums, -np.inf)
  a, b = np.unravel_index(sums.argmax(), sums.shape)
  characters = slice(
    int(window.offsets[firsts[a], 0]), int(window.offsets[lasts[b], 1])
  )
  return float(sums[a, b]), characters


def _top(values: np.ndarray, count: int) -> np.ndarray:
  """Places of the largest finite values, the largest first."""
  order = np.argsort(-values, kind="stable")[:count]
  return order[np.isfinite(values[order])]
