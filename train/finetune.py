"""Fine-tunes an encoder or a LLaMA: `python -m train.finetune`.

  python -m train.finetune --task rotten_tomatoes --from FOLDER

reads the checkpoint in FOLDER, trains it with GaLore on the task, and prints
its scores before, during and after training, and the memory it took. `--help`
lists the tasks and the fields. The run's folder gets config.json,
metrics.jsonl, checkpoints/, result.json, run.png and model/, which
`transformers` reads. The same command continues a run that was stopped.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import sys
import textwrap
from collections.abc import Generator
from typing import Any

import jax
import numpy as np

from train import plot
from train.common import commands, links
from train.common.errors import Diverged, UserError
from train.config import cli, field_help, schema
from train.config.schema import HUB
from train.data import corpus
from train.data.packing import evenly
from train.finetuning import (
  encoders,
  evaluation,
  llamas,
  recipes,
  report,
)
from train.finetuning import examples as examples_lib
from train.finetuning import job as job_lib
from train.finetuning.batches import TrainBatches
from train.finetuning.config import Config
from train.finetuning.task_model import TaskModel
from train.finetuning.tasks import TASKS, Task
from train.methods import registry
from train.parallel import mesh as mesh_lib
from train.parallel import multihost, peers
from train.run import checkpoint, exit_status, loop, run_dir, signals, sinks
from train.run.job import Job
from train.step.state import AbstractState, TrainState


def parse(argv: list[str] | None) -> argparse.Namespace:
  """Reads the command line."""
  default = recipes.make("rotten_tomatoes", "galore", 4)
  parser = argparse.ArgumentParser(
    prog="python -m train.finetune",
    description="Fine-tunes an encoder or a LLaMA on a task.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog=f"tasks:\n{_list_tasks()}\n\nfields for --set, with their values in"
    " the default run:\n\n" + field_help.summary(default, recipes.FLAGS),
  )
  add = parser.add_argument
  add(
    "--task",
    default="rotten_tomatoes",
    metavar="NAME",
    help="one of the tasks below; default: rotten_tomatoes",
  )
  add(
    "--from",
    dest="source",
    required=True,
    metavar="FOLDER",
    help="checkpoint to start from: a folder in Hugging Face's layout, a .gguf"
    f" file, or {HUB}NAME",
  )
  add(
    "--optimizer",
    default="galore",
    metavar="NAME",
    help=", ".join(recipes.METHODS) + "; default: galore",
  )
  add(
    "--rank",
    type=int,
    help="rank of GaLore or LoRA; default: the task's, in most cases 4",
  )
  add(
    "--set",
    action="append",
    default=[],
    dest="settings",
    metavar="GROUP.FIELD=VALUE",
    help="changes one field of the recipe; may be repeated",
  )
  add(
    "--out",
    type=cli.folder,
    help="folder of the run; default: runs/TASK-OPTIMIZER",
  )
  add("--overwrite", action="store_true", help="delete an earlier run in --out")
  add(
    "--dry-run",
    action="store_true",
    help="check all inputs and print the memory that a run would take",
  )
  return parser.parse_args(argv)


def _list_tasks() -> str:
  """The tasks by the kind of their predictions, for --help."""
  kinds = {
    "classify": "a class",
    "regress": "a number",
    "span": "a span of a context",
    "chat": "replies (LLaMA)",
  }
  lines = []
  for kind, what in kinds.items():
    names = ", ".join(t.name for t in TASKS.values() if t.kind == kind)
    indent = " " * 24
    lines += [
      textwrap.fill(
        names, 80, initial_indent=f"  {what:<22}", subsequent_indent=indent
      )
    ]
  return "\n".join(lines)


def make_config(flags: argparse.Namespace) -> Config:
  """The recipe of the task, with the changes of the command line."""
  config = recipes.make(flags.task, flags.optimizer, flags.rank)
  source = flags.source
  if not source.startswith(HUB):
    source = str(pathlib.Path(source).expanduser().resolve())
  train = dataclasses.replace(config.train, init=source)
  config = dataclasses.replace(config, train=train)
  return recipes.override(config, flags.settings)


def load_examples(config: Config) -> examples_lib.Examples:
  """Reads and checks the examples of the task."""
  names = config.task
  labels = tuple(filter(None, map(str.strip, names.labels.split(","))))
  task = TASKS[names.name].with_columns(
    names.first, names.second, names.label, labels
  )
  return examples_lib.load(task, config.data, corpus.cache_folder(config.data))


def load_model(examples: examples_lib.Examples, config: Config) -> TaskModel:
  """Reads the checkpoint as a model with a head for the task."""
  source = config.train.init
  module: Any = llamas if llamas.is_llama(source) else encoders
  return module.make(source, examples.task, config)


def tokenize(
  model: TaskModel, examples: examples_lib.Examples, config: Config
) -> job_lib.TaskData:
  """The examples as the model reads them, and the batches for training."""
  train = model.tokenize(examples.train)
  count, size = len(train.lengths), config.data.batch
  if count < size:
    raise UserError(
      f"the training split has {count} rows, fewer than data.batch={size};"
      " lower data.batch"
    )
  batches = TrainBatches(
    train.lengths,
    lambda rows, size: model.collate(train, rows, size),
    size,
    config.task.group,
  )
  evaluated = [
    model.tokenize(split.take(evenly(len(split), config.data.eval_rows)))
    for split in examples.evaluated
  ]
  return job_lib.TaskData(examples.task, train, evaluated, batches)


def set_steps(config: Config, per_epoch: int, settings: list[str]) -> Config:
  """Computes train.steps and run.eval_every from the number of epochs.

  Args:
    config: the config.
    per_epoch: batches in an epoch.
    settings: those of the command line, which may set run.eval_every.
  """
  if config.task.epochs:
    steps = max(1, round(config.task.epochs * per_epoch))
    train = dataclasses.replace(config.train, steps=steps)
    config = dataclasses.replace(config, train=train)
  if any(setting.startswith("run.eval_every=") for setting in settings):
    return config
  every = max(1, per_epoch // config.task.evaluations)
  return dataclasses.replace(
    config, run=dataclasses.replace(config.run, eval_every=every)
  )


def run(flags: argparse.Namespace, config: Config, out: pathlib.Path) -> int:
  """Trains, evaluates and reports one run; returns the exit status."""
  sinks.parse_names(config.run.sinks)
  multihost.check_alike({"--out": out, **schema.flatten(config)})
  examples = multihost.run_on_first_then_others(lambda: load_examples(config))
  model = load_model(examples, config)
  data = tokenize(model, examples, config)
  config = set_steps(config, data.batches.per_epoch, flags.settings)
  if not flags.overwrite:
    config = run_dir.goes_on_as_begun(out, config, flags.settings)
  mesh = mesh_lib.make_mesh(
    config.mesh, config.data.batch, accumulate=config.train.accumulate
  )
  tx, abstract = job_lib.setup(model, config, mesh)
  if flags.dry_run:
    print_start(model, data, abstract, config)
    parts = report.component_bytes(abstract, config, abstract.state.opt_state)
    print(f"\n{report.table(parts)}")
    return 0
  multihost.run_on_first(
    lambda: run_dir.check_folder(out, config, flags.overwrite)
  )
  _check_source(config.train.init, out)

  def write_folder(held: contextlib.ExitStack) -> None:
    held.enter_context(run_dir.held(out))
    run_dir.write_config(out, config, flags.overwrite)
    run_dir.record_examples(out, examples_lib.digest(examples))

  with (
    contextlib.ExitStack() as held,
    jax.set_mesh(mesh),
    exit_status.saying_what_is_saved(out),
  ):
    with signals.stop_requests() as stopped:
      multihost.run_on_first(lambda: write_folder(held))
      job, state = job_lib.prepare(config, out, model, data, mesh, tx, abstract)
      print_start(model, data, abstract, config)
      print(f"folder     {out}")
      start = int(state.step)
      try:
        with _recording_divergence(config, out):
          outcome = loop.train(job, state, signals.agreed_stop(stopped, mesh))
      finally:
        job.close()
    status = exit_status.report_end(job, outcome, start)
    if status is not None:
      return status
    with _recording_divergence(config, out):
      finish(config, model, abstract, job, outcome.state)
    return 0


@contextlib.contextmanager
def _recording_divergence(config: Config, out: pathlib.Path) -> Generator[None]:
  """Writes a result without scores if the loss is not finite at the end."""
  try:
    yield
  except Diverged:
    if multihost.is_first():
      report.write(out, config, {"scores": {}})
    raise


def _check_source(source: str, out: pathlib.Path) -> None:
  """Refuses to overwrite the checkpoint that a run starts from."""
  inside = pathlib.Path(source).is_relative_to(out.resolve())
  if inside and not source.startswith(HUB):
    raise UserError(
      f"--from {source} is in --out {out}, which the run would overwrite;"
      " name another --out"
    )


def print_start(
  model: TaskModel,
  data: job_lib.TaskData,
  abstract: AbstractState,
  config: Config,
) -> None:
  """Prints what is trained, on which examples, and how."""
  count = sum(x.size for x in jax.tree.leaves(abstract.weights))
  sizes = ", ".join(
    f"{tokenized.split.name} {len(tokenized.split):,}"
    for tokenized in (data.train, *data.evaluated)
  )
  lengths = data.train.lengths
  full = float((lengths >= model.length).mean())
  print(
    f"model      {count:,} parameters, {model.describe()}\n"
    f"task       {_describe(data.task)}\n"
    f"examples   {sizes}\n"
    f"rows       {np.mean(lengths):.0f} tokens on average; {full:.1%} have the"
    f" maximum of {model.length}\n"
    f"optimizer  {_method(config)},"
    f" learning rate {config.optimizer.learning_rate:g},"
    f" {config.train.steps} steps of {config.data.batch} rows"
  )


def _method(config: Config) -> str:
  """The optimizer's name, with its rank if it has one."""
  name = config.optimizer.name
  method = registry.get(name)
  if method.factors or method.projects:
    return f"{name}, rank {config.optimizer.rank}"
  return name


def _describe(task: Task) -> str:
  few = 0 < len(task.labels) <= 8
  labels = f": {', '.join(task.labels)}" if few else ""
  return f"{task.name}{labels}; scored by {', '.join(task.metrics)}"


def finish(
  config: Config,
  model: TaskModel,
  abstract: AbstractState,
  job: Job,
  state: TrainState,
) -> None:
  """Reports a complete run: memory, scores, the trained model, a picture."""
  scores = evaluation.final_scores(job.out, config.train.steps)
  parts = report.component_bytes(abstract, config, state.opt_state)
  print(f"\n{report.table(parts)}\n\nscores     {evaluation.describe(scores)}")
  if not multihost.is_first():
    return
  report.write(job.out, config, {"scores": scores, "bytes": parts})
  if jax.process_count() > 1 and config.task.export:
    print(
      "note       the trained model is not written, because it is divided over"
      " several processes; the same command in one process, with the same"
      " --out, writes it"
    )
  elif config.task.export:
    # In the dtype of the other parameters, also where weights have 8 bits.
    weights = jax.tree.map(
      lambda x: np.asarray(x).astype(config.model.param_dtype),
      jax.device_get(abstract.read(state.params)),
    )
    links.remove_folder(job.out / "model")
    model.save(job.out / "model", weights)
    print(f"model      {job.out / 'model'}")
  picture = plot.draw(job.out, f"{config.preset}, {config.optimizer.name}")
  print(f"checkpoint {job.out / run_dir.FOLDER}/{job.checkpoints.latest}")
  print(f"picture    {picture}")


def main(argv: list[str] | None = None) -> int:
  """The command: 0 done, 1 diverged, 2 wrong input, 130 stopped."""
  return commands.run(lambda: command(argv))


def command(argv: list[str] | None = None) -> int:
  """The command, which raises errors: 0 done, 130 stopped.

  Raises:
    UserError: wrong input.
    TrainingError: it diverged, or its state could not be saved.
  """
  flags = parse(argv)
  checkpoint.silence_orbax()
  config = make_config(flags)
  default = f"{flags.task}-{config.optimizer.name}"
  out = flags.out or pathlib.Path("runs") / default
  multihost.connect(config.mesh)
  with (
    peers.watched(out / run_dir.FOLDER, config.mesh.lost_after),
    multihost.only_first_prints(),
  ):
    return run(flags, config, out)


if __name__ == "__main__":
  sys.exit(main())
