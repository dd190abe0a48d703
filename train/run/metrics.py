"""A run's numbers: a JSON line every few steps, how fast it goes, a table."""

import collections
import contextlib
import json
import math
import pathlib
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from train.common import atomic_files
from train.common.units import format_mib
from train.run.sinks import Sink

FILE = "metrics.jsonl"
ENOUGH = 64  # batches from which on the papers' count is shown


class Throughput:
  """Tokens a second over the last steps, compilation and pauses left out."""

  def __init__(self, window: int = 20):
    self._marks: collections.deque = collections.deque(maxlen=window + 1)
    self.rate = math.nan  # tokens a second; nan before two steps have passed

  def update(self, tokens: int, now: float | None = None) -> None:
    """Notes that `tokens` more were seen by time `now` in seconds."""
    total = self._marks[-1][0] + tokens if self._marks else 0
    self._marks.append((total, time.perf_counter() if now is None else now))
    (first, start), (last, end) = self._marks[0], self._marks[-1]
    if len(self._marks) > 1:
      self.rate = (last - first) / (end - start)

  def pause(self) -> None:
    """Leaves out what comes before the next step, an evaluation say."""
    self._marks.clear()


class Log:
  """Appends records to `metrics.jsonl`, one JSON object a line.

  A record of a training step holds step, loss, lr, grad_norm and
  tokens_per_second; one of an evaluation what `held_out` gives; one of a look
  at a subspace `subspace/MATRIX/NUMBER`, as `subspace_watch` explains.
  """

  def __init__(
    self, out: pathlib.Path, resumed_at: int, sinks: Sequence[Sink] = ()
  ):
    """Opens the file.

    Args:
      out: the run's folder.
      resumed_at: step of the checkpoint from which the run goes on, or 0.
      sinks: take the same numbers.
    """
    self._sinks = sinks
    # What a killed run wrote after its last checkpoint happens again.
    kept = [r for r in read(out / FILE) if r["step"] <= resumed_at]
    atomic_files.write_text(out / FILE, "".join(_line(r) for r in kept))
    self._file = (out / FILE).open("ab", buffering=0)
    self._unwritten = b""  # what a full disk did not take

  def write(self, step: int, **values: Any) -> None:
    """Writes one record and hands it to the operating system at once."""
    # JSON has no nan: a rate that is not known yet is left out.
    known = {k: v for k, v in values.items() if v == v}
    self._unwritten += _line({"step": step, **known}).encode()
    self._flush()
    for sink in self._sinks:
      sink.write(step, known)

  def _flush(self) -> None:
    """Writes what there is room for; the rest waits for the next record."""
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
  """The whole records of a metrics file; a torn last line is dropped."""
  if not path.exists():
    return []
  lines = path.read_text(encoding="utf-8").split("\n")
  return [json.loads(line) for line in lines[:-1]]


def held_out(
  losses: Sequence[float], counts: Sequence[float], text_bytes: int
) -> dict[str, float]:
  """The figures of an evaluation.

  `held_out_perplexity` is exp of the mean loss a token. The GaLore paper's
  script, and those of Q-GaLore, Fira, APOLLO and LDAdam, print another one on
  the same rows: they average over batches and count one batch too many, so
  that with n batches the loss is n / (n + 1) of what it is. That figure is
  `held_out_perplexity_papers`, to be compared with theirs and nothing else.
  Where `held_out_batches`, n, is small it says more about n than the model.

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
  """The figures of an evaluation in a line, without the papers' if few."""
  parts = [f"held-out perplexity {found['held_out_perplexity']:,.2f}"]
  if found["held_out_batches"] >= ENOUGH:
    parts.append(f"papers' count {found['held_out_perplexity_papers']:,.2f}")
  parts.append(f"{found['held_out_bits_per_byte']:.3f} bits/byte")
  return ", ".join(parts)


def _exp(loss: float) -> float:
  return math.exp(min(loss, 700))  # the largest is 709


def refreshes_text(
  counts: Mapping[str, jax.Array], steps: int, gap: int
) -> str:
  """What the adaptive policy saved, in a line; empty under other policies.

  Args:
    counts: refreshes of each matrix, see `galore_optax.refresh_counts`.
    steps: steps of the run so far.
    gap: steps between two refreshes at a fixed gap.
  """
  if not counts or not steps:
    return ""
  matrices = sum(x.size for x in counts.values())
  # Compiled, so that what several hosts hold together can be counted.
  made = int(jax.jit(lambda all_: sum(x.sum() for x in all_.values()))(counts))
  # At a fixed gap every matrix has its turn once in each, and all at step 0.
  fixed = matrices * (1 + steps // gap)
  return (
    f"refreshes  {made:,} of the {fixed:,} that a fixed gap of {gap} makes"
    f" ({1 - made / fixed:.0%} saved)"
  )


def memory_table(
  parameters: int, matrices: int, states: dict[str, int], note: str
) -> str:
  """Optimizer-state bytes by method, next to the parameters; a note below."""
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
    f"{parameters:,} parameters, {matrices:,} of them in the block matrices,"
    "\nwhich are the projected ones"
  )
  return "\n".join([head, *rows, *textwrap.wrap(note, 78)])
