"""Checks of command-line options that hold several values."""

from collections.abc import Collection

from train.common.errors import UserError

LAYOUTS = ("unrolled", "stacked")


def choose(
  option: str, text: str, known: Collection[str], separator: str = ","
) -> list[str]:
  """Splits a list of names and checks each of them.

  Args:
    option: The option, for the error message.
    text: Its value.
    known: The names that exist.
    separator: What stands between two names.

  Raises:
    UserError: A name is unknown.
  """
  names = text.split(separator)
  for name in names:
    if name not in known:
      raise UserError(
        f"{option} {name!r} is unknown; choose from {', '.join(known)},"
        f" separated by {separator!r}"
      )
  return names


def sizes(option: str, text: str) -> list[tuple[int, int, int]]:
  """Reads sizes such as 512x1376x128: short side, long side, rank.

  Raises:
    UserError: One of them has another form.
  """
  found = []
  for size in text.split(","):
    parts = size.split("x")
    numbers = [int(x) for x in parts if x.isdecimal()]
    if len(numbers) != 3 or len(parts) != 3:
      raise UserError(f"{option} {size!r}: write m x n x rank as 512x1376x128")
    m, n, rank = numbers
    if not 0 < 2 * rank <= m <= n:
      raise UserError(
        f"{option} {size!r}: needs m <= n, and a rank of at most m / 2"
      )
    found.append((m, n, rank))
  return found
