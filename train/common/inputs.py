"""Reads files that others may have written: bytes, text and JSON.

Whatever is wrong with a file ends in a `UserError` of one line that names it.
`train.common.fields` asks what is in a JSON object for its types.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from train.common.errors import UserError, first_line
from train.common.fields import Fields, shown


@contextlib.contextmanager
def refusing(message: str) -> Iterator[None]:
  """Turns whatever another library raises into one sentence.

  Libraries raise many types for a damaged file. Those written in Rust panic
  with a type that is no `Exception`. So nothing but calls of such libraries
  belongs in the `with` block.

  Args:
    message: what the sentence says before the reason.

  Raises:
    UserError: the block raised something.
  """
  try:
    yield
  except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
    raise
  except BaseException as error:
    raise UserError(f"{message} ({first_line(error)})") from error


def read_bytes(path: pathlib.Path) -> bytes:
  """The content of a regular file.

  Raises:
    UserError: it is missing, a folder or a pipe, or cannot be read.
  """
  check_regular(path)
  try:
    return path.read_bytes()
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror})") from None


def check_regular(path: pathlib.Path) -> None:
  """Raises unless `path` is a file; reading a pipe would wait forever."""
  if path.is_file():
    return
  found = (
    "is a folder" if path.is_dir() else "is missing, or not a regular file"
  )
  raise UserError(f"{path} cannot be read (it {found})")


def decode(content: bytes, source: str) -> str:
  """The UTF-8 text in some bytes.

  Raises:
    UserError: they are not UTF-8; the message says where.
  """
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise UserError(
      f"{source} cannot be read (byte {error.start} is not UTF-8 text)"
    ) from None


def read_text(path: pathlib.Path) -> str:
  """The UTF-8 text of a file, with its line ends as they are.

  Raises:
    UserError: it cannot be read, or is not UTF-8.
  """
  return decode(read_bytes(path), str(path))


def parse_object(text: str, source: str) -> dict[str, Any]:
  """The JSON object in a text.

  Raises:
    UserError: it is no JSON, is nested too deeply, or is something else.
  """
  try:
    content = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(
      f"{source} cannot be read as JSON ({first_line(error)})"
    ) from None
  if not isinstance(content, dict):
    raise UserError(
      f"{source} does not hold a JSON object, but {shown(content)}"
    )
  return content


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """The JSON object in a file.

  Raises:
    UserError: the file cannot be read, or holds something else.
  """
  return parse_object(read_text(path), str(path))


def read_fields(path: pathlib.Path) -> Fields:
  """The fields of the JSON object in a file.

  Raises:
    UserError: the file cannot be read, or holds something else.
  """
  return Fields(str(path), read_object(path))
