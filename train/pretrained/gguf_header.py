"""Checks that the header of a GGUF file describes a file of its size.

The package `gguf` believes the counts and lengths in a header. It would go
through an array of 2^60 items, or tensors of names that the file does not
have, until the memory is full.
"""

import mmap
import pathlib
import struct
from typing import Any, NoReturn

from train.common import inputs
from train.common.errors import UserError

STRING, ARRAY = 8, 9
# Bytes of the other types of values, by their numbers in the file.
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
DEEPEST = 4  # arrays within arrays
MAX_DIMENSIONS = 8
MAX_NAME = 65_535  # bytes of a key or of a tensor's name
# Items of all arrays: the package makes an object of each. A vocabulary of
# 256,000 tokens, with scores, types and merges, has a million.
MAX_ITEMS = 5_000_000


class Header:
  """Walks through a header, and refuses what does not fit into the file."""

  def __init__(self, content: Any, source: str):
    self._content, self._source = content, source
    self._at, self._order = 4, "<"
    self._items = 0  # of the arrays so far

  def refuse(self, what: str) -> NoReturn:
    """Raises for a file that cannot be what its header says."""
    raise UserError(f"{self._source} cannot be read as GGUF ({what})")

  def skip(self, count: int) -> None:
    """Goes past some bytes."""
    if count > len(self._content) - self._at:
      self.refuse("it is damaged: its header does not fit into the file")
    self._at += count

  def number(self, width: int) -> int:
    """The next whole number, of 4 or 8 bytes."""
    start = self._at
    self.skip(width)
    code = f"{self._order}{'I' if width == 4 else 'Q'}"
    return struct.unpack_from(code, self._content, start)[0]

  def string(self, longest: int) -> None:
    """Goes past a string."""
    length = self.number(8)
    if length > longest:
      self.refuse(f"it is damaged: a text of {length:,} bytes")
    self.skip(length)

  def value(self, kind: int, depth: int = 0) -> None:
    """Goes past a value."""
    if kind == STRING:
      self.string(len(self._content))
    elif kind == ARRAY:
      self._array(depth)
    elif kind in WIDTHS:
      self.skip(WIDTHS[kind])
    else:
      self.refuse(f"it is damaged: a value of type {kind}")

  def _array(self, depth: int) -> None:
    kind, count = self.number(4), self.number(8)
    self._items += count
    if self._items > MAX_ITEMS:
      self.refuse(f"its arrays have more than {MAX_ITEMS:,} items")
    if kind in WIDTHS:
      self.skip(WIDTHS[kind] * count)
      return
    if depth == DEEPEST:
      self.refuse("it is damaged: arrays within arrays")
    for _ in range(count):  # each takes bytes of the file
      self.value(kind, depth + 1)

  def walk(self) -> None:
    """Goes past the whole header."""
    version = self.number(4)
    if version & 65535 == 0:  # written on a machine of the other byte order
      self._order = ">"
    tensors, fields = self.number(8), self.number(8)
    for _ in range(fields):
      self.string(MAX_NAME)
      self.value(self.number(4))
    for _ in range(tensors):
      self._tensor()

  def _tensor(self) -> None:
    self.string(MAX_NAME)
    dimensions = self.number(4)
    if dimensions > MAX_DIMENSIONS:
      self.refuse(f"it is damaged: a tensor of {dimensions:,} dimensions")
    elements = 1
    for _ in range(dimensions):
      elements *= self.number(8)
    # The smallest type takes an eighth of a byte for an element.
    if elements > 8 * len(self._content):
      self.refuse("it is damaged: a tensor is larger than the file")
    self.skip(4 + 8)  # its type and its position


def check(path: pathlib.Path) -> None:
  """Raises unless the header of a GGUF file fits into the file.

  Raises:
    UserError: the file cannot be read, or its header is damaged.
  """
  if not path.is_file():
    found = "is a folder" if path.is_dir() else "is no file"
    raise UserError(f"{path} cannot be read as GGUF (it {found})")
  with inputs.refusing(f"{path} cannot be read as GGUF"), path.open("rb") as f:
    if f.read(4) != b"GGUF":
      raise UserError(f"{path} cannot be read as GGUF (it is another format)")
    with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
      Header(content, str(path)).walk()
