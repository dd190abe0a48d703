"""The bundled State of the Union speeches as rows of tokens, in three parts."""

import functools
from collections.abc import Iterator
from typing import cast

import numpy as np

from train.architectures.trainer import Batch, Data
from train.config.schema import DataConfig
from train.data import corpus, packing
from train.experiments import texts

VOCABULARY = 512
EVALUATED = 32  # rows in a batch of validation or test
VALIDATION_ROWS = 512
TEST_ROWS = 1024


@functools.lru_cache(maxsize=4)
def prepare(batch: int, length: int) -> Data:
  """Batches of `tokens` (n, length + 1), int32 below `VOCABULARY`.

  Args:
    batch: Rows in a training batch.
    length: Number of tokens that a row predicts.
  """
  parts = texts.prepare("speeches", corpus.cache_folder(DataConfig()))
  config = {"path": str(parts.train), "length": length, "batch": batch}
  validation = corpus.prepare(
    DataConfig(**config, validation=str(parts.validation), eval_rows=10**9),
    VOCABULARY,
  )
  test = corpus.prepare(
    DataConfig(**config, validation=str(parts.test), eval_rows=10**9),
    VOCABULARY,
  )
  rows = cast(packing.Rows, validation.feed).rows

  def batches(seed: int) -> Iterator[Batch]:
    rng = np.random.default_rng(seed)
    while True:
      order = rng.permutation(len(rows))
      for start in range(0, len(order) - batch + 1, batch):
        yield {"tokens": rows[order[start : start + batch]]}

  return Data(
    batches,
    _evaluated(validation.held_out, VALIDATION_ROWS),
    _evaluated(test.held_out, TEST_ROWS),
  )


def _evaluated(rows: np.ndarray, limit: int) -> list[Batch]:
  """Evenly spaced rows in batches of one size."""
  rows = rows[packing.evenly(len(rows), limit)]
  count = len(rows) // EVALUATED
  return [
    {"tokens": part} for part in np.split(rows[: count * EVALUATED], count)
  ]
