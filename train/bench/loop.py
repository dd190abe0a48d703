"""Compares the training loop with its bare compiled step.

    python -m train.bench loop --set data.batch=32

compiles the step of a run once and alternates between two ways of repeating
it: the loop of `train.pretrain` (data, metrics, progress, log), and only the
compiled step on one batch that is already on the devices. It prints the tokens
per second of both, their ratio, and the share of the loop's time that it waited
for data. Evaluations and checkpoints are excluded; the time for which a save
holds up the loop is printed separately.
"""

import argparse
import contextlib
import dataclasses
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from train.common import commands
from train.config import presets, schema
from train.measure import tables, trial
from train.run import checkpoint
from train.run import job as job_lib
from train.run import loop as loop_lib
from train.step import state as state_lib


@dataclasses.dataclass
class Times:
  """Times of each round.

  Attributes:
    bare: Wall-clock and processor seconds of the bare steps.
    loop: Wall-clock and processor seconds of the loop.
    waited: Seconds for which the loop waited for data.
    save: Seconds for which a save holds up the loop.
  """

  bare: list[tuple[float, float]] = dataclasses.field(default_factory=list)
  loop: list[tuple[float, float]] = dataclasses.field(default_factory=list)
  waited: list[float] = dataclasses.field(default_factory=list)
  save: float = 0.0


@contextlib.contextmanager
def timed(into: list[tuple[float, float]]) -> Iterator[None]:
  """Appends the block's wall-clock and processor seconds to a list."""
  begin, busy = time.perf_counter(), time.process_time()
  yield
  into.append((time.perf_counter() - begin, time.process_time() - busy))


def measure(config: schema.Config, rounds: int, length: int) -> Times:
  """Alternates bare steps and the loop, `rounds` times `length` steps each."""
  times = Times()
  with trial.start(config, watch=True) as run:
    job, state, compiled = run.job, run.state, run.compile_step()
    batch = job.put(next(job.feed))
    reporter = loop_lib.Reporter(job, 0, 0)
    state = _bare(compiled, state, batch, length)  # warm-up
    for index in range(rounds):
      # Each way comes first in every other round.
      ways = [True, False] if index % 2 else [False, True]
      steps = range(index * length + 1, (index + 1) * length + 1)
      for bare in ways:
        waited = job.feed.waited
        with timed(times.bare if bare else times.loop):
          if bare:
            state = _bare(compiled, state, batch, length)
          else:
            state = _looped(job, state, compiled, reporter, steps)
        if not bare:
          times.waited.append(job.feed.waited - waited)
    times.save = _save(job, state)
    reporter.progress.close()
  return times


def _bare(
  compiled: Callable, state: state_lib.TrainState, batch: jax.Array, count: int
) -> state_lib.TrainState:
  """Repeats the compiled step and does nothing else."""
  for _ in range(count):
    state, _ = compiled(state, batch)
  return jax.block_until_ready(state)


def _looped(
  job: job_lib.Job,
  state: state_lib.TrainState,
  compiled: Callable,
  reporter: loop_lib.Reporter,
  steps: range,
) -> state_lib.TrainState:
  """Runs the training script's loop, without its printed output."""
  with contextlib.redirect_stdout(io.StringIO()):
    outcome = loop_lib.advance(
      job, state, compiled, reporter, steps, lambda: False
    )
    jax.block_until_ready(outcome.state)
  return outcome.state


def _save(job: job_lib.Job, state: state_lib.TrainState) -> float:
  """Seconds for which a save holds up the loop; it writes in the background."""
  progress = checkpoint.Progress(0.0, job.feed.state())
  job.checkpoints.save(state, progress)  # the first one compiles its checksums
  job.checkpoints.settle()
  again = state._replace(step=state.step + 1)
  seconds: list[tuple[float, float]] = []
  with timed(seconds):
    job.checkpoints.save(again, progress)
  return seconds[0][0]


def report(config: schema.Config, times: Times, length: int) -> str:
  """The table of tokens per second, and the ratios below it."""
  tokens = config.data.batch * config.data.length * length
  rows = []
  for name, pairs in (("bare step", times.bare), ("loop", times.loop)):
    rates = [tokens / seconds for seconds, _ in pairs]
    numbers = (statistics.median(rates), min(rates), max(rates))
    rows.append([name, *(f"{x:,.0f}" for x in numbers)])
  by_round = [
    f"{bare[0] / looped[0]:.3f}"
    for bare, looped in zip(times.bare, times.loop, strict=True)
  ]
  bare, bare_busy = np.sum(times.bare, axis=0)
  looped, looped_busy = np.sum(times.loop, axis=0)
  return "\n".join(
    [
      tables.text_table(["tokens per second", "median", "worst", "best"], rows),
      "",
      "loop / bare step",
      f"  wall-clock time       {bare / looped:.3f} over all rounds; by round"
      f" {', '.join(by_round)}",
      f"  processor time        {bare_busy / looped_busy:.3f} (for training on"
      " the CPU: other processes disturb it less)",
      f"waiting for data        {sum(times.waited) / looped:.2%} of the loop's"
      " time",
      f"a save holds up by      {times.save:.3f} s",
    ]
  )


def main(argv: list[str] | None = None) -> int:
  """Runs the command: 0 done, 2 wrong input, 130 interrupted."""
  parser = argparse.ArgumentParser(
    prog="python -m train.bench loop",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--preset", default="sotu_small", help="as for train.pretrain")
  add("--optimizer", default="galore", help="as for train.pretrain")
  add(
    "--set",
    action="append",
    default=[],
    dest="settings",
    metavar="FIELD=VALUE",
    help="change a field of the config; may be repeated",
  )
  add("--rounds", type=int, default=6, help="how often each way is timed")
  add("--steps", type=int, default=20, help="steps of a round")
  flags = parser.parse_args(argv)
  return commands.run(lambda: compare(flags))


def compare(flags: argparse.Namespace) -> None:
  """Times the ways that the command line asks for, and prints the table."""
  count = flags.rounds * flags.steps
  no_pauses = [
    f"train.steps={count + 1}",
    f"run.eval_every={count + 1}",
    f"run.checkpoint_every={count + 1}",
  ]
  config = presets.make(flags.preset, flags.optimizer)
  config = schema.override(config, [*flags.settings, *no_pauses])
  times = measure(config, flags.rounds, flags.steps)
  print(report(config, times, flags.steps))


if __name__ == "__main__":
  sys.exit(main())
