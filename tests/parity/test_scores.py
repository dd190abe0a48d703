"""The scores of tasks equal those of torchmetrics on fixed answers."""

import importlib.util
import json

import pytest

from tests.parity import scores_run
from train.finetuning import scores, spans
from train.finetuning.labels import Span


@pytest.fixture(scope="module")
def ours():
  x = scores_run.numbers()
  names = ("accuracy", "f1", "matthews")
  found = scores.score(names, x["found"], x["right"])
  found |= scores.score(["macro_f1"], x["guessed"], x["three"])
  found |= scores.score(["pearson", "spearman"], x["near"], x["score"])
  answers = [Span(tuple(rights), (0,) * 2) for _, rights in scores_run.ANSWERS]
  texts = [text for text, _ in scores_run.ANSWERS]
  squad = spans.score(texts, answers)
  return found | {f"squad_{name}": value for name, value in squad.items()}


def test_scores_equal_the_recorded_ones(ours):
  recorded = json.loads(scores_run.RECORD.read_text())
  assert ours == pytest.approx(recorded, abs=1e-6)
  assert 0.2 < ours["squad_exact_match"] < ours["squad_f1"] < 1


@pytest.mark.skipif(
  importlib.util.find_spec("torchmetrics") is None,
  reason="torchmetrics is not installed; compared with its record only",
)
def test_live_scores_equal_the_recorded_ones():
  recorded = json.loads(scores_run.RECORD.read_text())
  assert scores_run.run() == pytest.approx(recorded, abs=1e-6)
