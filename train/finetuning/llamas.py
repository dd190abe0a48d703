"""A LLaMA on conversations, or on classes by the likelihood of their names.

To classify, a prompt asks for the class, and each class's name is put after it
as the answer; the name with the highest likelihood wins. In training the loss
is that of the right name.
"""

import dataclasses
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.common import inputs
from train.common.errors import UserError
from train.common.fields import Fields
from train.config.families import FAMILIES
from train.config.schema import HUB, ModelConfig
from train.data import tokenizer as tokenizer_lib
from train.finetuning import chat, chat_template
from train.finetuning.batches import Batch
from train.finetuning.config import Config, TaskConfig
from train.finetuning.examples import Split
from train.finetuning.tasks import Task
from train.models import llama
from train.pretrained import (
  checkpoint_folder,
  encoder_names,
  llama_checkpoint,
  llama_names,
)

PROMPT_END = 32  # tokens before the answer that a shortened prompt keeps


@dataclasses.dataclass(frozen=True)
class TokenizedSplit:
  """A split as the model reads it.

  A conversation is a row. To classify, each example has a row for every
  class, but in training only for its own.
  """

  split: Split
  rows: list[chat.Row]
  examples: np.ndarray  # (n,) index of each row's example
  classes: np.ndarray  # (n,) index of the class that the row names
  is_right: np.ndarray  # (n,) bool: whether it names the example's own class
  lengths: np.ndarray  # (n,) tokens of each row


@dataclasses.dataclass(frozen=True, eq=False)
class LlamaTaskModel:
  """A LLaMA on a task of conversations or of classes."""

  task: Task
  config: TaskConfig
  length: int  # tokens of a row, at most
  packed: bool
  model: ModelConfig
  source: llama_names.Weights
  writer: chat.Writer | chat_template.Writer
  graphdef: nnx.GraphDef
  boxes: nnx.State

  trained_in_full = ()  # the head is pre-trained, so adapters are enough

  @property
  def params(self) -> dict:
    """The weights to start from, on the host."""
    return llama_names.to_params(self.source)

  @property
  def has_dropout(self) -> bool:
    """False: LLaMA has no dropout."""
    return False

  def describe(self) -> str:
    """The model's kind and sizes, in half a line."""
    c = self.model
    return f"{c.family}, {c.n_layers} layers, d_model {c.d_model}, {c.dtype}"

  def tokenize(self, split: Split) -> TokenizedSplit:
    """Tokenizes a split."""
    if self.task.kind == "chat":
      return self._conversations(split)
    return self._classes(split)

  def _conversations(self, split: Split) -> TokenizedSplit:
    replies = split.second or [None] * len(split)
    rows = [
      self._row(chat.parse_conversation(value, reply, where), where)
      for value, reply, where in zip(
        split.first,
        replies,
        (f"{split.name}, row {i}" for i in range(len(split))),
        strict=True,
      )
    ]
    rows, lost = chat.truncate(rows, self.length)
    if lost:
      print(
        f"note       {split.name}: {lost} of {len(split)} conversations have no"
        f" reply in their first data.length={self.length} tokens"
      )
    if not rows:
      raise UserError(
        f"{split.name}: no conversation has a reply in its first"
        f" data.length={self.length} tokens; raise it"
      )
    rows = chat.pack(rows, self.length) if self.packed else rows
    indices = np.arange(len(rows))
    return _tokenized(
      split, rows, indices, np.zeros_like(indices), np.full(len(rows), True)
    )

  def _classes(self, split: Split) -> TokenizedSplit:
    names = self.task.labels
    second = split.second or [""] * len(split)
    # All classes get the same prompt, shortened for the longest name.
    room = self.length - max(map(self._answer_length, names))
    rows, examples, classes, is_right = [], [], [], []
    for i, (first, other) in enumerate(zip(split.first, second, strict=True)):
      for k, name in enumerate(names):
        if split.training and k != split.labels[i]:
          continue
        rows.append(self._shorten(self._answered(first, other, name), room))
        examples.append(i)
        classes.append(k)
        is_right.append(k == split.labels[i])
    return _tokenized(
      split, rows, np.array(examples), np.array(classes), np.array(is_right)
    )

  def _answered(self, first: str, second: str, name: str) -> chat.Row:
    """The prompt for an example, with a class's name as the answer."""
    prompt = self._prompt(first, second)
    return self._row(chat.parse_conversation(prompt, name, ""))

  def _answer_length(self, name: str) -> int:
    """Tokens from the first one of a class's name to the end of a row."""
    row = self._answered("", "", name)
    return len(row.ids) - _prompt_length(row)

  def _row(self, messages: list[dict[str, str]], where: str = "") -> chat.Row:
    row = self.writer.row(
      chat.with_system_message(messages, self.config.system), where
    )
    _check_ids(row, self.model, self.writer.markup)
    return row

  def _prompt(self, first: str, second: str) -> str:
    if self.config.prompt:
      return self.config.prompt.format(first=first, second=second)
    texts = f"{first}\n{second}\n" if second else f"{first}\n"
    return f"{texts}\nAnswer with one of: {', '.join(self.task.labels)}."

  def _shorten(self, row: chat.Row, room: int) -> chat.Row:
    """Cuts tokens out of a prompt's middle, until it has at most `room`.

    The answer stays, and the end of the prompt, which asks for it.
    """
    length = _prompt_length(row)
    if length <= room:
      return row
    if room <= PROMPT_END:
      raise UserError(
        f"data.length={self.length} has no room for an answer; raise it"
      )
    keep = np.r_[: room - PROMPT_END, length - PROMPT_END : len(row.ids)]
    return chat.Row(*(x[keep] for x in row))

  def collate(
    self, tokenized: TokenizedSplit, rows: Sequence[int], size: int
  ) -> Batch:
    """A batch of `size` rows; those after `rows` are padding."""
    chosen = [tokenized.rows[i] for i in rows]
    longest = max(len(row.ids) for row in chosen)
    multiple = self.config.multiple
    # One more than a multiple: the last token is predicted, never read.
    width = -(-(longest - 1) // multiple) * multiple + 1
    batch = {
      "ids": np.zeros((size, width), np.int32),
      "loss_mask": np.zeros((size, width), bool),
      "segments": np.zeros((size, width), np.int32),
      "is_right": np.zeros(size, bool),
    }
    for i, row in enumerate(chosen):
      for name, values in row._asdict().items():
        batch[name][i, : len(values)] = values
    batch["is_right"][: len(rows)] = tokenized.is_right[np.asarray(rows)]
    return batch

  def outputs(self, weights: dict, batch: Any) -> jax.Array:
    """(B,) The log-likelihood of each row's answer."""
    return -self._losses(weights, batch).sum(axis=1)

  def _losses(self, weights: dict, batch: Any) -> jax.Array:
    """(B, T) Cross-entropy in nats; 0 where the loss mask is 0."""
    ids, segments = batch["ids"], batch["segments"]
    logits = llama.apply(self.graphdef, weights, ids[:, :-1], segments[:, :-1])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(batch["loss_mask"][:, 1:], log_z - chosen, 0.0)

  def loss(self, weights: dict, batch: Any, key: jax.Array | None) -> jax.Array:
    """Cross-entropy in nats, summed over the answers that are right."""
    del key  # there is no dropout
    return (self._losses(weights, batch).sum(axis=1) * batch["is_right"]).sum()

  def count_items(self, batch: Any) -> jax.Array:
    """Number of items the loss averages over: tokens of right answers."""
    return (batch["loss_mask"][:, 1:] & batch["is_right"][:, None]).sum()

  def count_tokens(self, batch: Any) -> jax.Array:
    """Number of tokens that the model reads."""
    return (batch["segments"] > 0).sum()

  def predict(
    self, tokenized: TokenizedSplit, outputs: dict[int, Any]
  ) -> np.ndarray:
    """The likeliest class of each example."""
    shape = (len(tokenized.split), len(self.task.labels))
    log_likelihoods = np.full(shape, -np.inf)
    for row, value in outputs.items():
      index = tokenized.examples[row], tokenized.classes[row]
      log_likelihoods[index] = value
    return log_likelihoods.argmax(axis=1)

  def save(self, out: pathlib.Path, weights: dict) -> None:
    """Writes the trained model as a folder that `transformers` reads."""
    extra = self.source.extra
    trained = llama_names.from_params(
      str(out),
      self.model,
      lambda: weights,
      tokenizer=self.source.tokenizer,
      extra=self._with_template(extra) if self.task.kind == "chat" else extra,
    )
    llama_checkpoint.save(trained, out)

  def _with_template(self, extra: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's extra files, with the chat template and its end token."""
    writer, end = self.writer, self.writer.closing
    end_id = {"eos_token_id": writer.markup.token_to_id(end)}
    files = {
      name: dict(extra.get(name) or {}) for name in checkpoint_folder.SIDECARS
    }
    files[checkpoint_folder.TOKENIZER_CONFIG] |= {
      "chat_template": writer.jinja(self.config.system),
      "eos_token": end,
    }
    files[checkpoint_folder.GENERATION] |= end_id
    config = dict(extra.get(checkpoint_folder.CONFIG, {})) | end_id
    return {**extra, **files, checkpoint_folder.CONFIG: config}


def check_prompt(task: Task, config: TaskConfig) -> None:
  """Checks that `task.prompt` names the texts of an example.

  Raises:
    UserError: it lacks one of the task's texts, or names something else.
  """
  if not config.prompt:
    return
  texts = {"first"} | ({"second"} if task.second else set())
  try:
    parts = list(string.Formatter().parse(config.prompt))
  except ValueError as error:
    raise UserError(
      f"task.prompt={config.prompt!r}: {error}; write {{{{ and }}}} for braces"
    ) from None
  fields = [part for part in parts if part[1] is not None]
  plain = not any(kind or change for _, _, kind, change in fields)
  if {field for _, field, *_ in fields} != texts or not plain:
    names = " and ".join(f"{{{name}}}" for name in sorted(texts))
    raise UserError(
      f"task.prompt={config.prompt!r} must have {names}, the"
      f" text{'s' * (len(texts) > 1)} of --task {task.name}, and nothing else"
      " in braces"
    )


def _prompt_length(row: chat.Row) -> int:
  """Tokens before the first one in the loss."""
  return int(np.flatnonzero(row.loss_mask)[0])


def _check_ids(row: chat.Row, model: ModelConfig, tokenizer: Any) -> None:
  """Checks that the model's embedding has a row for each token.

  Raises:
    UserError: a token has none; its logits would be NaN.
  """
  largest = int(row.ids.max(initial=0))
  if largest >= model.vocab_size:
    raise UserError(
      f"the token {tokenizer.id_to_token(largest)!r} has the id {largest}, but"
      f" the checkpoint's embedding has {model.vocab_size:,} rows; use a"
      " tokenizer whose tokens the model knows, or task.template=plain"
    )


def _tokenized(
  split: Split,
  rows: list[chat.Row],
  examples: np.ndarray,
  classes: np.ndarray,
  is_right: np.ndarray,
) -> TokenizedSplit:
  lengths = np.array([len(row.ids) for row in rows])
  return TokenizedSplit(split, rows, examples, classes, is_right, lengths)


def is_llama(source: str) -> bool:
  """Whether a checkpoint is a LLaMA or a relative; else it is an encoder.

  Raises:
    UserError: it is neither, or the folder of a fine-tuning run, which has its
      model in `model/`.
  """
  path = pathlib.Path(source)
  if path.suffix == ".gguf":
    return True
  if source.startswith(HUB):
    path = checkpoint_folder.fetch(source)
  try:
    config = inputs.read_object(path / checkpoint_folder.CONFIG)
  except UserError as error:
    raise UserError(
      f"--from {source}: {error}; give a folder in Hugging Face's layout, a"
      " .gguf file, or hub:NAME"
    ) from None
  if "task.name" in config:
    raise UserError(
      f"--from {source} is the folder of a run; its weights are in"
      f" {path / 'model'}"
    )
  model_type = config.get("model_type")
  if model_type in tuple(FAMILIES) or "model.d_model" in config:
    return True
  if model_type not in encoder_names.FAMILIES:
    known = ", ".join([*encoder_names.FAMILIES, *FAMILIES])
    raise UserError(
      f"--from {source}: its model_type is {model_type!r}; known ones are"
      f" {known}"
    )
  return False


def make(source: str, task: Task, config: Config) -> LlamaTaskModel:
  """A LLaMA from a checkpoint, ready for the task.

  Raises:
    UserError: it cannot be read, or cannot do the task.
  """
  if task.kind not in ("chat", "classify"):
    raise UserError(
      f"--task {task.name} is of the kind {task.kind}, and {source} is a LLaMA,"
      " which does chat and classify only; use an encoder"
    )
  check_prompt(task, config.task)
  path = pathlib.Path(source)
  weights = llama_checkpoint.load(
    path if path.suffix == ".gguf" else checkpoint_folder.fetch(source)
  )
  llama_names.check(weights)
  if not weights.tokenizer:
    raise UserError(
      f"{source} has no {checkpoint_folder.TOKENIZER}; put it there"
    )
  model = dataclasses.replace(weights.model, **vars(config.model))
  graphdef, boxes = llama.abstract(model)
  return LlamaTaskModel(
    task,
    config.task,
    config.data.length,
    config.data.rows == "packed",
    model,
    dataclasses.replace(weights, model=model),
    _make_writer(weights, config),
    graphdef,
    boxes,
  )


def _make_writer(
  weights: llama_names.Weights, config: Config
) -> chat.Writer | chat_template.Writer:
  """A writer with the checkpoint's begin and end tokens."""
  name = checkpoint_folder.TOKENIZER_CONFIG
  settings = Fields(f"{weights.source}: {name}", weights.extra.get(name, {}))
  tokenizer = tokenizer_lib.parse(
    weights.tokenizer, f"{weights.source}: its {checkpoint_folder.TOKENIZER}"
  )
  if config.task.template == "own":
    writer = chat_template.Writer(settings, tokenizer)
    writer.jinja(config.task.system)  # refuses a system message
    return writer
  ends = [t for t in tokenizer_lib.ENDS if tokenizer.token_to_id(t) is not None]
  end = settings.token("eos_token") or next(iter(ends), "")
  begin = tokenizer.token_to_id(settings.token("bos_token"))
  # Without a setting, the tokenizer itself shows whether it adds the token.
  is_added = begin is not None and tokenizer.encode("a").ids[:1] == [begin]
  if begin is None or not settings.flag("add_bos_token", is_added):
    return chat.make_writer(config.task.template, weights.tokenizer, end)
  return chat.make_writer(
    config.task.template, weights.tokenizer, end, (begin,)
  )
