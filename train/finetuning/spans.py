"""Answers that are spans of a context: targets, decoding, SQuAD's scores.

Scores follow SQuAD 2.0: answers are compared without case, punctuation,
articles and extra white space, and the best match among the accepted answers
counts. Accepted answers that are empty after this are ignored. If a question
has no answer, the empty text is right.
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


def normalize(text: str) -> str:
  """Lower case, no punctuation, no articles, single spaces."""
  text = text.lower().translate(PUNCTUATION)
  return " ".join(ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, label: str) -> float:
  """1 if the two texts are equal after normalization, else 0."""
  return float(normalize(prediction) == normalize(label))


def word_f1(prediction: str, label: str) -> float:
  """F1 of the words that the two texts share, after normalization."""
  a, b = normalize(prediction).split(), normalize(label).split()
  if not a or not b:
    return float(a == b)
  shared = sum((collections.Counter(a) & collections.Counter(b)).values())
  if not shared:
    return 0.0
  precision, recall = shared / len(a), shared / len(b)
  return 2 * precision * recall / (precision + recall)


def score(
  predictions: Sequence[str], labels: Sequence[Span]
) -> dict[str, float]:
  """`f1` and `exact_match`, as fractions.

  If some questions have an answer and some have none, the scores of the two
  groups are also given separately.

  Args:
    predictions: the predicted answer to each question; "" for no answer.
    labels: the accepted answers to each question.
  """
  accepted = [tuple(filter(normalize, s.texts)) or ("",) for s in labels]
  pairs = list(zip(predictions, accepted, strict=True))
  f1 = np.array([max(word_f1(x, y) for y in texts) for x, texts in pairs])
  em = np.array([max(exact_match(x, y) for y in texts) for x, texts in pairs])
  values = {"f1": float(f1.mean()), "exact_match": float(em.mean())}
  has_answer = np.array([bool(span.texts) for span in labels])
  if not has_answer.all() and has_answer.any():
    values["has_answer_f1"] = float(f1[has_answer].mean())
    values["has_answer_exact_match"] = float(em[has_answer].mean())
    values["no_answer_accuracy"] = float(em[~has_answer].mean())
  return values


def targets(
  windows: Sequence[Window], labels: Sequence[Span]
) -> dict[str, np.ndarray]:
  """The first and last token of the answer in each window.

  Both are token 0, which means no answer, if the window does not contain the
  whole answer.
  """
  start = np.zeros(len(windows), np.int32)
  end = np.zeros(len(windows), np.int32)
  for i, window in enumerate(windows):
    span = labels[window.example]
    if span.texts:
      text = span.texts[0]
      # Tokens do not contain white space at the ends of an answer.
      first = span.starts[0] + len(text) - len(text.lstrip())
      last = span.starts[0] + len(text.rstrip())
      start[i], end[i] = _tokens(window, first, last)
  return {"start": start, "end": end}


def _tokens(window: Window, first: int, last: int) -> tuple[int, int]:
  """The first and last token of the characters `first` to `last`."""
  begins, ends = window.offsets[:, 0], window.offsets[:, 1]
  inside = np.flatnonzero(begins >= 0)
  if not len(inside):
    return 0, 0
  if begins[inside[0]] > first or ends[inside[-1]] < last:
    return 0, 0
  # All tokens that overlap: one character may consist of several tokens.
  overlap = inside[(ends[inside] > first) & (begins[inside] < last)]
  return (int(overlap[0]), int(overlap[-1])) if len(overlap) else (0, 0)


def decode(
  windows: Sequence[Window],
  logits: Sequence[tuple[np.ndarray, np.ndarray]],
  split: Split,
  config: TaskConfig,
  task: Task,
) -> list[str]:
  """The best answer to each question over all windows of its context.

  Args:
    windows: the windows of all questions.
    logits: for each window, the logits of the answer's first and last token.
    split: the questions and contexts.
    config: the number of candidates, the maximum length of an answer, and the
      margin by which "no answer" must win.
    task: the task, which says whether a question may have no answer.

  Returns:
    For each question a part of its context, or "" for no answer.
  """
  best = [(-np.inf, "")] * len(split)
  null = [np.inf] * len(split)
  assert split.second is not None
  for window, (start, end) in zip(windows, logits, strict=True):
    i = window.example
    # The lowest score of "no answer" counts: that window may have the answer.
    null[i] = min(null[i], float(start[0] + end[0]))
    value, characters = _best_span(window, start, end, config)
    if value > best[i][0]:
      best[i] = (value, split.second[i][characters])
  return [
    ""
    if task.unanswerable and null[i] - best[i][0] > config.null_threshold
    else best[i][1]
    for i in range(len(split))
  ]


def _best_span(
  window: Window, start: np.ndarray, end: np.ndarray, config: TaskConfig
) -> tuple[float, slice]:
  """The score of the best span of a window, and its characters."""
  size = len(window.ids)
  inside = window.offsets[:, 0] >= 0
  firsts = _largest(np.where(inside, start[:size], -np.inf), config.n_best)
  lasts = _largest(np.where(inside, end[:size], -np.inf), config.n_best)
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


def _largest(values: np.ndarray, count: int) -> np.ndarray:
  """Indices of the largest finite values, in descending order."""
  indices = np.argsort(-values, kind="stable")[:count]
  return indices[np.isfinite(values[indices])]
