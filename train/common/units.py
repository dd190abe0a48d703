"""Numbers as people read them: bytes, counts and durations.

Bytes are written with binary units (KiB, MiB, GiB) unless a function says
decimal (GB), as the papers do.
"""

import math
import re

from train.common.errors import UserError

KIB, MIB, GIB = 2**10, 2**20, 2**30
MB, GB = 10**6, 10**9


def format_bytes(count: float) -> str:
  """Bytes with the largest fitting binary unit: `12.50 GiB`."""
  for unit in ("B", "KiB", "MiB"):
    if count < 1000:
      return f"{count:.0f} {unit}" if unit == "B" else f"{count:,.2f} {unit}"
    count /= 1024
  return f"{count:,.2f} GiB"


def format_mib(count: float, digits: int = 2) -> str:
  """Bytes as a bare number of MiB: `1,234.50`."""
  return f"{count / MIB:,.{digits}f}"


def format_gib(count: float, digits: int = 2) -> str:
  """Bytes as a bare number of GiB: `1.21`."""
  return f"{count / GIB:,.{digits}f}"


def format_gb(count: float, digits: int = 3) -> str:
  """Bytes as a bare number of decimal GB (1e9 bytes): `1.234`."""
  return f"{count / GB:,.{digits}f}"


def parse_bytes(text: str) -> int:
  """Bytes of a size such as `16GiB` or `24 GB`.

  Raises:
    UserError: the text is not a number with one of the units.
  """
  match = re.fullmatch(r"(\d+\.?\d*)\s*(GiB|GB|MiB|MB)", text.strip())
  if match is None:
    raise UserError(f"{text!r} is not a size; write it as 16GiB or 24GB")
  units = {"GiB": GIB, "MiB": MIB, "GB": GB, "MB": MB}
  return int(float(match[1]) * units[match[2]])


def format_count(count: float) -> str:
  """A count in few characters: `950`, `12.3k`, `1.25M`, `6.7B`.

  Numbers that are not finite, which stand for "not known yet", become `-`.
  """
  if not math.isfinite(count):
    return "-"
  for limit, size, unit in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
    if count >= limit:
      return f"{count / size:.3g}{unit}"
  return f"{count:.0f}"


def format_si(count: float) -> str:
  """A large number with an SI prefix, before a unit's name: `12.5 T`."""
  for prefix in ("", "k", "M", "G", "T", "P"):
    if count < 1000:
      return f"{count:.3g} {prefix}"
    count /= 1000
  return f"{count:,.3g} E"


def format_duration(seconds: float) -> str:
  """A rough duration in days, hours or minutes: `3.2 days`, `5.0 h`."""
  for unit, length in (("days", 86400), ("h", 3600)):
    if seconds >= length:
      return f"{seconds / length:,.1f} {unit}"
  return f"{seconds / 60:,.1f} min"


def format_clock(seconds: float) -> str:
  """A duration as `2:03`, `1:02:03` or `3d04h`; `-` if it is not finite."""
  if not math.isfinite(seconds):
    return "-"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours >= 48:
    return f"{hours // 24}d{hours % 24:02}h"
  if hours:
    return f"{hours}:{minutes:02}:{rest:02}"
  return f"{minutes}:{rest:02}"
