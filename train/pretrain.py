"""Pre-trains a LLaMA: `python -m train.pretrain`.

With no arguments it trains the preset `sotu_small` with GaLore on the bundled
text, on whatever devices JAX finds. `--help` shows the flags. The folder of
the run gets config.json, metrics.jsonl, tokenizer.json, checkpoints/, run.png
and sample.txt; the same command continues a run that was stopped.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax
from train import checkpoint, data, files, metrics, optimizer, plot, presets
from train import config as configs
from train import mesh as meshes
from train import sample as samples
from train import step as steps
from train.errors import TrainingError, UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """What the loop works with, built once by `prepare`."""

  config: configs.Config
  out: pathlib.Path
  corpus: data.Corpus
  sharding: jax.sharding.NamedSharding  # of a batch
  placed: steps.Placed
  tx: optax.GradientTransformationExtraArgs
  rates: np.ndarray  # (steps,) learning rate of each step
  train_step: Any  # jitted
  eval_step: Callable
  checkpoints: checkpoint.Checkpoints
  log: metrics.Log


def run(config: configs.Config, out: pathlib.Path, overwrite: bool) -> int:
  """Trains, evaluates and reports one run; returns the exit status."""
  checkpoint.check_run(out, config, overwrite)
  mesh = meshes.make_mesh(config.mesh, config.data.batch)
  corpus = data.prepare(config.data, config.model.vocab_size)
  checkpoint.claim_run(out, config, overwrite)
  files.write_text(out / "tokenizer.json", corpus.tokenizer.to_str())
  with jax.set_mesh(mesh), stop_requests() as stopped:
    job, state = prepare(config, out, corpus, mesh)
    try:
      state = train(job, state, stopped)
    finally:
      job.checkpoints.close()
      job.log.close()
    if stopped():
      print(
        f"stopped after step {int(state.step)}, which is saved; the same"
        " command continues from there"
      )
      return 130
    report(job, state)
  return 0


def prepare(
  config: configs.Config,
  out: pathlib.Path,
  corpus: data.Corpus,
  mesh: jax.sharding.Mesh,
) -> tuple[Job, steps.TrainState]:
  """Lays the model out, makes or restores its state, compiles the steps."""
  tx = optimizer.make_optimizer(config.optimizer, config.train.steps)
  placed = steps.place(config.model, tx, mesh)
  checkpoints = checkpoint.Checkpoints(out, config.run.keep)
  if checkpoints.latest is None:
    state = steps.init_state(config.model, tx, placed, config.train.seed)
  else:
    state = checkpoints.restore(placed)
    print(f"continuing from the checkpoint of step {checkpoints.latest}")
  schedule = optimizer.make_schedule(config.optimizer, config.train.steps)
  job = Job(
    config=config,
    out=out,
    corpus=corpus,
    sharding=meshes.batch_sharding(mesh),
    placed=placed,
    tx=tx,
    rates=np.asarray(jax.vmap(schedule)(jnp.arange(config.train.steps))),
    train_step=steps.make_train_step(tx, placed),
    eval_step=steps.make_eval_step(placed),
    checkpoints=checkpoints,
    log=metrics.Log(out, checkpoints.latest or 0),
  )
  introduce(job, mesh)
  return job, state


def introduce(job: Job, mesh: jax.sharding.Mesh) -> None:
  """Says what is going to be trained, on what."""
  config, corpus = job.config, job.corpus
  count = sum(x.size for x in jax.tree.leaves(job.placed.state.params))
  shape = " x ".join(f"{n} {axis}" for axis, n in mesh.shape.items())
  print(
    f"model      {count:,} parameters, {config.model.n_layers} layers,"
    f" d_model {config.model.d_model}, {config.model.dtype}\n"
    f"data       {corpus.train.size:,} training tokens,"
    f" {corpus.held_out.size:,} held out; a step reads"
    f" {config.data.batch} x {config.data.length}\n"
    f"optimizer  {config.optimizer.name}\n"
    f"devices    {mesh.size} {jax.devices()[0].device_kind}: {shape}\n"
    f"folder     {job.out}"
  )
  if config.optimizer.name.startswith("galore"):
    print(f"\n{galore_optax.describe(job.tx, job.placed.state.params)}\n")


def train(
  job: Job, state: steps.TrainState, stopped: Callable[[], bool]
) -> steps.TrainState:
  """The training loop, from the state's step to the last or to a stop."""
  config, start = job.config, int(state.step)
  if start == 0:
    evaluate(job, state, print)
  if start == config.train.steps:
    return state
  compiled = compile_step(job, state)
  progress = metrics.Progress(start, config.train.steps, config.run.log_every)
  speed = metrics.Throughput()
  pending = None  # the step whose metrics are not fetched yet

  with contextlib.closing(progress), jax.transfer_guard("disallow"):
    for index in range(start, config.train.steps):
      state, values = compiled(state, next_batch(job, index))
      # Step t runs while the numbers of step t - 1 are fetched and shown.
      if pending is not None:
        record(job, progress, speed, *pending)
      pending = (index + 1, values)
      due = actions(config, index + 1, stopped())
      if not due:
        continue
      record(job, progress, speed, *pending)
      pending = None
      if "evaluate" in due:
        evaluate(job, state, progress.say)
      if "save" in due:
        job.checkpoints.save(state)
      speed.pause()
      if stopped():
        break
  return state


def actions(config: configs.Config, step: int, stopping: bool) -> set[str]:
  """What is due after `step` updates: `evaluate` and `save`."""
  last = step == config.train.steps
  due = set()
  if last or step % config.run.eval_every == 0:
    due.add("evaluate")
  if last or stopping or step % config.run.checkpoint_every == 0:
    due.add("save")
  return due


def next_batch(job: Job, index: int) -> jax.Array:
  """The rows of step `index` on the devices."""
  config = job.config
  rows = data.batch_at(
    job.corpus.train, config.data.batch, config.train.seed, index
  )
  return meshes.put_batch(rows, job.sharding)


def compile_step(job: Job, state: steps.TrainState) -> Callable:
  """Compiles the training step for exactly these shapes and shardings."""
  begin = time.perf_counter()
  rows = next_batch(job, 0)
  compiled = job.train_step.lower(state, rows).compile()
  print(f"compiled   in {time.perf_counter() - begin:.1f} s", flush=True)
  return compiled


def record(
  job: Job,
  progress: metrics.Progress,
  speed: metrics.Throughput,
  step: int,
  values: dict[str, jax.Array],
) -> None:
  """Fetches the numbers of a step, shows them, and logs some.

  Raises:
    TrainingError: the loss or the gradient is not finite.
  """
  fetched = {name: float(x) for name, x in jax.device_get(values).items()}
  config = job.config
  if not all(map(math.isfinite, fetched.values())):
    raise TrainingError(
      f"step {step}: loss {fetched['loss']}, gradient norm"
      f" {fetched['grad_norm']}; the newest checkpoint is of step"
      f" {job.checkpoints.latest or 0}. Try a smaller"
      f" optimizer.learning_rate (now {config.optimizer.learning_rate}), a"
      " longer optimizer.warmup or optimizer.clip"
    )
  tokens = config.data.batch * config.data.length
  speed.update(tokens)
  lr = float(job.rates[step - 1])
  progress.update(step, fetched["loss"], lr, speed.rate, tokens)
  if step % config.run.log_every == 0 or step == config.train.steps:
    rate = round(speed.rate, 1)
    job.log.write(step, **fetched, lr=lr, tokens_per_second=rate)


def evaluate(
  job: Job, state: steps.TrainState, say: Callable[[str], None]
) -> float:
  """Held-out perplexity, said and logged: exp of the mean loss a token."""
  config, held_out = job.config.data, job.corpus.held_out
  sums = [
    job.eval_step(
      state.params,
      meshes.put_batch(rows, job.sharding),
      meshes.put_batch(weights, job.sharding),
    )
    for rows, weights in data.evaluation_batches(
      held_out, config.batch, config.eval_rows
    )
  ]
  total, count = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
  loss, step = total / count, int(jax.device_get(state.step))
  perplexity = math.exp(min(loss, 700))
  known = unigram(job)
  say(
    f"step {step:>5}  held-out loss {loss:.4f}, perplexity {perplexity:,.2f}"
    f"  (unigram model {known:,.2f})"
  )
  job.log.write(
    step,
    held_out_loss=loss,
    held_out_perplexity=perplexity,
    unigram_perplexity=known,
  )
  return perplexity


@functools.cache
def unigram(job: Job) -> float:
  """Held-out perplexity of token frequencies, on the rows `evaluate` reads."""
  config = job.config
  rows = data.evaluation_rows(job.corpus.held_out, config.data.eval_rows)
  return data.unigram_perplexity(
    job.corpus.train, rows[:, 1:], config.model.vocab_size
  )


def report(job: Job, state: steps.TrainState) -> None:
  """The end of a run: memory table, sample, picture."""
  config, params = job.config, job.placed.state.params
  sizes = [
    (x.size, hit)
    for x, hit in zip(
      jax.tree.leaves(params),
      jax.tree.leaves(optimizer.matrices(params)),
      strict=True,
    )
  ]
  table = metrics.memory_table(
    sum(size for size, _ in sizes),
    sum(size for size, hit in sizes if hit),
    optimizer.accounting(config.optimizer, params),
  )
  text = samples.sample_text(
    job.placed.graphdef,
    state.params,
    job.corpus.tokenizer,
    config.run.prompt,
    config.run.sample_tokens,
    config.run.temperature,
    config.train.seed,
  )
  files.write_text(job.out / "sample.txt", text + "\n")
  picture = plot.draw(job.out, f"{config.preset}, {config.optimizer.name}")
  print(f"\n{table}\n\nsample: {text}\n")
  print(f"checkpoint {job.out / checkpoint.FOLDER}/{job.checkpoints.latest}")
  print(f"picture    {picture}")


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
  """Turns Ctrl-C and SIGTERM into a request that the loop asks for.

  A signal may come while a step holds the donated state, which cannot be
  saved then: the step is finished first. A second signal ends the program.

  Yields:
    A function that says whether a stop was asked for.
  """
  asked = []

  def handle(number: int, frame: object) -> None:
    if asked:
      raise KeyboardInterrupt
    asked.append(number)

  signals = (signal.SIGINT, signal.SIGTERM)
  before = {number: signal.signal(number, handle) for number in signals}
  try:
    yield lambda: bool(asked)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.pretrain",
    description="Pre-trains a LLaMA with GaLore or one of its peers.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="presets:\n"
    + presets.summary()
    + "\n\nfields for --set:\n"
    + configs.summary(presets.make("sotu_small", "galore")),
  )
  parser.add_argument("--preset", default="sotu_small", metavar="NAME")
  parser.add_argument(
    "--optimizer",
    default="galore",
    metavar="NAME",
    help=", ".join(configs.OPTIMIZERS),
  )
  parser.add_argument(
    "--set",
    action="append",
    default=[],
    dest="settings",
    metavar="GROUP.FIELD=VALUE",
    help="changes one field of the preset; may be repeated",
  )
  parser.add_argument(
    "--out", type=pathlib.Path, help="default: runs/PRESET-OPTIMIZER"
  )
  parser.add_argument(
    "--overwrite", action="store_true", help="delete an earlier run in --out"
  )
  return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
  """The command: 0 done, 1 diverged, 2 wrong input, 130 stopped."""
  flags = parse_arguments(arguments)
  try:
    config = presets.make(flags.preset, flags.optimizer)
    config = configs.override(config, flags.settings)
    default = f"{flags.preset}-{config.optimizer.name}"
    return run(
      config, flags.out or pathlib.Path("runs") / default, flags.overwrite
    )
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except TrainingError as error:
    print(f"stopped: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("interrupted before there was anything to save", file=sys.stderr)
    return 130


if __name__ == "__main__":
  sys.exit(main())
