"""Makes one run with the loop of `train.pretrain`, and its record."""

import contextlib
import dataclasses
import math
import pathlib
import shlex
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import galore_optax
from train.common.errors import Diverged, UserError
from train.config import presets, schema
from train.data import corpus as corpus_lib
from train.experiments import stability, tables, texts
from train.experiments.plan import Record, Run
from train.measure import machine
from train.parallel import mesh as mesh_lib
from train.run import job as job_lib
from train.run import loop, metrics, run_dir
from train.run.job import Job
from train.step import setup as setup_lib

POINTS = 500  # most points of a recorded loss curve
VALIDATION_ROWS = 256  # most rows of the validation text
TEST_ROWS = 2048  # most rows of the test text


class Clock:
  """Measures the steps' processor seconds while the loop asks whether to stop.

  Attributes:
    steps: Processor seconds of each step so far.
  """

  def __init__(self, stopped: Callable[[], bool]):
    self._stopped, self._last = stopped, math.nan
    self.steps: list[float] = []

  def __call__(self) -> bool:
    """Records the time since the last call; returns whether to stop."""
    now = time.process_time()
    if not math.isnan(self._last):
      self.steps.append(now - self._last)
    self._last = now
    return self._stopped()


def settings(run: Run, parts: texts.Parts) -> list[str]:
  """The run as settings of `train.pretrain --set`."""
  data = schema.override(
    presets.make(tables.PRESET, run.variant.optimizer), list(run.settings)
  ).data
  steps = max(1, round(run.tokens / (data.batch * data.length)))
  gap = max(1, steps // run.variant.gaps)
  if run.variant.gaps < 10:  # rounded up, to have no extra basis at the end
    gap = -(-steps // run.variant.gaps)
  cycle = -(-2 * steps // run.variant.gaps)  # rounded up, as no cycle is cut
  every = -(-steps // run.evaluations)
  return [
    *run.settings,
    f"data.path={parts.train}",
    f"data.validation={parts.validation}",
    f"data.eval_rows={VALIDATION_ROWS}",
    f"train.steps={steps}",
    f"train.seed={run.seed}",
    f"optimizer.learning_rate={run.rate:g}",
    f"optimizer.matrix_lr={run.multiplier:g}",
    f"optimizer.update_proj_gap={gap}",
    f"optimizer.reset_every={cycle}",
    f"optimizer.restart_warmup={cycle // 10}",
    f"run.eval_every={every}",
    f"run.checkpoint_every={max(1, steps // 4)}",
    "run.log_every=1",
    "run.keep=1",
    "run.keep_best=0",
    "run.watch=none",
    *run.variant.settings,
  ]


def config_of(run: Run, parts: texts.Parts) -> schema.Config:
  """The run as a config of `train.pretrain`."""
  start = presets.make(tables.PRESET, run.variant.optimizer)
  return schema.override(start, settings(run, parts))


def command(run: Run, parts: texts.Parts) -> str:
  """The command that trains the same with `train.pretrain`."""
  arguments = ["--preset", tables.PRESET, "--optimizer", run.variant.optimizer]
  for setting in settings(run, parts):
    name, _, value = setting.partition("=")
    local = name in ("data.path", "data.validation")
    value = pathlib.Path(value).name if local else value
    arguments += ["--set", f"{name}={value}"]
  return f"python -m train.pretrain {shlex.join(arguments)}"


def train(
  run: Run,
  parts: texts.Parts,
  work: pathlib.Path,
  stopped: Callable[[], bool],
  other: pathlib.Path | None = None,
) -> Record | None:
  """Trains a run, or resumes one that was stopped.

  Args:
    run: The run.
    parts: Files of the text.
    work: Folder of the runs under way; this one gets a folder of its own there,
      with its checkpoints and its printed output in `log.txt`.
    stopped: Called once per step; whether to stop.
    other: File of a text of another kind, which is only reported on.

  Returns:
    The record of the finished or diverged run, None if it was stopped.
  """
  config = config_of(run, parts)
  out = work / run.key
  try:
    run_dir.check_folder(out, config, overwrite=False)
    run_dir.write_config(out, config, overwrite=False)
  except UserError:  # the folder holds another run, or is damaged
    run_dir.write_config(out, config, overwrite=True)
  corpus = corpus_lib.prepare(config.data, config.model.vocab_size)
  mesh = mesh_lib.make_mesh(config.mesh, config.data.batch)
  with _output_to(out / "log.txt"), jax.set_mesh(mesh):
    job, state = _prepare(config, out, corpus, mesh)
    with contextlib.closing(job):
      reported = {"test_loss": parts.test}
      reported |= {"other_loss": other} if other else {}
      outcome = _finish(config, job, state, reported, stopped)
  jax.clear_caches()
  if outcome is None:
    return None
  return _identity(run, config, parts) | outcome


@contextlib.contextmanager
def _output_to(path: pathlib.Path) -> Iterator[None]:
  """Redirects printed output and errors to a file."""
  with (
    path.open("a", encoding="utf-8") as log,
    contextlib.redirect_stdout(log),
    contextlib.redirect_stderr(log),
  ):
    yield


def _prepare(
  config: schema.Config,
  out: pathlib.Path,
  corpus: corpus_lib.Corpus,
  mesh: jax.sharding.Mesh,
) -> tuple[Job, Any]:
  """Prepares the job; starts over if its checkpoints cannot be read."""
  setup = setup_lib.make(config.model, config.optimizer, config.train, mesh)
  try:
    return job_lib.prepare(config, out, corpus, setup)
  except UserError:
    if not (out / run_dir.FOLDER).exists():
      raise
    run_dir.write_config(out, config, overwrite=True)
    return job_lib.prepare(config, out, corpus, setup)


def _finish(
  config: schema.Config,
  job: Job,
  state: Any,
  reported: dict[str, pathlib.Path],
  stopped: Callable[[], bool],
) -> Record | None:
  """Trains to the end; the outcome for the record, None if it was stopped.

  Args:
    config: The run.
    job: Its parts.
    state: Its training state, which is new or of a checkpoint.
    reported: Texts by which nothing is selected, by the name of their loss.
    stopped: Called once per step; whether to stop.
  """
  clock, sizes = Clock(stopped), _sizes(state)
  try:
    outcome = loop.train(job, state, clock)
  except Diverged as error:
    return {"status": "diverged", "why": str(error)[:200], "bytes": sizes}
  if outcome.stopped:
    return None
  history = metrics.read(job.out / metrics.FILE)
  losses = [(r["step"], r["loss"]) for r in history if "loss" in r]
  scores = [
    (r["step"], r["held_out_loss"]) for r in history if "held_out_loss" in r
  ]
  losses_after = {
    name: _loss_on(path, config, job, outcome.state)
    for name, path in reported.items()
  }
  # The log leaves out numbers that are not finite.
  finite = all(map(math.isfinite, losses_after.values()))
  if scores[-1][0] != config.train.steps or not finite:
    why = "no finite loss at the end"
    return {"status": "diverged", "why": why, "bytes": sizes}
  return {
    "status": "done",
    "validation_loss": scores[-1][1],
    **losses_after,
    "bytes": sizes,
    **_times(clock.steps, history),
    "curve": _averaged(losses),
    **stability.summarize(losses, outcome.state.opt_state),
    "validation_curve": [[s, round(loss, 5)] for s, loss in scores],
    "skipped": int(outcome.state.skipped),
  }


def _sizes(state: Any) -> dict[str, int]:
  return {
    "optimizer": galore_optax.state_bytes(state.opt_state),
    "weights": galore_optax.state_bytes(state.params),
  }


def _times(cpu: list[float], history: list[Record]) -> dict[str, float]:
  """Medians over the steps, without the first few."""
  cpu = cpu[2:] or cpu
  rates = [r["tokens_per_second"] for r in history if "tokens_per_second" in r]
  times = {}
  if cpu:
    times["cpu_seconds_a_step"] = round(statistics.median(cpu), 4)
  if rates:
    times["tokens_per_second"] = round(statistics.median(rates), 1)
  return times


def _loss_on(
  path: pathlib.Path, config: schema.Config, job: Job, state: Any
) -> float:
  """The loss on a text by which nothing is selected."""
  data = dataclasses.replace(
    config.data, validation=str(path), eval_rows=TEST_ROWS
  )
  corpus = corpus_lib.prepare(data, config.model.vocab_size)
  sums = [
    job.eval_step(state.params, job.put(rows))
    for rows in corpus_lib.evaluation_batches(corpus.held_out, data.batch)
  ]
  totals, counts = np.asarray(jax.device_get(sums), np.float64).T
  return float(totals.sum() / counts.sum())


def _averaged(points: list[tuple[int, float]]) -> list[list[float]]:
  """A curve of `POINTS` points: last step and mean loss of each stretch."""
  stretches = np.array_split(np.array(points), min(POINTS, len(points)))
  return [
    [int(part[-1, 0]), round(float(part[:, 1].mean()), 4)] for part in stretches
  ]


def _identity(run: Run, config: schema.Config, parts: texts.Parts) -> Record:
  """What was run, when and where."""
  return {
    "key": run.key,
    "entry": run.variant.name,
    "learning_rate": run.rate,
    "multiplier": run.multiplier,
    "seed": run.seed,
    "tokens": run.tokens,
    "steps": config.train.steps,
    "text": run.text,
    **machine.provenance(command(run, parts)),
  }
