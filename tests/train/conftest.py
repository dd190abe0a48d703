"""Tiny models and texts, and the training steps compiled on them once."""

import dataclasses
import functools
import random
import signal
from typing import Any

import jax
import pytest

from train import plot
from train.config import schema
from train.models import llama
from train.parallel import mesh as mesh_lib
from train.step import losses as losses_lib
from train.step import optimizer
from train.step import state as state_lib
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
EXPERTS = dataclasses.replace(
  TINY,
  family="qwen3_moe",
  d_ff=24,
  n_kv_heads=2,
  qk_norm=True,
  n_experts=4,
  n_active_experts=2,
  norm_topk_prob=False,
  router_aux_loss_coef=0.05,
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
def one_device():
  """One device, as on a user's machine."""
  found = jax.devices
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda *names: found(*names)[:1])
    yield


@pytest.fixture(scope="module")
def undrawn():
  """Runs without pictures: drawing is slow, and has tests of its own."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plot, "draw", lambda out, title: out / title)
    yield


@pytest.fixture
def ctrl_c():
  """Ctrl-C as in a terminal; tests started in the background ignore it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@functools.cache
def weights(model: schema.ModelConfig) -> dict:
  """Fresh weights of a model, on the host; drawing them compiles slowly."""
  return jax.device_get(jax.jit(lambda: llama.init(model, 0))())


@dataclasses.dataclass
class Trainer:
  """A tiny model on a mesh, with its compiled steps."""

  mesh: jax.sharding.Mesh
  abstract: state_lib.AbstractState
  tx: Any
  train_step: Any
  eval_step: Any
  model: schema.ModelConfig = TINY

  @functools.cached_property
  def fresh(self) -> state_lib.TrainState:
    """The initial state, on the host."""
    with jax.set_mesh(self.mesh):
      return jax.device_get(
        state_lib.init_state(self.tx, self.abstract, 0, weights(self.model))
      )

  def init(self) -> state_lib.TrainState:
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
  reduce: str = "float32",
  **fields,
) -> Trainer:
  grid = mesh_lib.make_mesh(
    schema.MeshConfig(fsdp=fsdp, tensor=tensor), 8, jax.devices()[:devices]
  )
  settings: Any = {"learning_rate": 1e-2, "rank": 4, "update_proj_gap": 3}
  chosen = schema.OptimizerConfig(name=name, **(settings | fields))
  tx = optimizer.make_optimizer(chosen, steps=20)
  with jax.set_mesh(grid):
    abstract = state_lib.abstract_state(model, *llama.abstract(model), tx, grid)
  return Trainer(
    grid,
    abstract,
    tx,
    train_step_lib.make_train_step(
      tx, abstract, train or schema.TrainConfig(), reduce=reduce
    ),
    losses_lib.make_eval_step(abstract),
    model,
  )


@pytest.fixture(scope="session")
def trainer():
  """GaLore on one device."""
  return make_trainer("galore", devices=1)
