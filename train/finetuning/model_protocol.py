"""What a model must be able to do to be fine-tuned on a task."""

import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import jax
from flax import nnx

from train.finetuning.batches import Batch
from train.finetuning.examples import Split
from train.finetuning.tasks import Task


class Learner(Protocol):
  """A model with its head: `EncoderLearner`, `LlamaLearner`."""

  task: Task
  graphdef: nnx.GraphDef
  boxes: nnx.State  # of the parameters' shapes and axes
  # Leaves beside the blocks that are trained where the rest is frozen.
  full: tuple[str, ...]

  @property
  def random(self) -> bool:
    """Whether the loss takes a key: there is dropout."""
    ...

  @property
  def params(self) -> dict:
    """The weights to start from, on the host."""
    ...

  def describe(self) -> str:
    """The model in half a line."""
    ...

  def prepare(self, split: Split) -> Any:
    """Tokenises a split: its `split`, `rows` and their `lengths`."""
    ...

  def collate(self, prepared: Any, chosen: Sequence[int], count: int) -> Batch:
    """A batch of `count` rows; those that are missing count for nothing."""
    ...

  def outputs(self, weights: dict, batch: Any) -> Any:
    """What the model says of each row."""
    ...

  def loss(self, weights: dict, batch: Any, key: jax.Array | None) -> jax.Array:
    """The summed loss; `key` switches dropout on."""
    ...

  def count(self, batch: Any) -> jax.Array:
    """By what the summed loss is divided."""
    ...

  def tokens(self, batch: Any) -> jax.Array:
    """Tokens that are read."""
    ...

  def decide(self, prepared: Any, outputs: dict[int, Any]) -> Any:
    """The answer to each example, from the outputs of its rows."""
    ...

  def save(self, out: pathlib.Path, weights: dict) -> None:
    """Writes the trained model as a folder that `transformers` reads."""
    ...
