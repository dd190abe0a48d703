"""Fine-tunes an encoder or a LLaMA: `python -m train.finetune`.

  python -m train.finetune --task rotten_tomatoes --from FOLDER

reads the checkpoint in FOLDER, trains it with GaLore on the task, prints its
scores before, during and after, and what it took in memory. `--help` shows
the tasks and the fields. The folder of the run gets config.json,
metrics.jsonl, checkpoints/, result.json, run.png and model/, which
`transformers` reads; the same command continues a run that was stopped.
"""

import argparse
import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from train import plot
from train.common.errors import Diverged, UserError
from train.config import cli, field_help
from train.config.schema import HUB
from train.data import corpus
from train.data.packing import spread
from train.finetuning import (
  encoders,
  evaluation,
  examples,
  llamas,
  recipes,
  report,
)
from train.finetuning import job as job_lib
from train.finetuning.batches import Feed
from train.finetuning.config import Config
from train.finetuning.tasks import TASKS, Task
from train.methods import table as methods
from train.parallel import mesh as mesh_lib
from train.parallel import multihost
from train.run import checkpoint, exit_status, loop, run_dir, signals, sinks
from train.run.job import Job


def arguments(words: list[str] | None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.finetune",
    description="Fine-tunes an encoder or a LLaMA on a task.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog=f"tasks: {', '.join(TASKS)}\n\nfields for --set, with their values"
    " in the default run:\n"
    + field_help.summary(
      recipes.make("rotten_tomatoes", "galore", 4), recipes.FLAGS
    ),
  )
  parser.add_argument("--task", default="rotten_tomatoes", metavar="NAME")
  parser.add_argument(
    "--from",
    dest="source",
    required=True,
    metavar="FOLDER",
    help=f"weights to start from: a folder of safetensors, or {HUB}NAME",
  )
  parser.add_argument(
    "--optimizer",
    default="galore",
    metavar="NAME",
    help=", ".join(recipes.METHODS) + "; default: galore",
  )
  parser.add_argument(
    "--rank",
    type=int,
    help="of GaLore or LoRA; default: the task's, mostly 4",
  )
  parser.add_argument(
    "--set",
    action="append",
    default=[],
    dest="settings",
    metavar="GROUP.FIELD=VALUE",
    help="changes one field of the recipe; may be repeated",
  )
  parser.add_argument(
    "--out", type=cli.folder, help="default: runs/TASK-OPTIMIZER"
  )
  parser.add_argument(
    "--overwrite", action="store_true", help="delete an earlier run in --out"
  )
  parser.add_argument(
    "--dry-run",
    action="store_true",
    help="only check everything and count the bytes that a run would take",
  )
  return parser.parse_args(words)


def make_config(flags: argparse.Namespace) -> Config:
  """The recipe of the task with what the command line changes of it."""
  config = recipes.make(flags.task, flags.optimizer, flags.rank)
  source = flags.source
  if not source.startswith(HUB):
    source = str(pathlib.Path(source).expanduser().resolve())
  train = dataclasses.replace(config.train, init=source)
  config = dataclasses.replace(config, train=train)
  return recipes.override(config, flags.settings)


def read_task(config: Config) -> examples.Examples:
  """The examples, all of them checked."""
  names = config.task
  labels = tuple(filter(None, map(str.strip, names.labels.split(","))))
  task = TASKS[names.name].named(names.first, names.second, names.label, labels)
  return examples.load(task, config.data, corpus.cache_folder(config.data))


def make_learner(found: examples.Examples, config: Config) -> Any:
  """The model with a head for the task."""
  source = config.train.init
  kind: Any = llamas if llamas.is_llama(source) else encoders
  return kind.make(source, found.task, config)


def make_material(
  learner: Any, found: examples.Examples, config: Config
) -> job_lib.Material:
  """The examples as the model reads them, and the order of the batches."""
  train = learner.prepare(found.train)
  count, batch = len(train.lengths), config.data.batch
  if count < batch:
    raise UserError(
      f"the training split has {count} rows, fewer than data.batch={batch};"
      " lower data.batch"
    )
  feed = Feed(
    train.lengths,
    lambda rows, size: learner.collate(train, rows, size),
    batch,
    config.task.group,
  )
  most = config.data.eval_rows
  evaluated = [
    learner.prepare(split.part(spread(len(split), most)))
    for split in found.evaluated
  ]
  return job_lib.Material(found.task, train, evaluated, feed)


def timed(config: Config, feed: Feed, settings: list[str]) -> Config:
  """The config with its steps counted in epochs."""
  if config.task.epochs:
    steps = max(1, round(config.task.epochs * feed.steps))
    train = dataclasses.replace(config.train, steps=steps)
    config = dataclasses.replace(config, train=train)
  if any(setting.startswith("run.eval_every=") for setting in settings):
    return config
  every = max(1, feed.steps // config.task.evaluations)
  return dataclasses.replace(
    config, run=dataclasses.replace(config.run, eval_every=every)
  )


def run(flags: argparse.Namespace, config: Config, out: pathlib.Path) -> int:
  """Trains, evaluates and reports one run; returns the exit status."""
  sinks.parse_names(config.run.sinks)
  found = multihost.run_on_first_then_others(lambda: read_task(config))
  learner = make_learner(found, config)
  material = make_material(learner, found, config)
  config = timed(config, material.feed, flags.settings)
  mesh = mesh_lib.make_mesh(
    config.mesh, config.data.batch, accumulate=config.train.accumulate
  )
  tx, placed = job_lib.lay_out(learner, config, mesh)
  if flags.dry_run:
    introduce(learner, material, placed, config)
    parts = report.components(placed, config, placed.state.opt_state)
    print(f"\n{report.table(parts)}")
    return 0
  multihost.run_on_first(
    lambda: run_dir.check_folder(out, config, flags.overwrite)
  )
  _check_source(config.train.init, out)
  multihost.run_on_first(
    lambda: run_dir.write_config(out, config, flags.overwrite)
  )
  digest = examples.digest(found)
  multihost.run_on_first(lambda: run_dir.record_examples(out, digest))
  with jax.set_mesh(mesh), signals.stop_requests() as stopped:
    job, state = job_lib.prepare(
      config, out, learner, material, mesh, tx, placed
    )
    introduce(learner, material, placed, config)
    print(f"folder     {out}")
    try:
      stop = signals.agreed_stop(stopped, mesh)
      return train(config, learner, placed, job, state, stop)
    except Diverged:
      if multihost.is_first():  # a result without scores
        report.write(out, config, {"scores": {}})
      raise


def _check_source(source: str, out: pathlib.Path) -> None:
  """Refuses to write a run over the checkpoint that it starts from."""
  inside = pathlib.Path(source).is_relative_to(out.resolve())
  if inside and not source.startswith(HUB):
    raise UserError(
      f"--from {source} lies in --out {out}, which the run would write over;"
      " name another --out"
    )


def train(
  config: Config,
  learner: Any,
  placed: Any,
  job: Job,
  state: Any,
  stopped: Callable[[], bool],
) -> int:
  """From the state to the end of the run; returns the exit status."""
  start = int(state.step)
  try:
    outcome = loop.train(job, state, stopped)
  finally:
    job.close()
  status = exit_status.report_end(job, outcome, start)
  if status is not None:
    return status
  conclude(config, learner, placed, job, outcome)
  return 0


def introduce(
  learner: Any, material: job_lib.Material, placed: Any, config: Config
) -> None:
  """Says what is going to be trained, on what."""
  count = sum(x.size for x in jax.tree.leaves(placed.weights))
  sizes = ", ".join(
    f"{prepared.split.name} {len(prepared.split):,}"
    for prepared in (material.train, *material.evaluated)
  )
  lengths = material.train.lengths
  cut = float((lengths >= learner.length).mean())
  print(
    f"model      {count:,} parameters, {learner.describe()}\n"
    f"task       {_describe(material.task)}\n"
    f"examples   {sizes}; {np.mean(lengths):.0f} tokens a row, {cut:.1%} of the"
    f" rows fill the {learner.length} that are read\n"
    f"optimizer  {_method(config)},"
    f" learning rate {config.optimizer.learning_rate:g},"
    f" {config.train.steps} steps of {config.data.batch} rows"
  )


def _method(config: Config) -> str:
  """The optimizer, with its rank where it has one."""
  chosen = config.optimizer
  method = methods.get(chosen.name)
  if method.factors or method.projects:
    return f"{chosen.name}, rank {chosen.rank}"
  return chosen.name


def _describe(task: Task) -> str:
  few = 0 < len(task.labels) <= 8
  labels = f": {', '.join(task.labels)}" if few else ""
  return f"{task.name}{labels}; scored by {', '.join(task.metrics)}"


def conclude(
  config: Config, learner: Any, placed: Any, job: Job, outcome: loop.Outcome
) -> None:
  """The end of a run: memory, scores, the model, a picture."""
  state = outcome.state
  found = evaluation.last(job.out, config.train.steps)
  parts = report.components(placed, config, state.opt_state)
  print(f"\n{report.table(parts)}\n\nscores     {evaluation.text(found)}")
  if not multihost.is_first():
    return
  report.write(job.out, config, {"scores": found, "bytes": parts})
  if jax.process_count() > 1 and config.task.export:
    print(
      "note       the trained model is not written, for several processes hold"
      " it; the same command in one process, on the same --out, writes it"
    )
  elif config.task.export:
    # As they are computed with, in the dtype in which they are kept: what is
    # read from eight bits has the model's.
    weights = jax.tree.map(
      lambda x: np.asarray(x).astype(config.model.param_dtype),
      jax.device_get(placed.read(state.params)),
    )
    shutil.rmtree(job.out / "model", ignore_errors=True)
    learner.save(job.out / "model", weights)
    print(f"model      {job.out / 'model'}")
  picture = plot.draw(job.out, f"{config.preset}, {config.optimizer.name}")
  print(f"checkpoint {job.out / run_dir.FOLDER}/{job.checkpoints.latest}")
  print(f"picture    {picture}")


def main(words: list[str] | None = None) -> int:
  """The command: 0 done, 1 diverged, 2 wrong input, 130 stopped."""
  return exit_status.report_errors(lambda: command(words))


def command(words: list[str] | None = None) -> int:
  """The command, with its errors: 0 done, 130 stopped.

  Raises:
    UserError: wrong input.
    TrainingError: it diverged, or could not be saved.
  """
  flags = arguments(words)
  checkpoint.silence_orbax()
  config = make_config(flags)
  default = f"{flags.task}-{config.optimizer.name}"
  out = flags.out or pathlib.Path("runs") / default
  multihost.connect(config.mesh)
  with multihost.only_first_prints():
    return run(flags, config, out)


if __name__ == "__main__":
  sys.exit(main())
