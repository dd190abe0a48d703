"""A training run in a temporary folder, prepared to be measured."""

import contextlib
import io
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from train.config import schema
from train.data import corpus as corpus_lib
from train.parallel import mesh as mesh_lib
from train.run import job as job_lib
from train.run import loop, run_dir, subspace_watch
from train.step import setup as setup_lib
from train.step.state import TrainState


class Trial(NamedTuple):
  """The parts of a prepared run.

  Attributes:
    job: What the training loop works with.
    state: The initial training state.
    setup: The model and the optimizer, on the run's mesh.
  """

  job: job_lib.Job
  state: TrainState
  setup: setup_lib.Setup

  def compile_step(self) -> Callable:
    """Compiles the training step, without printed output."""
    with contextlib.redirect_stdout(io.StringIO()):
      return loop.compile_step(self.job, self.state)


@contextlib.contextmanager
def start(config: schema.Config, *, watch: bool = False) -> Iterator[Trial]:
  """Prepares a run as `train.pretrain` does, without its printed output.

  Args:
    config: The run.
    watch: Whether the run watches subspaces, as `run.watch` of the config says.

  Yields:
    The prepared run, with its mesh set. At the end the job is closed and its
    folder deleted.
  """
  mesh = mesh_lib.make_mesh(config.mesh, config.data.batch)
  corpus = corpus_lib.prepare(config.data, config.model.vocab_size)
  with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
    out = pathlib.Path(folder)
    run_dir.write_config(out, config, overwrite=False)
    with contextlib.redirect_stdout(io.StringIO()):
      setup = setup_lib.make(config, mesh)
      watcher = None
      if watch:
        watcher = subspace_watch.Watcher(
          config.run, config.optimizer, setup, config.parts
        )
      job, state = job_lib.prepare(config, out, corpus, setup, watcher)
    with contextlib.closing(job):
      yield Trial(job, state, setup)
