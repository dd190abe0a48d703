"""Tiny models and texts, and the training steps compiled on them once."""

import dataclasses
import functools
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
# With all parts that LLaMA lacks: biases, norms of heads, a width of its own,
# and a window in one layer.
QWEN = dataclasses.replace(
  TINY,
  family="qwen3",
  n_kv_heads=2,
  head_dim=12,
  attention_bias="all",
  qk_norm=True,
  sliding_window=5,
  window_layers="1",
  rope_scaling="yarn",
  rope_factor=4.0,
  rope_original_length=8,
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


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
  """One device, as on a user's machine; every program compiled once.

  For runs that are made again: also subprocesses find the compiled programs.
  """
  found, cache = jax.devices, str(tmp_path_factory.mktemp("compiled"))
  variables = {
    "jax_compilation_cache_dir": cache,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in variables}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda *names: found(*names)[:1])
    for name, value in variables.items():
      jax.config.update(name, value)
      patch.setenv(name.upper(), str(value))
    yield
  for name, value in before.items():
    jax.config.update(name, value)


@functools.cache
def weights(model: schema.ModelConfig) -> dict:
  """Fresh weights of a model, on the host; drawing them compiles slowly."""
  return jax.device_get(jax.jit(lambda: llama.init(model, 0))())


@dataclasses.dataclass
class Trainer:
  """A tiny model on a mesh, with its compiled steps."""

  mesh: jax.sharding.Mesh
  abstract: train_step_lib.AbstractState
  tx: Any
  train_step: Any
  eval_step: Any
  model: schema.ModelConfig = TINY

  @functools.cached_property
  def fresh(self) -> train_step_lib.TrainState:
    """The initial state, on the host."""
    with jax.set_mesh(self.mesh):
      return jax.device_get(
        train_step_lib.init_state(
          self.tx, self.abstract, 0, weights(self.model)
        )
      )

  def init(self) -> train_step_lib.TrainState:
    return jax.device_put(self.fresh, self.abstract.shardings)

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
