"""The metrics of the tasks, by scikit-learn and SciPy.

All are fractions or correlations, never percentages. A metric is computed on
all predictions of a split at once: a mean over batches would be another
number.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Fraction of the predictions that are right."""
  return float(metrics.accuracy_score(labels, predictions))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
  """F1 of class 1; 0 if the class is neither predicted nor present."""
  return float(
    metrics.f1_score(labels, predictions, pos_label=1, zero_division=0)
  )


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Mean of the F1 of all classes."""
  score = metrics.f1_score(
    labels, predictions, average="macro", zero_division=0
  )
  return float(score)


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Matthews' correlation; 0 if all predictions are the same."""
  return float(metrics.matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Linear correlation; 0 if one side is constant, where it is undefined."""
  return _correlation(stats.pearsonr, predictions, labels)


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Correlation of the ranks; 0 if one side is constant."""
  return _correlation(stats.spearmanr, predictions, labels)


def _correlation(
  function: Callable[..., Any], predictions: np.ndarray, labels: np.ndarray
) -> float:
  if len(predictions) < 2 or not np.ptp(predictions) or not np.ptp(labels):
    return 0.0
  value = float(function(predictions, labels).statistic)
  return value if math.isfinite(value) else 0.0


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
  "accuracy": accuracy,
  "f1": f1,
  "macro_f1": macro_f1,
  "matthews": matthews,
  "pearson": pearson,
  "spearman": spearman,
}


def score(
  names: Sequence[str], predictions: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
  """The named metrics of a model's predictions.

  Args:
    names: keys of `METRICS`.
    predictions: (n,) predicted classes or numbers.
    labels: (n,) right classes or numbers.
  """
  return {name: METRICS[name](predictions, labels) for name in names}
