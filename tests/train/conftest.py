"""Tiny models and texts, and the training steps compiled on them once."""

import dataclasses
import random
from typing import Any

import jax
import pytest

from train.config import schema
from train.models import llama
from train.parallel import mesh as mesh_lib
from train.step import optimizer
from train.step import train_step as train_step_lib

TINY = schema.ModelConfig(
  vocab_size=300, d_model=32, d_ff=48, n_layers=2, n_heads=4
)
WORDS = [
  "we",
  "the",
  "people",
  "of",
  "these",
  "states",
  "hold",
  "that",
  "union",
  "and",
  "peace",
  "are",
  "one",
]


def speech(count: int, seed: int = 0) -> str:
  """`count` paragraphs of random words, as one text."""
  chosen = random.Random(seed)
  return "\n\n".join(
    " ".join(chosen.choices(WORDS, k=40)) + "." for _ in range(count)
  )


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("text") / "speech.txt"
  path.write_text(speech(120), encoding="utf-8")
  return path


@pytest.fixture(scope="session")
def rows():
  """(8, 17) token ids in which each token tells its successor."""
  start = jax.random.randint(jax.random.key(1), (8, 1), 0, 50)
  return (start + jax.numpy.arange(17)) % 50


@dataclasses.dataclass
class Trainer:
  """A tiny model on a mesh, with its compiled steps."""

  mesh: jax.sharding.Mesh
  abstract: train_step_lib.AbstractState
  tx: Any
  train_step: Any
  eval_step: Any
  model: schema.ModelConfig = TINY

  def init(self, seed: int = 0) -> train_step_lib.TrainState:
    with jax.set_mesh(self.mesh):
      return train_step_lib.init_state(self.tx, self.abstract, seed)

  def put(self, array) -> jax.Array:
    return mesh_lib.put_batch(
      jax.device_get(array), mesh_lib.batch_sharding(self.mesh)
    )

  def losses(self, rows, count: int) -> list[float]:
    state, found = self.init(), []
    with jax.set_mesh(self.mesh):
      for _ in range(count):
        state, metrics = self.train_step(state, self.put(rows))
        found.append(float(metrics["loss"]))
    return found


def make_trainer(
  name: Any,
  devices: int,
  fsdp: int = 1,
  tensor: int = 1,
  train: schema.TrainConfig | None = None,
  model: schema.ModelConfig = TINY,
  **fields,
) -> Trainer:
  grid = mesh_lib.make_mesh(
    schema.MeshConfig(fsdp=fsdp, tensor=tensor), 8, jax.devices()[:devices]
  )
  settings: Any = {"learning_rate": 1e-2, "rank": 4, "update_proj_gap": 3}
  chosen = schema.OptimizerConfig(name=name, **(settings | fields))
  tx = optimizer.make_optimizer(chosen, steps=20)
  with jax.set_mesh(grid):
    abstract = train_step_lib.abstract_state(
      model, *llama.abstract(model), tx, grid
    )
  return Trainer(
    grid,
    abstract,
    tx,
    train_step_lib.make_train_step(tx, abstract, train or schema.TrainConfig()),
    train_step_lib.make_eval_step(abstract),
    model,
  )


@pytest.fixture(scope="session")
def trainer():
  """GaLore on one device."""
  return make_trainer("galore", devices=1)
