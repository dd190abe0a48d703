"""Runs torchmetrics on fixed answers.

    python -m tests.parity.scores_run

records the scores in `scores.json`; the tests compare with this record.
Recording needs the extra `parity`; where it is installed, the tests also run
torchmetrics live.
"""

import json
import pathlib

import numpy as np

RECORD = pathlib.Path(__file__).with_name("scores.json")

# Predicted answers, each with all right answers. They differ in case,
# punctuation, articles, white space, order and number of words.
ANSWERS = [
  ("the Norman conquest", ["Norman conquest", "conquest"]),
  ("in  1066,", ["1066", "the year 1066"]),
  ("A cat, a dog.", ["cat dog", "the cat and the dog"]),
  ("dog cat", ["cat dog"]),
  ("very very very old", ["very old", "old very"]),
  ("Paris", ["London", "Rome"]),
  ("U.S.A.", ["USA", "US"]),
  ("an answer the size of a house", ["house", "size of house"]),
  ("10th and 11th centuries", ["in the 10th and 11th centuries"]),
  ("naïve Bayes", ["naive Bayes", "Naïve  bayes"]),
  ("the", ["a"]),
]


def numbers() -> dict[str, np.ndarray]:
  """Classes and numbers, right ones and predicted ones."""
  rng = np.random.default_rng(0)
  right = rng.integers(0, 2, 200)
  found = np.where(rng.random(200) < 0.75, right, 1 - right)
  three = rng.integers(0, 3, 200)
  guessed = np.where(rng.random(200) < 0.6, three, rng.integers(0, 3, 200))
  score = np.round(rng.uniform(0, 5, 200), 1)  # with ties, as in STS-B
  near = score + rng.normal(size=200)
  return {
    "right": right,
    "found": found,
    "three": three,
    "guessed": guessed,
    "score": score,
    "near": near,
  }


def run() -> dict[str, float]:
  """The scores by torchmetrics, as fractions."""
  import torch
  from torchmetrics import functional
  from torchmetrics.functional.text import squad

  x = {name: torch.tensor(values) for name, values in numbers().items()}
  predictions = [
    {"id": str(i), "prediction_text": found}
    for i, (found, _) in enumerate(ANSWERS)
  ]
  targets = [
    {"id": str(i), "answers": {"text": rights, "answer_start": [0] * 2}}
    for i, (_, rights) in enumerate(ANSWERS)
  ]
  spans = squad(predictions, targets)
  binary, three = {"task": "binary"}, {"task": "multiclass", "num_classes": 3}
  found = {
    "accuracy": functional.accuracy(x["found"], x["right"], **binary),
    "f1": functional.f1_score(x["found"], x["right"], **binary),
    "matthews": functional.matthews_corrcoef(x["found"], x["right"], **binary),
    "macro_f1": functional.f1_score(
      x["guessed"], x["three"], average="macro", **three
    ),
    "pearson": functional.pearson_corrcoef(x["near"], x["score"]),
    "spearman": functional.spearman_corrcoef(x["near"], x["score"]),
    "squad_f1": spans["f1"] / 100,
    "squad_exact_match": spans["exact_match"] / 100,
  }
  return {name: float(value) for name, value in found.items()}


if __name__ == "__main__":
  RECORD.write_text(json.dumps(run(), indent=2) + "\n")
