"""The bundled digits of train/data/digits, in three parts."""

import functools
import io
import lzma
import pathlib
from collections.abc import Iterator

import numpy as np

from train.architectures.trainer import Batch, Data

FILE = pathlib.Path(__file__).parents[1] / "data" / "digits" / "digits.npy.xz"
SIZES = (7000, 1500, 1500)  # training, validation, test
EVALUATED = 500  # images in a batch of validation or test
SHIFT = 2  # pixels by which training images are moved at most


@functools.cache
def load() -> tuple[np.ndarray, np.ndarray]:
  """All images (10000, 28, 28) and labels (10000,), shuffled, as bytes."""
  rows = np.load(io.BytesIO(lzma.decompress(FILE.read_bytes())))
  rows = rows[np.random.default_rng(0).permutation(len(rows))]
  return rows[:, 1:].reshape(-1, 28, 28), rows[:, 0]


def prepare(batch: int, length: int = 0) -> Data:
  """Batches of `image` (n, 28, 28, 1), float32 in [0, 1], and `label` (n,).

  Args:
    batch: Images in a training batch.
    length: Unused; texts have one.
  """
  del length
  images, labels = load()
  train, validation, _ = np.split(np.arange(len(images)), np.cumsum(SIZES)[:-1])
  test = np.arange(len(images) - SIZES[2], len(images))

  def batches(seed: int) -> Iterator[Batch]:
    rng = np.random.default_rng(seed)
    while True:
      order = rng.permutation(train)
      for start in range(0, len(order) - batch + 1, batch):
        chosen = order[start : start + batch]
        yield _batch(_shifted(images[chosen], rng), labels[chosen])

  def parts(indices: np.ndarray) -> list[Batch]:
    return [
      _batch(images[chosen], labels[chosen])
      for chosen in indices.reshape(-1, EVALUATED)
    ]

  return Data(batches, parts(validation), parts(test))


def _shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Moves each image by up to `SHIFT` pixels, with background at the edge."""
  size = images.shape[1]
  padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)))
  rows, columns = rng.integers(0, 2 * SHIFT + 1, (2, len(images), 1))
  axis = np.arange(size)
  return padded[
    np.arange(len(images))[:, None, None],
    (rows + axis)[:, :, None],
    (columns + axis)[:, None, :],
  ]


def _batch(images: np.ndarray, labels: np.ndarray) -> Batch:
  return {
    "image": images[..., None].astype(np.float32) / 255,
    "label": labels.astype(np.int32),
  }
