"""What is written on the command line, checked."""

from collections.abc import Collection

from train.common.errors import UserError

LAYOUTS = ("unrolled", "stacked")


def choose(
  option: str, text: str, known: Collection[str], separator: str = ","
) -> list[str]:
  """Names out of a list of them.

  Args:
    option: for the message.
    text: what was given.
    known: the names that there are.
    separator: between names.

  Raises:
    UserError: one of them is unknown.
  """
  names = text.split(separator)
  for name in names:
    if name not in known:
      raise UserError(
        f"{option} {name!r} is unknown; take some of {', '.join(known)},"
        f" with {separator!r} between them"
      )
  return names


def sizes(option: str, text: str) -> list[tuple[int, int, int]]:
  """Sizes such as 512x1376x128: short side, long side, rank.

  Raises:
    UserError: one of them is not that.
  """
  found = []
  for word in text.split(","):
    parts = word.split("x")
    numbers = [int(x) for x in parts if x.isdecimal()]
    if len(numbers) != 3 or len(parts) != 3:
      raise UserError(f"{option} {word!r}: write m x n x rank as 512x1376x128")
    m, n, rank = numbers
    if not 0 < 2 * rank <= m <= n:
      raise UserError(
        f"{option} {word!r}: needs m <= n, and a rank of at most m / 2"
      )
    found.append((m, n, rank))
  return found
