"""The batches for training: their order, their parts, their lengths."""

import itertools

import numpy as np
import pytest

from train.finetuning import (
  batches,
)


def make_batches(group):
  lengths = np.random.default_rng(0).integers(4, 60, 301)
  collate = lambda rows, size: {"rows": np.asarray(rows)}
  return batches.TrainBatches(lengths, collate, 8, group)


@pytest.mark.parametrize("group", [True, False])
def test_an_epoch_contains_each_row_once_and_continues_anywhere(group):
  source = make_batches(group)
  start = source.iterate({"batches": 0}, 3, 0, 1)
  whole = [b["rows"] for b, _ in itertools.islice(start, 80)]
  first = np.concatenate(whole[: source.per_epoch])
  assert len(set(first)) == len(first) == 37 * 8
  assert not np.array_equal(first, np.concatenate(whole[37:74]))
  rest = source.iterate({"batches": 41}, 3, 0, 1)
  found = [b["rows"] for b, _ in itertools.islice(rest, 39)]
  np.testing.assert_array_equal(found, whole[41:])
  parts = [source.iterate({"batches": 41}, 3, i, 2) for i in range(2)]
  halves = [next(part)[0]["rows"] for part in parts]
  np.testing.assert_array_equal(np.concatenate(halves), whole[41])


def test_rows_of_similar_length_share_a_batch():
  ranges = [
    np.ptp(
      make_batches(group).lengths[make_batches(group).rows_of_epoch(0, 0)],
      axis=1,
    )
    for group in (True, False)
  ]
  assert ranges[0].mean() < ranges[1].mean() / 5
