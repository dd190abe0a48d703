"""Which documents are held out from training, and that none comes back.

A text may occur twice, so documents are told apart by what they say: one
whose text is also held out is not trained on.
"""

import hashlib
from collections.abc import Iterable
from typing import cast

import datasets

from train.common.errors import UserError


def digest(text: str) -> int:
  """A number of 64 bits for a text; white space around it does not count."""
  raw = text.strip().encode("utf-8", "surrogatepass")
  return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")


def chosen(text: str, every: int) -> bool:
  """Whether a streamed document is held out: by its text, one in `every`.

  Copies of a document fall on the same side, in whatever order and by
  however many processes the stream is read.
  """
  return digest(text) % every == 0


def split(
  documents: datasets.Dataset, every: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
  """Training and held-out documents: one in `every` is held out.

  They lie evenly over the file (over the years, in the bundled corpus) and
  start in the middle of the first group, so that neither end of the file is
  favoured.

  Raises:
    UserError: fewer documents than it takes to hold one out.
  """
  count = len(documents)
  held_out = range(every // 2, count, every)
  if count < 2:
    raise UserError(
      "the data is a single document: nothing can be held out from it; give"
      " more documents (a .txt file is cut at its blank lines, or as"
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
    UserError: there is none.
  """
  taken = {digest(text) for text in held_out}
  kept = [
    i for i, text in enumerate(documents["text"]) if digest(text) not in taken
  ]
  if not kept:
    raise UserError(
      f"{name}: every document to train on is also held out; give more texts"
    )
  if len(kept) == len(documents):
    return documents
  return cast(datasets.Dataset, documents.select(kept))
