"""The progress of a run: a bar on a terminal, plain lines in a file."""

import math
import os
import sys

import tqdm

from train.common.units import format_clock, format_count


class Progress:
  """A bar on a terminal; plain lines where the output is a file."""

  def __init__(self, start: int, steps: int, line_every: int):
    self._bar = tqdm.tqdm(
      initial=start,
      total=steps,
      unit="step",
      dynamic_ncols=True,
      disable=not sys.stderr.isatty(),
      bar_format="{percentage:3.0f}% |{bar}| {n}/{total} {desc}",
    )
    self._steps, self._every = steps, line_every

  def update(
    self,
    step: int,
    loss: float,
    lr: float,
    rate: float,
    tokens: int,
    norm: float = math.nan,
    mfu: float = math.nan,
  ) -> None:
    """Shows step `step`.

    Args:
      step: steps done.
      loss: loss of the training batch in nats a token.
      lr: learning rate.
      rate: tokens a second; nan if it is not known yet.
      tokens: tokens of a batch, for the remaining time.
      norm: norm of the gradient.
      mfu: model FLOPs utilization, 0 to 1; nan if it is not known.
    """
    left = format_clock((self._steps - step) * tokens / rate)
    shown = {
      "loss": f"{loss:.3f}",
      "lr": f"{lr:.1e}",
      "norm": f"{norm:.2f}" if math.isfinite(norm) else "",
      "tokens/s": format_count(rate),
      "MFU": f"{mfu:.0%}" if math.isfinite(mfu) else "",
      "left": left,
    }
    if not self._bar.disable:
      room = _columns() - len(f"100% || {self._steps}/{self._steps} ")
      self._bar.set_description_str(fit(shown, room), refresh=False)
      self._bar.update(step - self._bar.n)
    elif step % self._every == 0 or step == self._steps:
      width = len(str(self._steps))
      text = fit(shown, 200)
      print(f"step {step:>{width}}/{self._steps}  {text}", flush=True)

  def say(self, text: str) -> None:
    """Prints a line without breaking the bar."""
    self._bar.write(text)
    sys.stdout.flush()

  def close(self) -> None:
    """Leaves the bar on the screen as it stands."""
    self._bar.close()


BAR = 6  # minimum columns of the bar itself
# What a narrow terminal leaves out, in this sequence.
DISPENSABLE = ("norm", "lr", "MFU", "tokens/s", "left")


def fit(shown: dict[str, str], room: int) -> str:
  """Names and values in at most `room` columns, the most important ones.

  Args:
    shown: name to value; empty values are left out.
    room: available columns, including those of the bar.
  """
  known = {name: value for name, value in shown.items() if value}
  for name in ("", *DISPENSABLE):
    known.pop(name, None)
    text = " ".join(f"{name} {value}" for name, value in known.items())
    if len(text) + BAR <= room:
      break
  return text


def _columns() -> int:
  try:
    return os.get_terminal_size(sys.stderr.fileno()).columns
  except (OSError, ValueError):
    return 80
