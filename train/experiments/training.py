"""One run: the loop of `train.pretrain`, then its score and what it took."""

import contextlib
import dataclasses
import datetime
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

POINTS = 500  # of a loss curve that are kept
ROWS = 256  # of the validation text; of the text reported on all, up to MOST
MOST = 2048


class Clock:
  """Processor seconds of the steps, taken where the loop asks to stop."""

  def __init__(self, stopped: Callable[[], bool]):
    self._stopped, self._last = stopped, math.nan
    self.steps: list[float] = []

  def __call__(self) -> bool:
    """Notes the time since the last step; whether a stop was asked for."""
    now = time.process_time()
    if not math.isnan(self._last):
      self.steps.append(now - self._last)
    self._last = now
    return self._stopped()


def settings(run: Run, parts: texts.Parts) -> list[str]:
  """What `--set` is given."""
  shape = schema.override(
    presets.make(tables.PRESET, run.entry.optimizer), list(run.settings)
  ).data
  steps = max(1, round(run.tokens / (shape.batch * shape.length)))
  gap = max(1, steps // run.entry.gaps)
  if run.entry.gaps < 10:  # a last basis for a few steps would be one more
    gap = -(-steps // run.entry.gaps)
  cycle = -(-2 * steps // run.entry.gaps)  # the last is as long as the others
  every = -(-steps // run.evaluations)
  return [
    *run.settings,
    f"data.path={parts.train}",
    f"data.validation={parts.validation}",
    f"data.eval_rows={ROWS}",
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
    *run.entry.settings,
  ]


def config_of(run: Run, parts: texts.Parts) -> schema.Config:
  """The run as the training script's config."""
  start = presets.make(tables.PRESET, run.entry.optimizer)
  return schema.override(start, settings(run, parts))


def command(run: Run, parts: texts.Parts) -> str:
  """The same training by hand."""
  words = ["--preset", tables.PRESET, "--optimizer", run.entry.optimizer]
  for setting in settings(run, parts):
    name, _, value = setting.partition("=")
    local = name in ("data.path", "data.validation")
    value = pathlib.Path(value).name if local else value
    words += ["--set", f"{name}={value}"]
  return f"python -m train.pretrain {shlex.join(words)}"


def train(
  run: Run,
  parts: texts.Parts,
  work: pathlib.Path,
  stopped: Callable[[], bool],
) -> Record | None:
  """Trains, or goes on with what a stop has left.

  Args:
    run: what to train.
    parts: files of the text.
    work: folder for checkpoints; what it prints goes to `log.txt` there.
    stopped: asked once a step whether to stop.

  Returns:
    The record of the finished or diverged run, None of one that was stopped.
  """
  config = config_of(run, parts)
  out = work / run.key
  try:
    run_dir.check_folder(out, config, overwrite=False)
    run_dir.write_config(out, config, overwrite=False)
  except UserError:  # what is left there is of no use
    run_dir.write_config(out, config, overwrite=True)
  corpus = corpus_lib.prepare(config.data, config.model.vocab_size)
  mesh = mesh_lib.make_mesh(config.mesh, config.data.batch)
  with aside(out / "log.txt"), jax.set_mesh(mesh):
    job, state = _prepare(config, out, corpus, mesh)
    try:
      found = _finish(config, job, state, parts, stopped)
    finally:
      job.close()
  jax.clear_caches()
  if found is None:
    return None
  return _heading(run, config, parts) | found


@contextlib.contextmanager
def aside(path: pathlib.Path) -> Iterator[None]:
  """Lets a run print into a file."""
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
  """The run's parts; anew if what a kill has left cannot be read."""
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
  parts: texts.Parts,
  stopped: Callable[[], bool],
) -> Record | None:
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
  test_loss = _test_loss(config, job, outcome.state, parts)
  # What is not finite is left out of the log.
  if scores[-1][0] != config.train.steps or not math.isfinite(test_loss):
    return {"status": "diverged", "why": "no finite loss at the end"} | {
      "bytes": sizes
    }
  return {
    "status": "done",
    "validation_loss": scores[-1][1],
    "test_loss": test_loss,
    "bytes": sizes,
    **_times(clock.steps, history),
    "curve": _thinned(losses),
    **stability.look(losses, outcome.state.opt_state),
    "validation_curve": [[s, round(loss, 5)] for s, loss in scores],
    "skipped": int(outcome.state.skipped),
  }


def _sizes(state: Any) -> dict[str, int]:
  return {
    "optimizer": galore_optax.state_bytes(state.opt_state),
    "weights": galore_optax.state_bytes(state.params),
  }


def _times(cpu: list[float], history: list[Record]) -> dict[str, float]:
  """Medians over the steps, the first few left out."""
  cpu = cpu[2:] or cpu
  rates = [r["tokens_per_second"] for r in history if "tokens_per_second" in r]
  found = {}
  if cpu:
    found["cpu_seconds_a_step"] = round(statistics.median(cpu), 4)
  if rates:
    found["tokens_per_second"] = round(statistics.median(rates), 1)
  return found


def _test_loss(
  config: schema.Config, job: Job, state: Any, parts: texts.Parts
) -> float:
  """The loss on the text that nothing is selected by."""
  data = dataclasses.replace(
    config.data, validation=str(parts.test), eval_rows=MOST
  )
  corpus = corpus_lib.prepare(data, config.model.vocab_size)
  sums = [
    job.eval_step(state.params, job.put(rows))
    for rows in corpus_lib.evaluation_batches(corpus.held_out, data.batch)
  ]
  totals, counts = np.asarray(jax.device_get(sums), np.float64).T
  return float(totals.sum() / counts.sum())


def _thinned(points: list[tuple[int, float]]) -> list[list[float]]:
  """Means over stretches of a curve: step and loss."""
  stretches = np.array_split(np.array(points), min(POINTS, len(points)))
  return [
    [int(part[-1, 0]), round(float(part[:, 1].mean()), 4)] for part in stretches
  ]


def _heading(run: Run, config: schema.Config, parts: texts.Parts) -> Record:
  """What was run, where and when."""
  return {
    "key": run.key,
    "entry": run.entry.name,
    "learning_rate": run.rate,
    "multiplier": run.multiplier,
    "seed": run.seed,
    "tokens": run.tokens,
    "steps": config.train.steps,
    "text": run.text,
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "machine": machine.machine(),
    "versions": machine.versions(),
    "command": command(run, parts),
  }
