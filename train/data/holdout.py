"""Holds documents out from training.

A text may have several copies of a document. Documents are therefore compared
by their text: none is trained on whose text is also held out.
"""

import hashlib
from collections.abc import Iterable
from typing import cast

import datasets

from train.common.errors import UserError


def digest(text: str) -> int:
  """A 64-bit hash of a text; white space at its ends is ignored."""
  raw = text.strip().encode("utf-8", "surrogatepass")
  return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")


def is_held_out(text: str, every: int) -> bool:
  """Whether a streamed document is held out: one in `every`, by its hash.

  The answer is the same for all copies of a document, in any order of reading
  and for any number of processes.
  """
  return digest(text) % every == 0


def split(
  documents: datasets.Dataset, every: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
  """Training and held-out documents: one in `every` is held out.

  Held-out documents are evenly spaced over the file (over the years, in the
  bundled corpus), and the first is in the middle of the first group, so that
  neither end of the file is favoured.

  Raises:
    UserError: there are too few documents to hold one out.
  """
  count = len(documents)
  held_out = range(every // 2, count, every)
  if count < 2:
    raise UserError(
      "the data is a single document, and none can be held out; use more"
      " documents (a .txt file is split at its blank lines, or as"
      " data.documents says)"
    )
  if not held_out:
    raise UserError(
      f"data.holdout_every is {every}, but there are only {count} documents:"
      f" none would be held out; use {2 * count - 1} or less"
    )
  rest = [i for i in range(count) if i % every != every // 2]
  return (
    cast(datasets.Dataset, documents.select(rest)),
    cast(datasets.Dataset, documents.select(held_out)),
  )


def without(
  documents: datasets.Dataset, held_out: Iterable[str], name: str
) -> datasets.Dataset:
  """The documents whose text is not held out.

  Raises:
    UserError: there are none.
  """
  digests = {digest(text) for text in held_out}
  indices = [
    i for i, text in enumerate(documents["text"]) if digest(text) not in digests
  ]
  if not indices:
    raise UserError(
      f"{name}: every document to train on is also held out; use more text"
    )
  if len(indices) == len(documents):
    return documents
  return cast(datasets.Dataset, documents.select(indices))
