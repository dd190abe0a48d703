"""What a run tells: a JSON line every few steps, a progress bar, a table."""

import collections
import json
import math
import pathlib
import sys
import time
from typing import Any

import tqdm

FILE = "metrics.jsonl"


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
  tokens_per_second; one of an evaluation step, held_out_loss (nats a token)
  and held_out_perplexity.
  """

  def __init__(self, out: pathlib.Path, resumed_at: int):
    self._path = out / FILE
    # What a killed run wrote after its last checkpoint happens again.
    kept = [r for r in read(self._path) if r["step"] <= resumed_at]
    self._path.write_text("".join(_line(r) for r in kept), encoding="utf-8")
    self._file = self._path.open("a", encoding="utf-8")

  def write(self, step: int, **values: Any) -> None:
    """Writes one record and hands it to the operating system at once."""
    self._file.write(_line({"step": step, **values}))
    self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def _line(record: dict[str, Any]) -> str:
  # JSON has no nan: a rate that is not known yet is left out.
  known = {k: v for k, v in record.items() if v == v}
  return json.dumps(known) + "\n"


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The whole records of a metrics file; a torn last line is dropped."""
  if not path.exists():
    return []
  lines = path.read_text(encoding="utf-8").split("\n")
  return [json.loads(line) for line in lines[:-1]]


class Progress:
  """A bar on a terminal; plain lines where the output is a file."""

  def __init__(self, start: int, steps: int, line_every: int):
    self._bar = tqdm.tqdm(
      initial=start,
      total=steps,
      unit="step",
      dynamic_ncols=True,
      disable=not sys.stderr.isatty(),
      bar_format="{percentage:3.0f}% |{bar}| {n}/{total}  {desc}",
    )
    self._start, self._steps, self._every = start, steps, line_every

  def update(
    self, step: int, loss: float, lr: float, rate: float, tokens: int
  ) -> None:
    """Shows step `step`; `tokens` is a batch's, for the time that is left."""
    left = (self._steps - step) * tokens / rate
    speed = f"{rate:,.0f}" if math.isfinite(rate) else "-"
    text = (
      f"loss {loss:.3f}  lr {lr:.1e}  {speed} tokens/s  left {duration(left)}"
    )
    self._bar.set_description_str(text, refresh=False)
    self._bar.update(step - self._bar.n)
    if self._bar.disable and (step % self._every == 0 or step == self._steps):
      print(f"step {step:>{len(str(self._steps))}}/{self._steps}  {text}")

  def say(self, text: str) -> None:
    """Prints a line without breaking the bar."""
    self._bar.write(text)
    sys.stdout.flush()

  def close(self) -> None:
    """Leaves the bar on the screen as it stands."""
    self._bar.close()


def duration(seconds: float) -> str:
  """Seconds as 1:02:03 or 2:03; `-` where they are not known."""
  if not math.isfinite(seconds):
    return "-"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02}:{rest:02}"
  return f"{minutes}:{rest:02}"


def memory_table(parameters: int, matrices: int, states: dict[str, int]) -> str:
  """Optimizer-state bytes by method, next to the parameters."""
  adamw = states["adamw"]
  width = max(map(len, states))
  rows = [
    f"{'optimizer state':<{width}}  {'bytes':>14}  {'MiB':>9}  of AdamW",
    *(
      f"{name:<{width}}  {size:>14,}  {size / 2**20:>9,.2f}"
      f"  {size / adamw:8.1%}"
      for name, size in states.items()
    ),
  ]
  head = (
    f"{parameters:,} parameters, {matrices:,} of them in the block matrices,"
    " which are the projected ones"
  )
  foot = (
    "optax.contrib.galore projects 2-D leaves only: counted (and run) on the"
    " same\nmatrices with the layers as separate leaves."
  )
  return "\n".join([head, *rows, foot])
