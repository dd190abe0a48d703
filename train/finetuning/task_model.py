"""The interface of a model that is fine-tuned on a task."""

import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import jax
from flax import nnx

from train.finetuning.batches import Batch
from train.finetuning.examples import Split
from train.finetuning.tasks import Task


class TaskModel(Protocol):
  """A model with a head for a task: `EncoderTaskModel`, `LlamaTaskModel`."""

  task: Task
  length: int  # tokens of a row, at most
  graphdef: nnx.GraphDef
  boxes: nnx.State  # shapes of the parameters, with the names of their axes
  # Regular expressions of weights that are trained in full beside adapters.
  trained_in_full: tuple[str, ...]

  @property
  def has_dropout(self) -> bool:
    """Whether `loss` uses a random key."""
    ...

  @property
  def params(self) -> dict:
    """The weights to start from, on the host."""
    ...

  def describe(self) -> str:
    """The model's kind and sizes, in half a line."""
    ...

  def tokenize(self, split: Split) -> Any:
    """Tokenizes a split: an object with `split`, `rows` and `lengths`."""
    ...

  def collate(self, tokenized: Any, rows: Sequence[int], size: int) -> Batch:
    """A batch of `size` rows, of which those after `rows` are padding.

    Args:
      tokenized: a tokenized split.
      rows: indices of its rows.
      size: number of rows in the batch.
    """
    ...

  def outputs(self, weights: dict, batch: Any) -> Any:
    """Logits, or log-likelihoods, of each row."""
    ...

  def loss(self, weights: dict, batch: Any, key: jax.Array | None) -> jax.Array:
    """The loss, summed over the batch; a key switches dropout on."""
    ...

  def count_items(self, batch: Any) -> jax.Array:
    """Number of items the loss averages over."""
    ...

  def count_tokens(self, batch: Any) -> jax.Array:
    """Number of tokens that the model reads."""
    ...

  def predict(self, tokenized: Any, outputs: dict[int, Any]) -> Any:
    """A prediction for each example, from the outputs of its rows."""
    ...

  def save(self, out: pathlib.Path, weights: dict) -> None:
    """Writes the trained model as a folder that `transformers` reads."""
    ...
