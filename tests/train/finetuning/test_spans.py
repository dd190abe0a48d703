"""Spans: targets, decoding and scores."""

import numpy as np
import pytest

from tests.train.finetuning import files
from train.finetuning import config as config_lib
from train.finetuning import examples as examples_lib
from train.finetuning import labels as labels_lib
from train.finetuning import (
  spans,
)
from train.finetuning.tasks import TASKS
from train.models import encoder
from train.pretrained import encoder_checkpoint, encoder_tokenizer


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
  """Windows of questions on long contexts, and their split."""
  folder = tmp_path_factory.mktemp("spans")
  size = files.encoder_files.write_bert(folder)
  config = encoder.Config(size, 16, 24, 1, 2, max_length=32)
  words = encoder_tokenizer.load(folder, config)
  rows = files.squad_rows(9, unanswerable=True)
  right = [
    labels_lib.Span(
      tuple(row["answers"]["text"]), tuple(row["answers"]["answer_start"])
    )
    for row in rows
  ]
  first = [row["question"] for row in rows]
  second = [row["context"] for row in rows]
  split = examples_lib.Split("validation", first, second, right)
  return words.windows(first, second, 32, 8, 8), split


def test_targets_are_the_tokens_of_the_answer(windows):
  found, split = windows
  targets = spans.targets(found, split.labels)
  answered = set()
  for i, window in enumerate(found):
    a, b = targets["start"][i], targets["end"][i]
    if (a, b) == (0, 0):
      continue
    begin, end = window.offsets[a, 0], window.offsets[b, 1]
    right = split.labels[window.example].texts[0]
    assert split.second[window.example][begin:end] == right
    answered.add(window.example)
  assert answered == {i for i, x in enumerate(split.labels) if x.texts}


TASK = config_lib.TaskConfig(answer=5, n_best=40, query=8, stride=8)


def brute_force(found, logits, split, unanswerable):
  """Every span of every window, by the definition."""
  best = {i: (-np.inf, "") for i in range(len(split))}
  null = dict.fromkeys(range(len(split)), np.inf)
  for window, (start, end) in zip(found, logits, strict=True):
    i = window.example
    null[i] = min(null[i], start[0] + end[0])
    for a in np.flatnonzero(window.offsets[:, 0] >= 0):
      for b in range(a, min(a + TASK.answer, len(window.ids))):
        if window.offsets[b, 0] < 0:
          continue
        text = split.second[i][window.offsets[a, 0] : window.offsets[b, 1]]
        best[i] = max(best[i], (start[a] + end[b], text))
  return [
    "" if unanswerable and null[i] > best[i][0] else best[i][1]
    for i in range(len(split))
  ]


@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_decoding_finds_the_best_span_of_all_windows(windows, name):
  found, split = windows
  rng = np.random.default_rng(0)
  logits = [tuple(rng.normal(size=(2, 32)) + 0.3) for _ in found]
  for start, end in logits:
    start[0] += 1.5
    end[0] += 1.5
  ours = spans.decode(found, logits, split, TASK, TASKS[name])
  assert ours == brute_force(found, logits, split, name == "squad_v2")
  assert ("" in ours) == (name == "squad_v2")
  assert any(ours)


def test_right_logits_decode_to_the_right_answers(windows):
  found, split = windows
  targets = spans.targets(found, split.labels)
  logits = [
    tuple(10.0 * np.eye(32)[targets[name][i]] for name in ("start", "end"))
    for i in range(len(found))
  ]
  # A window without the answer points at its first token; it must not win
  # over one that has it.
  decoded = spans.decode(found, logits, split, TASK, TASKS["squad_v2"])
  values = spans.score(decoded, split.labels)
  assert values["f1"] == values["exact_match"] == 1
  assert values["no_answer_accuracy"] == 1


@pytest.mark.parametrize(
  ("found", "gold", "right"),
  [
    ("", ("the", "the Beatles"), 0.0),  # "the" is empty after normalization
    ("Beatles", ("the", "the Beatles"), 1.0),
    ("", ("the",), 1.0),
    ("", (), 1.0),
    ("the", (), 1.0),
    ("Beatles", (), 0.0),
  ],
)
def test_answers_that_are_empty_after_normalization_are_ignored(
  found, gold, right
):
  """As in the evaluation of SQuAD 2.0."""
  values = spans.score([found], [labels_lib.Span(gold, (0,) * len(gold))])
  assert values["f1"] == values["exact_match"] == right


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(
  ("context", "answer", "wanted"),
  [
    ("peace and people", " and", "and"),
    ("peace and people", "and ", "and"),
    ("peace and people ", "people ", "people"),
    (" peace and", " peace", "peace"),
    ("peace 中 people", "中", "中"),
    ("(peace), people", "peace", "peace"),  # between characters that touch it
  ],
)
def test_targets_are_the_smallest_whole_tokens(
  family, context, answer, wanted, tmp_path
):
  """With white space around the answer, and letters of several bytes."""
  write = getattr(files, f"write_{family}")
  words = encoder_checkpoint.load(
    write(tmp_path / "out"), head="spans"
  ).tokenizer
  found = words.windows(["who"], [context], 32, 8, 8)
  span = labels_lib.Span((answer,), (context.index(answer),))
  targets = spans.targets(found, [span])
  a, b = targets["start"][0], targets["end"][0]
  offsets = found[0].offsets
  assert a and context[offsets[a, 0] : offsets[b, 1]].strip() == wanted
