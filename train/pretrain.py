"""Pre-trains a LLaMA: `python -m train.pretrain`.

Without arguments it trains the preset `sotu_small` with GaLore on the bundled
text, on all devices that JAX finds. `--help` lists the flags. The run's folder
gets config.json, metrics.jsonl, tokenizer.json, text.json, checkpoints/,
run.png and sample.txt. The same command continues a run that was stopped.
"""

import argparse
import contextlib
import pathlib
import sys

import jax

import galore_optax
from train import plot
from train import sample as sample_lib
from train.common import atomic_files, commands
from train.config import cli, presets, schema
from train.data import corpus as corpus_lib
from train.estimate import dry_run
from train.methods import registry
from train.methods.leaves import block_matrices
from train.parallel import mesh as mesh_lib
from train.parallel import multihost, peers
from train.pretrained import llama_checkpoint
from train.run import (
  checkpoint,
  exit_status,
  loop,
  metrics,
  run_dir,
  signals,
  sinks,
  subspace_watch,
)
from train.run import job as job_lib
from train.run.job import Job
from train.step import adapters, optimizer
from train.step import setup as setup_lib
from train.step import state as state_lib
from train.step.setup import Setup


def run(config: schema.Config, out: pathlib.Path, overwrite: bool) -> int:
  """Trains, evaluates and reports one run; returns the exit status."""
  sinks.parse_names(config.run.sinks)
  multihost.check_alike({"--out": out, **schema.flatten(config)})
  multihost.run_on_first(lambda: run_dir.check_folder(out, config, overwrite))
  mesh = mesh_lib.make_mesh(
    config.mesh,
    config.data.batch,
    accumulate=config.parts,
  )
  with jax.set_mesh(mesh):
    setup = setup_lib.make(config, mesh)
    watcher = subspace_watch.Watcher(
      config.run, config.optimizer, setup, config.parts
    )
  corpus = multihost.run_on_first_then_others(
    lambda: corpus_lib.prepare(config.data, config.model.vocab_size)
  )

  def write_folder(held: contextlib.ExitStack) -> None:
    held.enter_context(run_dir.held(out))
    run_dir.write_config(out, config, overwrite)
    run_dir.record_text(out, corpus)

  with (
    contextlib.ExitStack() as held,
    jax.set_mesh(mesh),
    exit_status.saying_what_is_saved(out),
  ):
    with signals.stop_requests() as stopped:
      multihost.run_on_first(lambda: write_folder(held))
      job, state = job_lib.prepare(
        config,
        out,
        corpus,
        setup,
        watcher,
        lambda: llama_checkpoint.initial_params(config),
      )
      introduce(config, corpus, setup, watcher, out)
      start = int(state.step)
      try:
        outcome = loop.train(job, state, signals.agreed_stop(stopped, mesh))
      finally:
        job.close()
    status = exit_status.report_end(job, outcome, start)
    if status is not None:
      return status
    report(config, corpus, setup.abstract, job, outcome.state)
    return 0


def introduce(
  config: schema.Config,
  corpus: corpus_lib.Corpus,
  setup: Setup,
  watcher: subspace_watch.Watcher,
  out: pathlib.Path,
) -> None:
  """Prints what is about to be trained, and on which data and devices."""
  count = sum(x.size for x in jax.tree.leaves(setup.abstract.weights))
  shape = " x ".join(f"{n} {axis}" for axis, n in setup.mesh.shape.items())
  print(
    f"model      {count:,} parameters, {config.model.n_layers} layers,"
    f" d_model {config.model.d_model}, {config.model.dtype}\n"
    f"data       {corpus.describe()}\n"
    f"optimizer  {_method(config)}\n"
    f"devices    {setup.mesh.size} {jax.devices()[0].device_kind}: {shape}\n"
    f"folder     {out}"
  )
  if not registry.get(config.optimizer.name).projects:
    return
  rows = dry_run.plan_rows(setup.plan, config.optimizer)
  print("", *dry_run.plan_table(rows), "", sep="\n")
  names = ", ".join(matrix.name for matrix in watcher.matrices)
  if names:
    print(f"subspaces  measured for {names} (run.watch)")
  elif config.run.watch != "none":
    print(f"subspaces  not measured: {watcher.why_not}")


def _method(config: schema.Config) -> str:
  """The optimizer and its settings, in one or two lines."""
  chosen, weights = config.optimizer, config.model.weights
  method = registry.get(chosen.name)
  text = f"{chosen.name}, learning rate {chosen.learning_rate:g}"
  text += f", weights in {weights}" if weights != "full" else ""
  if method.factors:
    text += f", factors of rank {chosen.rank}"
  if chosen.b2 == method.options.get("b2"):
    text += f"\n{'':11}b2 {chosen.b2:g}, as in its authors' code; GaLore's is"
    text += f" {schema.OptimizerConfig.b2:g}"
  return text


def report(
  config: schema.Config,
  corpus: corpus_lib.Corpus,
  abstract: state_lib.AbstractState,
  job: Job,
  state: state_lib.TrainState,
) -> None:
  """Reports a finished run: memory table, picture, sample."""
  params = abstract.weights
  sizes = [
    (x.size, is_matrix)
    for x, is_matrix in zip(
      jax.tree.leaves(params),
      jax.tree.leaves(block_matrices(params)),
      strict=True,
    )
  ]
  table = metrics.memory_table(
    sum(size for size, _ in sizes),
    sum(size for size, is_matrix in sizes if is_matrix),
    optimizer.accounting(
      config.optimizer,
      params,
      galore_optax.state_bytes(abstract.state.opt_state),
    ),
    optimizer.accounting_note(params),
  )
  print(f"\n{table}\n")
  if abstract.adapters is not None:
    print(f"weights    {adapters.weights_text(abstract.state.params)}\n")
  rare = metrics.refreshes_text(
    galore_optax.refresh_counts(state.opt_state),
    int(state.step),
    config.optimizer.update_proj_gap,
  )
  if rare:
    print(f"{rare}\n")
  if multihost.is_first():
    picture = plot.draw(job.out, f"{config.preset}, {config.optimizer.name}")
    print(f"checkpoint {job.out / run_dir.FOLDER}/{job.checkpoints.latest}")
    print(f"picture    {picture}")
  # This comes last, because it needs all weights at once, which may not fit on
  # a chip that trained them layer by layer.
  if jax.process_count() == 1 and config.run.sample_tokens:
    print(f"\nsample: {sample(config, corpus, abstract, job.out, state)}")


def sample(
  config: schema.Config,
  corpus: corpus_lib.Corpus,
  abstract: state_lib.AbstractState,
  out: pathlib.Path,
  state: state_lib.TrainState,
) -> str:
  """A text sampled from the trained model, also written to sample.txt."""
  run = config.run
  try:
    text = sample_lib.sample_text(
      config.model,
      abstract.read(state.params),
      corpus.tokenizer,
      run.prompt,
      run.sample_tokens,
      sample_lib.Sampling(run.temperature),
      config.train.seed,
    )
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return (
      f"none, because the whole weights do not fit on this device; run"
      f" python -m train.sample {out} on one where they fit"
    )
  atomic_files.write_text(out / "sample.txt", text + "\n")
  return text


def main(argv: list[str] | None = None) -> int:
  """Runs the command.

  Returns:
    The exit status: 0 done, 1 diverged, 2 wrong input, 130 stopped.
  """
  flags = cli.parse(argv)
  checkpoint.silence_orbax()
  return commands.run(lambda: _command(flags))


def _command(flags: argparse.Namespace) -> int:
  config = presets.make(flags.preset, flags.optimizer)
  config = presets.lean(config) if flags.lean else config
  if flags.source:
    chosen = schema.setting(flags.settings, "data.tokenizer")
    config = llama_checkpoint.adopt(config, flags.source, chosen)
  config = schema.override(config, flags.settings)
  default = f"{flags.preset}-{config.optimizer.name}"
  if flags.dry_run:
    return dry_run.main(config, flags.json)
  out = flags.out or pathlib.Path("runs") / default
  if not flags.overwrite:
    config = run_dir.goes_on_as_begun(out, config, flags.settings)
  multihost.connect(config.mesh)
  with (
    peers.watched(out / run_dir.FOLDER, config.mesh.lost_after),
    multihost.only_first_prints(),
  ):
    return run(config, out, flags.overwrite)


if __name__ == "__main__":
  sys.exit(main())
