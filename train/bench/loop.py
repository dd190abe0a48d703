"""What the training loop costs beside the bare step.

    python -m train.bench loop --set data.batch=32

compiles the step of a run once and alternates between two ways of repeating
it: the loop of `train.pretrain` (data, metrics, progress, log), and nothing
but the compiled step on a batch that lies on the devices. It prints tokens a
second of both, their ratio, and the share of the loop's time that went into
waiting for data. Evaluations and checkpoints are pauses of the loop and are
left out; the time that a save holds up the loop is printed apart.
"""

import argparse
import contextlib
import dataclasses
import io
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from train.common.errors import UserError
from train.config import presets, schema
from train.data import corpus as corpus_lib
from train.parallel import mesh as mesh_lib
from train.run import checkpoint, run_dir, subspace_watch
from train.run import job as job_lib
from train.run import loop as loop_lib
from train.step import setup as setup_lib
from train.step import train_step


@dataclasses.dataclass
class Times:
  """Seconds of each round, by what ran, and the loop's waits for data.

  Seconds are pairs: of the clock, and of the processor.
  """

  bare: list[tuple[float, float]] = dataclasses.field(default_factory=list)
  loop: list[tuple[float, float]] = dataclasses.field(default_factory=list)
  waited: list[float] = dataclasses.field(default_factory=list)
  save: float = 0.0


@contextlib.contextmanager
def timed(into: list[tuple[float, float]]) -> Iterator[None]:
  """Appends the seconds that the block takes, of clock and processor."""
  begin, busy = time.perf_counter(), time.process_time()
  yield
  into.append((time.perf_counter() - begin, time.process_time() - busy))


def measure(config: schema.Config, rounds: int, length: int) -> Times:
  """Runs both in turn, `rounds` times `length` steps each."""
  times = Times()
  mesh = mesh_lib.make_mesh(config.mesh, config.data.batch)
  corpus = corpus_lib.prepare(config.data, config.model.vocab_size)
  with tempfile.TemporaryDirectory() as name, jax.set_mesh(mesh):
    out = pathlib.Path(name)
    run_dir.write_config(out, config, overwrite=False)
    setup = setup_lib.make(config.model, config.optimizer, config.train, mesh)
    watcher = subspace_watch.Watcher(
      config.run, config.optimizer, setup, config.parts
    )
    job, state = job_lib.prepare(config, out, corpus, setup, watcher)
    with contextlib.closing(job):
      compiled = loop_lib.compile_step(job, state)
      batch = job.put(next(job.feed))
      reporter = loop_lib.Reporter(job, 0, 0)
      state = _bare(compiled, state, batch, length)  # a first one, to warm up
      for index in range(rounds):
        # Each of them comes first in every other round.
        ways = [True, False] if index % 2 else [False, True]
        numbers = range(index * length + 1, (index + 1) * length + 1)
        for bare in ways:
          waited = job.feed.waited
          with timed(times.bare if bare else times.loop):
            if bare:
              state = _bare(compiled, state, batch, length)
            else:
              state = _looped(job, state, compiled, reporter, numbers)
          if not bare:
            times.waited.append(job.feed.waited - waited)
      times.save = _save(job, state)
      reporter.progress.close()
  return times


def _bare(
  compiled: Callable, state: train_step.TrainState, batch: jax.Array, count: int
):
  """The compiled step and nothing else."""
  for _ in range(count):
    state, _ = compiled(state, batch)
  return jax.block_until_ready(state)


def _looped(
  job: job_lib.Job,
  state: train_step.TrainState,
  compiled: Callable,
  reporter: loop_lib.Reporter,
  numbers: range,
) -> train_step.TrainState:
  """The script's own loop; what it prints goes nowhere."""
  with contextlib.redirect_stdout(io.StringIO()):
    outcome = loop_lib.advance(
      job, state, compiled, reporter, numbers, lambda: False
    )
    jax.block_until_ready(outcome.state)
  return outcome.state


def _save(job: job_lib.Job, state: train_step.TrainState) -> float:
  """Seconds that a save holds up the loop; the writing goes on behind."""
  progress = checkpoint.Progress(0.0, job.feed.state())
  job.checkpoints.save(state, progress)  # the first compiles its check sums
  job.checkpoints.settle()
  again = state._replace(step=state.step + 1)
  seconds: list[tuple[float, float]] = []
  with timed(seconds):
    job.checkpoints.save(again, progress)
  return seconds[0][0]


def report(config: schema.Config, times: Times, length: int) -> str:
  """The table, and the figure that matters below it."""
  tokens = config.data.batch * config.data.length * length
  rows = [f"{'tokens/s':22}{'median':>12}{'worst':>12}{'best':>12}"]
  for name, pairs in (("bare step", times.bare), ("loop", times.loop)):
    rates = [tokens / seconds for seconds, _ in pairs]
    figures = (statistics.median(rates), min(rates), max(rates))
    rows.append(f"{name:22}" + "".join(f"{x:>12,.0f}" for x in figures))
  by_round = [
    f"{bare[0] / looped[0]:.3f}"
    for bare, looped in zip(times.bare, times.loop, strict=True)
  ]
  bare, bare_busy = np.sum(times.bare, axis=0)
  looped, looped_busy = np.sum(times.loop, axis=0)
  return "\n".join(
    [
      *rows,
      "",
      f"loop / bare step      {bare / looped:.3f} over all rounds; by round"
      f" {', '.join(by_round)}",
      f"  in processor time   {bare_busy / looped_busy:.3f}, which a busy"
      " machine disturbs less; of use where the device is the processor",
      f"waiting for data      {sum(times.waited) / looped:.2%} of the loop's"
      " time",
      f"a save holds the loop {times.save:.3f} s",
    ]
  )


def main(words: list[str] | None = None) -> int:
  """Parses the command line and prints the table."""
  parser = argparse.ArgumentParser(
    prog="python -m train.bench loop",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--preset", default="sotu_small")
  parser.add_argument("--optimizer", default="galore")
  parser.add_argument("--set", action="append", default=[], dest="settings")
  parser.add_argument("--rounds", type=int, default=6)
  parser.add_argument("--steps", type=int, default=20, help="in a round")
  flags = parser.parse_args(words)
  count = flags.rounds * flags.steps
  pauses = [
    f"train.steps={count + 1}",
    f"run.eval_every={count + 1}",
    f"run.checkpoint_every={count + 1}",
  ]
  try:
    config = presets.make(flags.preset, flags.optimizer)
    config = schema.override(config, [*flags.settings, *pauses])
    times = measure(config, flags.rounds, flags.steps)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(report(config, times, flags.steps))
  return 0


if __name__ == "__main__":
  sys.exit(main())
