"""An encoder with a head for a task: what it reads, says and loses."""

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

FAR = -1e9  # logit of what cannot be


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A split as the model reads it."""

  split: Split
  # A Row each, or Windows: several a question where its context is long.
  rows: Sequence[Any]
  targets: dict[str, np.ndarray]  # (n,) each
  lengths: np.ndarray  # (n,) tokens


@dataclasses.dataclass(frozen=True, eq=False)
class EncoderLearner:
  """BERT or RoBERTa on a task of labels, numbers or spans."""

  task: Task
  config: TaskConfig
  length: int  # tokens of a row, at most
  loaded: encoder_checkpoint.Loaded
  graphdef: nnx.GraphDef
  boxes: nnx.State

  # Weights beside the blocks that a method trains which freezes the rest.
  full = (r"^(head|pooler)/",)

  @property
  def params(self) -> dict:
    """The weights to start from, on the host."""
    return self.loaded.params

  @property
  def random(self) -> bool:
    """Whether anything drops out."""
    c = self.loaded.config
    return max(c.dropout, c.attention_dropout, c.head_dropout) > 0

  def describe(self) -> str:
    """The model in half a line."""
    c = self.loaded.config
    return f"{c.family}, {c.n_layers} layers, d_model {c.d_model}, {c.dtype}"

  def prepare(self, split: Split) -> Prepared:
    """Tokenises a split."""
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
      targets = spans.targets(rows, split.answers)
    else:
      rows = tokenizer.texts(split.first, split.second, self.length)
      kind = np.float32 if self.task.kind == "regress" else np.int32
      targets = {"label": np.asarray(split.answers, kind)}
    lengths = np.array([len(row.ids) for row in rows])
    return Prepared(split, rows, targets, lengths)

  def collate(
    self, prepared: Prepared, chosen: Sequence[int], count: int
  ) -> Batch:
    """Rows as a batch; those that are missing are padding and not `valid`."""
    rows = [prepared.rows[i] for i in chosen]
    batch = self.loaded.tokenizer.pad(
      rows, count=count, multiple=self.config.multiple
    )
    for name, values in prepared.targets.items():
      batch[name] = np.zeros(count, values.dtype)
      batch[name][: len(rows)] = values[np.asarray(chosen)]
    return batch | {"valid": np.arange(count) < len(rows)}

  def outputs(
    self, weights: dict, batch: Any, key: jax.Array | None = None
  ) -> Any:
    """Logits (B, classes), or of spans two (B, T)."""
    inputs = (batch["ids"], batch["mask"], batch["types"], key)
    if self.task.kind == "span":
      found = encoder.spans(self.graphdef, weights, *inputs)
      inside = batch["mask"].astype(bool)
      return tuple(jnp.where(inside, x, FAR) for x in found)
    return encoder.classify(self.graphdef, weights, *inputs)

  def loss(self, weights: dict, batch: Any, key: jax.Array | None) -> jax.Array:
    """Summed over the rows: cross-entropy in nats, or squared error."""
    found = self.outputs(weights, batch, key)
    entropy = optax.softmax_cross_entropy_with_integer_labels
    if self.task.kind == "span":
      losses = sum(
        entropy(x, batch[name]) / 2
        for x, name in zip(found, ("start", "end"), strict=True)
      )
    elif self.task.kind == "regress":
      losses = jnp.square(found[:, 0] - batch["label"])
    else:
      losses = entropy(found, batch["label"])
    return jnp.where(batch["valid"], losses, 0.0).sum()

  def count(self, batch: Any) -> jax.Array:
    """By what the summed loss is divided: rows."""
    return batch["valid"].sum()

  def tokens(self, batch: Any) -> jax.Array:
    """Tokens that are read."""
    return (batch["mask"] * batch["valid"][:, None]).sum()

  def decide(self, prepared: Prepared, outputs: dict[int, Any]) -> Any:
    """Answers to the examples of a split, from the outputs of its rows."""
    found = [outputs[i] for i in range(len(prepared.rows))]
    if self.task.kind == "span":
      return spans.decode(
        prepared.rows, found, prepared.split, self.config, self.task
      )
    if self.task.kind == "regress":
      return np.array([x[0] for x in found])
    return np.array([x.argmax() for x in found])

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
        "note       transformers would give the head the first token; this"
        " one has learned with task.pool=mean, which model/config.json says"
      )
    trained = dataclasses.replace(self.loaded, params=weights)
    encoder_checkpoint.save(trained, out, extra)


def make(source: str, task: Task, config: Config) -> EncoderLearner:
  """An encoder from a checkpoint, with a head for the task.

  Raises:
    UserError: it cannot be read, or is of another architecture.
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
  return EncoderLearner(task, config.task, length, loaded, graphdef, boxes)
