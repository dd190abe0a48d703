"""Bytes, counts and durations as text, and sizes read from text."""

import math

import pytest

from train.common import units
from train.common.errors import UserError


@pytest.mark.parametrize(
  ("count", "text"),
  [(0, "0 B"), (999, "999 B"), (1024, "1.00 KiB"), (5 * 2**20, "5.00 MiB"),
   (12.5 * 2**30, "12.50 GiB"), (2**41, "2,048.00 GiB")],
)  # fmt: skip
def test_bytes(count, text):
  assert units.format_bytes(count) == text


def test_bytes_in_one_unit():
  assert units.format_mib(3 * 2**20 / 2) == "1.50"
  assert units.format_gib(2**40) == "1,024.00"
  assert units.format_gb(1_234_500_000) == "1.234"


@pytest.mark.parametrize(
  ("text", "size"),
  [("16GiB", 2**34), ("24 GB", 24 * 10**9), ("1.5MiB", 3 * 2**19),
   ("7MB", 7 * 10**6)],
)  # fmt: skip
def test_sizes_are_read(text, size):
  assert units.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "16", "GiB", "1.2.3GiB", "16 gib"])
def test_wrong_sizes_are_refused(text):
  with pytest.raises(UserError, match="16GiB"):
    units.parse_bytes(text)


@pytest.mark.parametrize(
  ("count", "text"),
  [(950.4, "950"), (9_999, "9999"), (12_345, "12.3k"), (1.25e6, "1.25M"),
   (6.7e9, "6.7B"), (math.nan, "-"), (math.inf, "-")],
)  # fmt: skip
def test_counts(count, text):
  assert units.format_count(count) == text


@pytest.mark.parametrize(
  ("count", "text"), [(3, "3 "), (12_500, "12.5 k"), (2e20, "200 E")]
)
def test_si_prefixes(count, text):
  assert units.format_si(count) == text


@pytest.mark.parametrize(
  ("seconds", "rough", "clock"),
  [(59.6, "1.0 min", "1:00"), (3723, "1.0 h", "1:02:03"),
   (2e5, "2.3 days", "2d07h")],
)  # fmt: skip
def test_durations(seconds, rough, clock):
  assert units.format_duration(seconds) == rough
  assert units.format_clock(seconds) == clock


def test_an_unknown_duration_is_a_dash():
  assert units.format_clock(math.nan) == "-"
