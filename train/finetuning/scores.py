"""The metrics of the tasks, by scikit-learn and SciPy.

All are fractions or correlations, never percentages. Each metric is computed
once, on all answers of a split: a metric that is added up over batches, or
over evaluations, is another number.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics


def accuracy(found: np.ndarray, right: np.ndarray) -> float:
  """Share of the answers that are right."""
  return float(metrics.accuracy_score(right, found))


def f1(found: np.ndarray, right: np.ndarray) -> float:
  """F1 of class 1; 0 where neither it was found nor was it there."""
  return float(metrics.f1_score(right, found, pos_label=1, zero_division=0))


def macro_f1(found: np.ndarray, right: np.ndarray) -> float:
  """Mean over the classes of their F1."""
  score = metrics.f1_score(right, found, average="macro", zero_division=0)
  return float(score)


def matthews(found: np.ndarray, right: np.ndarray) -> float:
  """Matthews' correlation; 0 where all answers are the same."""
  return float(metrics.matthews_corrcoef(right, found))


def pearson(found: np.ndarray, right: np.ndarray) -> float:
  """Linear correlation; 0 where one side is constant and it has no value."""
  return _correlation(stats.pearsonr, found, right)


def spearman(found: np.ndarray, right: np.ndarray) -> float:
  """Correlation of the ranks; 0 where one side is constant."""
  return _correlation(stats.spearmanr, found, right)


def _correlation(
  function: Callable[..., Any], found: np.ndarray, right: np.ndarray
) -> float:
  if len(found) < 2 or np.ptp(found) == 0 or np.ptp(right) == 0:
    return 0.0
  value = float(function(found, right).statistic)
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
  names: Sequence[str], found: np.ndarray, right: np.ndarray
) -> dict[str, float]:
  """The named metrics of answers.

  Args:
    names: keys of `METRICS`.
    found: (n,) classes or numbers that the model gave.
    right: (n,) those that the set gives.
  """
  return {name: METRICS[name](found, right) for name in names}
