"""The digits and the speeches, in three parts."""

import numpy as np
import pytest

from train.architectures import digits, speeches


def test_the_digits_are_there_once():
  images, labels = digits.load()
  assert images.shape == (10_000, 28, 28)
  assert np.bincount(labels).min() > 800
  assert len(np.unique(images.reshape(10_000, -1), axis=0)) == 10_000


def test_the_parts_of_the_digits_have_no_image_in_common(monkeypatch):
  monkeypatch.setattr(digits, "SHIFT", 0)  # so that images can be recognized
  data = digits.prepare(100)
  batches = data.batches(0)
  seen = [next(batches)["image"] for _ in range(digits.SIZES[0] // 100)]
  parts = [
    {image.tobytes() for image in np.concatenate(part)}
    for part in (
      seen,
      [batch["image"] for batch in data.validation],
      [batch["image"] for batch in data.test],
    )
  ]
  assert tuple(map(len, parts)) == digits.SIZES
  assert len(set.union(*parts)) == sum(digits.SIZES)


def test_training_images_are_moved():
  data = digits.prepare(8)
  image = next(data.batches(0))["image"]
  again = next(data.batches(0))["image"]
  other = next(data.batches(1))["image"]
  np.testing.assert_array_equal(image, again)
  assert not np.array_equal(image, other)
  originals = {x.tobytes() for x in (digits.load()[0] / 255).astype(np.float32)}
  moved = [x[..., 0].tobytes() not in originals for x in image]
  assert sum(moved) > 0


def test_an_image_keeps_its_ink_when_moved():
  image = np.zeros((1, 28, 28), np.uint8)
  image[0, 10, 12] = 255
  places = set()
  rng = np.random.default_rng(0)
  for _ in range(300):
    (moved,) = digits._shifted(image, rng)
    assert moved.sum() == 255
    row, column = np.argwhere(moved)[0]
    places.add((int(row), int(column)))
  assert places == {(r, c) for r in range(8, 13) for c in range(10, 15)}


@pytest.mark.slow  # trains a tokenizer on a fresh machine
def test_the_parts_of_the_speeches():
  data = speeches.prepare(4, 16)
  batch = next(data.batches(0))["tokens"]
  assert batch.shape == (4, 17)
  assert 0 <= batch.min() <= batch.max() < speeches.VOCABULARY
  rows = lambda part: {x.tobytes() for b in part for x in b["tokens"]}
  assert len(rows(data.validation)) > 400
  assert not rows(data.validation) & rows(data.test)
