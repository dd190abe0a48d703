"""A run's metrics: their log, the throughput, and figures as text."""

import collections
import contextlib
import json
import math
import pathlib
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from train.common import atomic_files, inputs, links
from train.common.fields import is_integer
from train.common.units import format_mib
from train.run.sinks import Sink

FILE = "metrics.jsonl"
MIN_BATCHES = 64  # for showing the perplexity as the papers count it


class Throughput:
  """Tokens a second over the last steps, without compilation and pauses."""

  def __init__(self, window: int = 20):
    self._marks: collections.deque = collections.deque(maxlen=window + 1)
    self.rate = math.nan  # tokens a second; nan before two steps have passed

  def update(self, tokens: int, now: float | None = None) -> None:
    """Adds `tokens` that were processed by the time `now`, in seconds."""
    total = self._marks[-1][0] + tokens if self._marks else 0
    self._marks.append((total, time.perf_counter() if now is None else now))
    (first, start), (last, end) = self._marks[0], self._marks[-1]
    if len(self._marks) > 1:
      self.rate = (last - first) / (end - start)

  def pause(self) -> None:
    """Excludes the time until the next step, say of an evaluation."""
    self._marks.clear()


class Log:
  """Appends records to `metrics.jsonl`, one JSON object a line.

  The record of a training step holds step, loss, lr, grad_norm and
  tokens_per_second, among others. That of an evaluation holds what `held_out`
  returns, and that of a measured subspace `subspace/MATRIX/NUMBER`, which
  `subspace_watch` explains.
  """

  def __init__(
    self, out: pathlib.Path, resumed_at: int, sinks: Sequence[Sink] = ()
  ):
    """Opens the file.

    Args:
      out: the run's folder.
      resumed_at: step of the checkpoint from which the run goes on, or 0.
      sinks: get the same numbers.
    """
    self._sinks = sinks
    # Steps after the last checkpoint of a killed run are repeated, so their
    # records go.
    kept = [r for r in read(out / FILE) if r["step"] <= resumed_at]
    atomic_files.write_text(out / FILE, "".join(_line(r) for r in kept))
    self._file = (out / FILE).open("ab", buffering=0)
    self._unwritten = b""  # bytes for which the disk had no room

  def write(self, step: int, **values: Any) -> None:
    """Writes one record and hands it to the operating system at once."""
    # JSON has no nan, which stands for rates that are not known yet.
    known = {k: v for k, v in values.items() if v == v}
    self._unwritten += _line({"step": step, **known}).encode()
    self._flush()
    for sink in self._sinks:
      sink.write(step, known)

  def _flush(self) -> None:
    """Writes what the disk has room for; the rest waits for the next record."""
    with contextlib.suppress(OSError):
      while self._unwritten:
        written = self._file.write(self._unwritten) or 0
        self._unwritten = self._unwritten[written:]

  def close(self) -> None:
    """Closes the file and the sinks."""
    self._flush()
    if self._unwritten:
      lost = self._unwritten.count(b"\n")
      print(f"{lost} records could not be written to {self._file.name}")
    self._file.close()
    for sink in self._sinks:
      sink.close()


def _line(record: dict[str, Any]) -> str:
  return json.dumps(record) + "\n"


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a metrics file, as far as it is sound.

  An incomplete last line is dropped. So is all that comes after a line that is
  no record, as a power loss may leave it, and a note says so.

  Raises:
    UserError: the file cannot be read, or is a link to another folder.
  """
  path = links.inside(path.parent, path.name)
  if not path.exists():
    return []
  records: list[dict[str, Any]] = []
  for line in inputs.read_bytes(path).split(b"\n")[:-1]:
    record = _parse(line)
    if record is None:
      print(
        f"note: {path} is damaged in line {len(records) + 1}; the records"
        " before it are kept"
      )
      break
    records.append(record)
  return records


def _parse(line: bytes) -> dict[str, Any] | None:
  """The record in a line; None if there is none."""
  try:
    record = json.loads(line.decode())
  except (ValueError, RecursionError):  # or not in UTF-8
    return None
  if not isinstance(record, dict) or not all(map(_is_metric, record.values())):
    return None
  step = record.get("step", -1)
  return record if is_integer(step) and step >= 0 else None


def _is_metric(value: Any) -> bool:
  """Whether a value is a number that a float can hold, infinite ones too."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return False
  return isinstance(value, float) or abs(value) <= sys.float_info.max


def held_out(
  losses: Sequence[float], counts: Sequence[float], text_bytes: int
) -> dict[str, float]:
  """The figures of an evaluation.

  `held_out_perplexity` is exp of the mean loss a token. The scripts of GaLore,
  Q-GaLore, Fira, APOLLO and LDAdam print another figure for the same rows:
  they average over batches and count one batch too many, so that with n
  batches the loss is n / (n + 1) of its true value. That figure is
  `held_out_perplexity_papers`, to be compared with theirs only. If n, which is
  `held_out_batches`, is small, it depends more on n than on the model.

  Args:
    losses: summed loss of each batch, in nats.
    counts: predicted tokens of each batch.
    text_bytes: UTF-8 bytes of the text that those tokens stand for.
  """
  loss = sum(losses) / sum(counts)
  means = [total / n for total, n in zip(losses, counts, strict=True) if n]
  papers = sum(means) / (len(means) + 1)
  return {
    "held_out_loss": loss,
    "held_out_perplexity": _exp(loss),
    "held_out_perplexity_papers": _exp(papers),
    "held_out_batches": len(means),
    "held_out_bits_per_byte": sum(losses) / math.log(2) / text_bytes,
  }


def held_out_text(found: dict[str, float]) -> str:
  """The figures of an evaluation in one line.

  The papers' perplexity is left out if there are few batches.
  """
  parts = [f"held-out perplexity {found['held_out_perplexity']:,.2f}"]
  if found["held_out_batches"] >= MIN_BATCHES:
    parts.append(f"papers' count {found['held_out_perplexity_papers']:,.2f}")
  parts.append(f"{found['held_out_bits_per_byte']:.3f} bits/byte")
  return ", ".join(parts)


def _exp(loss: float) -> float:
  return math.exp(min(loss, 700))  # the largest is 709


def refreshes_text(
  counts: Mapping[str, jax.Array], steps: int, gap: int
) -> str:
  """How many refreshes the adaptive policy saved; "" under other policies.

  Args:
    counts: refreshes of each matrix, from `galore_optax.refresh_counts`.
    steps: steps of the run so far.
    gap: steps between two refreshes at a fixed gap.
  """
  if not counts or not steps:
    return ""
  matrices = sum(x.size for x in counts.values())
  # Jitted, because the counts may be sharded over several hosts.
  made = int(jax.jit(lambda all_: sum(x.sum() for x in all_.values()))(counts))
  # At a fixed gap every matrix is refreshed at step 0 and once in each gap.
  fixed = matrices * (1 + steps // gap)
  return (
    f"refreshes  {made:,} of the {fixed:,} that a fixed gap of {gap} makes"
    f" ({1 - made / fixed:.0%} saved)"
  )


def memory_table(
  parameters: int, matrices: int, states: dict[str, int], note: str
) -> str:
  """A table of optimizer-state bytes by method, with a note below it."""
  adamw = states["adamw"]
  width = max(map(len, states))
  rows = [
    f"{'optimizer state':<{width}}  {'bytes':>14}  {'MiB':>9}  of AdamW",
    *(
      f"{name:<{width}}  {size:>14,}  {format_mib(size):>9}"
      f"  {size / adamw:8.1%}"
      for name, size in states.items()
    ),
  ]
  head = (
    f"{parameters:,} parameters, of which {matrices:,} are in the block"
    "\nmatrices, the ones that GaLore projects"
  )
  return "\n".join([head, *rows, *textwrap.wrap(note, 78)])
