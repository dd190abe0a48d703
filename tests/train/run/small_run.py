"""A tiny run of pre-training, and how two of them are compared.

What is compared are the losses of every step and the final checkpoint, bit for
bit.
"""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np

from train.config import presets, schema
from train.models import llama
from train.parallel import mesh as mesh_lib
from train.run import checkpoint, metrics
from train.run.run_dir import FOLDER
from train.step import optimizer
from train.step import state as state_lib

ROOT = pathlib.Path(__file__).parents[3]
SETTINGS = {
  "data.length": 16,
  "data.batch": 8,
  "model.vocab_size": 300,
  "model.d_model": 16,
  "model.d_ff": 32,
  "model.n_layers": 2,
  "model.n_heads": 2,
  "optimizer.rank": 4,
  "optimizer.update_proj_gap": 3,
  "optimizer.learning_rate": 0.01,
  "train.steps": 12,
  "run.eval_every": 6,
  "run.checkpoint_every": 4,
  "run.log_every": 1,
  "run.sample_tokens": 0,
  "run.watch": "none",
  "mesh.data": 1,
}


def losses(out):
  records = metrics.read(out / metrics.FILE)
  return [(r["step"], r["loss"]) for r in records if "loss" in r]


def steps_of(out):
  return sorted(int(p.name) for p in (out / FOLDER).iterdir())


def final(out):
  """The state of the last checkpoint, read without the run's own code."""
  config = schema.override(
    presets.make("sotu_small", "galore"),
    [f"{k}={v}" for k, v in SETTINGS.items()],
  )
  model = config.model
  tx = optimizer.make_optimizer(config.optimizer, 12)
  mesh = mesh_lib.make_mesh(schema.MeshConfig(), 8)
  state, progress = checkpoint.restore(
    out, state_lib.abstract_state(model, *llama.abstract(model), tx, mesh)
  )
  assert int(state.step) == 12
  return state, progress


def assert_same_run(out, whole):
  assert losses(out) == losses(whole)
  assert [n for n, _ in losses(out)] == list(range(1, 13))
  (state, progress), (expected, reference) = final(out), final(whole)
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  assert progress.data == reference.data


def drive(harm, argument, out, flags, *before):
  """Runs the driver; returns the finished process."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=1",
  }
  return subprocess.run(
    [*before, sys.executable, "-m", "tests.train.run.driver", harm,
     str(argument), "--", "--out", str(out), *flags],
    cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
