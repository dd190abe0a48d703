"""An encoder with a head for a task: inputs, outputs and loss."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from train.common.errors import UserError
from train.finetuning import spans
from train.finetuning.batches import Batch
from train.finetuning.config import Config, TaskConfig
from train.finetuning.examples import Split
from train.finetuning.tasks import Task
from train.models import encoder
from train.pretrained import encoder_checkpoint

MASKED = -1e9  # logit of tokens that cannot be in an answer


@dataclasses.dataclass(frozen=True)
class TokenizedSplit:
  """A split as the model reads it."""

  split: Split
  # One row for each example, or for a question one window or several, which
  # cover its context.
  rows: Sequence[Any]
  targets: dict[str, np.ndarray]  # (n,) each
  lengths: np.ndarray  # (n,) tokens of each row


@dataclasses.dataclass(frozen=True, eq=False)
class EncoderTaskModel:
  """BERT or RoBERTa on a task of labels, numbers or spans."""

  task: Task
  config: TaskConfig
  length: int  # tokens of a row, at most
  loaded: encoder_checkpoint.Loaded
  graphdef: nnx.GraphDef
  boxes: nnx.State

  trained_in_full = (r"^(head|pooler)/",)

  @property
  def params(self) -> dict:
    """The weights to start from, on the host."""
    return self.loaded.params

  @property
  def has_dropout(self) -> bool:
    """Whether any dropout rate is above 0."""
    c = self.loaded.config
    return max(c.dropout, c.attention_dropout, c.head_dropout) > 0

  def describe(self) -> str:
    """The model's kind and sizes, in half a line."""
    c = self.loaded.config
    return f"{c.family}, {c.n_layers} layers, d_model {c.d_model}, {c.dtype}"

  def tokenize(self, split: Split) -> TokenizedSplit:
    """Tokenizes a split, and computes its targets."""
    tokenizer = self.loaded.tokenizer
    if self.task.kind == "span":
      assert split.second is not None
      rows: Sequence[Any] = tokenizer.windows(
        split.first,
        split.second,
        self.length,
        self.config.stride,
        self.config.query,
      )
      targets = spans.targets(rows, split.labels)
    else:
      rows = tokenizer.texts(split.first, split.second, self.length)
      dtype = np.float32 if self.task.kind == "regress" else np.int32
      targets = {"label": np.asarray(split.labels, dtype)}
    lengths = np.array([len(row.ids) for row in rows])
    return TokenizedSplit(split, rows, targets, lengths)

  def collate(
    self, tokenized: TokenizedSplit, rows: Sequence[int], size: int
  ) -> Batch:
    """A batch of `size` rows; those after `rows` are padding, not `valid`."""
    batch = self.loaded.tokenizer.pad(
      [tokenized.rows[i] for i in rows],
      count=size,
      multiple=self.config.multiple,
    )
    for name, values in tokenized.targets.items():
      batch[name] = np.zeros(size, values.dtype)
      batch[name][: len(rows)] = values[np.asarray(rows)]
    return batch | {"valid": np.arange(size) < len(rows)}

  def outputs(
    self, weights: dict, batch: Any, key: jax.Array | None = None
  ) -> Any:
    """Logits: (B, classes), or for spans two of (B, T)."""
    inputs = (batch["ids"], batch["mask"], batch["types"], key)
    if self.task.kind == "span":
      logits = encoder.spans(self.graphdef, weights, *inputs)
      inside = batch["mask"].astype(bool)
      return tuple(jnp.where(inside, x, MASKED) for x in logits)
    return encoder.classify(self.graphdef, weights, *inputs)

  def loss(self, weights: dict, batch: Any, key: jax.Array | None) -> jax.Array:
    """Cross-entropy in nats, or squared error, summed over the rows."""
    outputs = self.outputs(weights, batch, key)
    entropy = optax.softmax_cross_entropy_with_integer_labels
    if self.task.kind == "span":
      losses = sum(
        entropy(x, batch[name]) / 2
        for x, name in zip(outputs, ("start", "end"), strict=True)
      )
    elif self.task.kind == "regress":
      losses = jnp.square(outputs[:, 0] - batch["label"])
    else:
      losses = entropy(outputs, batch["label"])
    return jnp.where(batch["valid"], losses, 0.0).sum()

  def count_items(self, batch: Any) -> jax.Array:
    """Number of items the loss averages over: rows."""
    return batch["valid"].sum()

  def count_tokens(self, batch: Any) -> jax.Array:
    """Number of tokens that the model reads."""
    return (batch["mask"] * batch["valid"][:, None]).sum()

  def predict(self, tokenized: TokenizedSplit, outputs: dict[int, Any]) -> Any:
    """A prediction for each example, from the outputs of its rows."""
    by_row = [outputs[i] for i in range(len(tokenized.rows))]
    if self.task.kind == "span":
      return spans.decode(
        tokenized.rows, by_row, tokenized.split, self.config, self.task
      )
    if self.task.kind == "regress":
      return np.array([x[0] for x in by_row])
    return np.array([x.argmax() for x in by_row])

  def save(self, out: pathlib.Path, weights: dict) -> None:
    """Writes the trained model as a folder that `transformers` reads."""
    names = dict(enumerate(self.task.labels))
    extra: dict[str, Any] = {}
    if names and self.task.kind == "classify":
      extra["id2label"] = {str(i): name for i, name in names.items()}
      extra["label2id"] = {name: i for i, name in names.items()}
    if self.task.kind == "regress":
      extra["problem_type"] = "regression"
    if self.loaded.config.pool == "mean" and self.task.kind != "span":
      print(
        "note       the head was trained on the mean of the tokens"
        " (task.pool=mean), which model/config.json records; transformers gives"
        " it the first token"
      )
    trained = dataclasses.replace(self.loaded, params=weights)
    encoder_checkpoint.save(trained, out, extra)


def make(source: str, task: Task, config: Config) -> EncoderTaskModel:
  """An encoder from a checkpoint, with a head for the task.

  Raises:
    UserError: it cannot be read, has another architecture, or cannot do the
      task.
  """
  if task.kind == "chat":
    raise UserError(
      f"--task {task.name} is for a LLaMA, and {source} is an encoder, which"
      " writes no text"
    )
  changes: dict[str, Any] = {}
  if config.task.pool:
    changes["pool"] = config.task.pool
  model = config.model
  for name in ("dtype", "param_dtype", "remat", "unroll"):
    changes[name] = getattr(model, name)
  if model.attention in ("xla", "cudnn"):
    changes["attention"] = model.attention
  if config.task.dropout >= 0:
    for name in ("dropout", "attention_dropout", "head_dropout"):
      changes[name] = config.task.dropout
  span = task.kind == "span"
  loaded = encoder_checkpoint.load(
    source,
    head="spans" if span else "classify",
    labels=max(1, len(task.labels)),  # one: a number
    seed=config.train.seed,
    names=task.labels,
    **changes,
  )
  for note in loaded.notes:
    print(f"note       {note}")
  graphdef, boxes = encoder.abstract(loaded.config)
  length = min(config.data.length, loaded.config.max_length)
  return EncoderTaskModel(task, config.task, length, loaded, graphdef, boxes)
