"""A LLaMA on conversations, or on classes by the likelihood of their names.

For a class the model is asked with a prompt; each class's name is put in the
place of the answer, and the one that is likelier wins. What is learned is the
name of the right one.
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

from train.common.errors import UserError
from train.config.schema import HUB, ModelConfig
from train.data import tokenizer
from train.finetuning import chat
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

KEPT = 32  # tokens before the answer that a text which is too long keeps


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A split as the model reads it."""

  split: Split
  rows: list[chat.Row]
  # (n,) Of classes: the example that a row is of, and the class it names; a
  # row of the right one is learned.
  example: np.ndarray
  named: np.ndarray
  right: np.ndarray
  lengths: np.ndarray  # tokens


@dataclasses.dataclass(frozen=True, eq=False)
class LlamaLearner:
  """A LLaMA on a task of conversations or of classes."""

  task: Task
  config: TaskConfig
  length: int  # tokens of a row, at most
  packed: bool
  model: ModelConfig
  source: llama_names.Weights
  writer: chat.Writer
  graphdef: nnx.GraphDef
  boxes: nnx.State

  full = ()  # the head is that of the pre-training: factors are all it takes

  @property
  def params(self) -> dict:
    """The weights to start from, on the host."""
    return llama_names.to_params(self.source)

  @property
  def random(self) -> bool:
    """Nothing drops out."""
    return False

  def describe(self) -> str:
    """The model in half a line."""
    c = self.model
    return f"llama, {c.n_layers} layers, d_model {c.d_model}, {c.dtype}"

  def prepare(self, split: Split) -> Prepared:
    """Tokenises a split; what is trained on keeps the right answers only."""
    if self.task.kind == "chat":
      return self._conversations(split)
    return self._classes(split)

  def _conversations(self, split: Split) -> Prepared:
    answers = split.second or [None] * len(split)
    rows = [
      self._row(chat.conversation(value, answer, f"{split.name}, row {i}"))
      for i, (value, answer) in enumerate(
        zip(split.first, answers, strict=True)
      )
    ]
    rows, lost = chat.cut(rows, self.length)
    if lost:
      print(
        f"note       {split.name}: {lost} of {len(split)} conversations say"
        f" nothing to learn in their first data.length={self.length} tokens"
      )
    if not rows:
      raise UserError(
        f"{split.name}: no conversation has an answer in its first"
        f" data.length={self.length} tokens; raise it"
      )
    rows = chat.pack(rows, self.length) if self.packed else rows
    whole = np.arange(len(rows))
    return _prepared(split, rows, whole, np.zeros_like(whole), whole >= 0)

  def _classes(self, split: Split) -> Prepared:
    names = self.task.labels
    second = split.second or [""] * len(split)
    # Every class is asked with the same part of a text that is too long.
    room = self.length - max(map(self._tail, names))
    rows, example, named, right = [], [], [], []
    for i, (first, other) in enumerate(zip(split.first, second, strict=True)):
      for k, name in enumerate(names):
        if split.training and k != split.answers[i]:
          continue
        row = self._row(chat.conversation(self._prompt(first, other), name, ""))
        rows.append(self._cut(row, room))
        example.append(i)
        named.append(k)
        right.append(k == split.answers[i])
    return _prepared(
      split, rows, np.array(example), np.array(named), np.array(right)
    )

  def _tail(self, name: str) -> int:
    """Tokens from the first one of a class's name on."""
    row = self._row(chat.conversation(self._prompt("", ""), name, ""))
    return len(row.ids) - _asked(row)

  def _row(self, messages: list[dict[str, str]]) -> chat.Row:
    row = self.writer.row(chat.opened(messages, self.config.system))
    _check_ids(row, self.model, self.writer.marks)
    return row

  def _prompt(self, first: str, second: str) -> str:
    if self.config.prompt:
      return self.config.prompt.format(first=first, second=second)
    texts = f"{first}\n{second}\n" if second else f"{first}\n"
    return f"{texts}\nAnswer with one of: {', '.join(self.task.labels)}."

  def _cut(self, row: chat.Row, room: int) -> chat.Row:
    """A row that is asked in `room` tokens: a long text loses its middle.

    The answer stays, and the end of the question, which asks for it.
    """
    asked = _asked(row)
    if asked <= room:
      return row
    if room <= KEPT:
      raise UserError(
        f"data.length={self.length} has no room for an answer; raise it"
      )
    keep = np.r_[: room - KEPT, asked - KEPT : len(row.ids)]
    return chat.Row(*(x[keep] for x in row))

  def collate(
    self, prepared: Prepared, chosen: Sequence[int], count: int
  ) -> Batch:
    """Rows as a batch; those that are missing are padding and not `valid`."""
    rows = [prepared.rows[i] for i in chosen]
    longest = max(len(row.ids) for row in rows)
    multiple = self.config.multiple
    # One more than a multiple: the last token is predicted, never read.
    width = -(-(longest - 1) // multiple) * multiple + 1
    batch = {
      "ids": np.zeros((count, width), np.int32),
      "learn": np.zeros((count, width), bool),
      "segments": np.zeros((count, width), np.int32),
      "right": np.zeros(count, bool),
    }
    for i, row in enumerate(rows):
      for name, values in row._asdict().items():
        batch[name][i, : len(values)] = values
    batch["right"][: len(rows)] = prepared.right[np.asarray(chosen)]
    return batch

  def outputs(self, given: dict, batch: Any) -> jax.Array:
    """(B,) The log-likelihood of what is learned of each row."""
    return -self._losses(given, batch).sum(axis=1)

  def _losses(self, given: dict, batch: Any) -> jax.Array:
    """(B, T) Cross-entropy of what is learned, 0 elsewhere."""
    ids, segments = batch["ids"], batch["segments"]
    logits = llama.apply(self.graphdef, given, ids[:, :-1], segments[:, :-1])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(batch["learn"][:, 1:], log_z - chosen, 0.0)

  def loss(self, given: dict, batch: Any, key: jax.Array | None) -> jax.Array:
    """Summed over the learned tokens of the right rows, in nats."""
    del key  # there is no dropout
    return (self._losses(given, batch).sum(axis=1) * batch["right"]).sum()

  def count(self, batch: Any) -> jax.Array:
    """By what the summed loss is divided: tokens that are learned."""
    return (batch["learn"][:, 1:] & batch["right"][:, None]).sum()

  def tokens(self, batch: Any) -> jax.Array:
    """Tokens that are read."""
    return (batch["segments"] > 0).sum()

  def decide(self, prepared: Prepared, outputs: dict[int, Any]) -> np.ndarray:
    """The likeliest class of each example."""
    found = np.full((len(prepared.split), len(self.task.labels)), -np.inf)
    for row, value in outputs.items():
      found[prepared.example[row], prepared.named[row]] = value
    return found.argmax(axis=1)

  def save(self, out: pathlib.Path, given: dict) -> None:
    """Writes the trained model as a folder that `transformers` reads."""
    extra = self.source.extra
    trained = llama_names.from_params(
      str(out),
      self.model,
      lambda: given,
      tokenizer=self.source.tokenizer,
      extra=self._speaking(extra) if self.task.kind == "chat" else extra,
    )
    llama_checkpoint.save(trained, out)

  def _speaking(self, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of the model, with its template and where a turn ends."""
    writer, marks = self.writer, self.writer.marks
    end = writer.template.after or writer.end
    number = marks.token_to_id(end)
    begin = "".join(marks.id_to_token(i) or "" for i in writer.begin)
    files = {
      name: dict(extra.get(name) or {}) for name in checkpoint_folder.SIDECARS
    }
    files[checkpoint_folder.TOKENIZER_CONFIG] |= {
      "chat_template": chat.jinja(writer, begin, self.config.system),
      "eos_token": end,
    }
    files[checkpoint_folder.GENERATION] |= {"eos_token_id": number}
    config = dict(extra.get(checkpoint_folder.CONFIG, {})) | {
      "eos_token_id": number
    }
    return {**extra, **files, checkpoint_folder.CONFIG: config}


def check_prompt(task: Task, config: TaskConfig) -> None:
  """Sees that a LLaMA is asked about the texts of an example.

  Raises:
    UserError: a text of the task is not in `task.prompt`, or something else.
  """
  if not config.prompt:
    return
  wanted = {"first"} | ({"second"} if task.second else set())
  try:
    parts = list(string.Formatter().parse(config.prompt))
  except ValueError as error:
    raise UserError(
      f"task.prompt={config.prompt!r}: {error}; {{{{ and }}}} stand for braces"
    ) from None
  fields = [part for part in parts if part[1] is not None]
  plain = not any(kind or change for _, _, kind, change in fields)
  if {field for _, field, *_ in fields} != wanted or not plain:
    names = " and ".join(f"{{{name}}}" for name in sorted(wanted))
    raise UserError(
      f"task.prompt={config.prompt!r} must have {names}, the"
      f" text{'s' * (len(wanted) > 1)} of --task {task.name}, and nothing else"
      " in braces"
    )


def _asked(row: chat.Row) -> int:
  """Tokens before the first that is learned."""
  return int(np.flatnonzero(row.learn)[0])


def _check_ids(row: chat.Row, model: ModelConfig, marks: Any) -> None:
  """Sees that the model has a row of its embedding for each token.

  Raises:
    UserError: a token is beyond it; its logits would be NaN.
  """
  most = int(row.ids.max(initial=0))
  if most >= model.vocab_size:
    raise UserError(
      f"the token {marks.id_to_token(most)!r} has the number {most}, and the"
      f" checkpoint's embedding {model.vocab_size:,} rows; take a tokenizer"
      " whose tokens the model knows, or task.template=plain"
    )


def _prepared(
  split: Split,
  rows: list[chat.Row],
  example: np.ndarray,
  named: np.ndarray,
  right: np.ndarray,
) -> Prepared:
  lengths = np.array([len(row.ids) for row in rows])
  return Prepared(split, rows, example, named, right, lengths)


def is_llama(source: str) -> bool:
  """Whether a checkpoint is a LLaMA: of any other kind encoders tell.

  Raises:
    UserError: it is a run of fine-tuning, whose model lies in `model/`.
  """
  path = pathlib.Path(source)
  if path.suffix == ".gguf":
    return True
  if source.startswith(HUB):
    path = checkpoint_folder.fetch(source)
  try:
    found = checkpoint_folder.read_json(path / checkpoint_folder.CONFIG)
  except UserError as error:
    raise UserError(
      f"--from {source}: {error}; give a folder in Hugging Face's layout, a"
      " .gguf file, or hub:NAME"
    ) from None
  if "task.name" in found:
    raise UserError(
      f"--from {source} is the folder of a run; its weights are in"
      f" {path / 'model'}"
    )
  kind = found.get("model_type")
  if kind == "llama" or "model.d_model" in found:
    return True
  if kind not in encoder_names.FAMILIES:
    known = ", ".join(encoder_names.FAMILIES)
    raise UserError(
      f"--from {source}: its model_type is {kind!r}, and what can be read is"
      f" {known} and llama"
    )
  return False


def make(source: str, task: Task, config: Config) -> LlamaLearner:
  """A LLaMA from a checkpoint, ready for the task.

  Raises:
    UserError: it cannot be read, or the task is none for it.
  """
  if task.kind not in ("chat", "classify"):
    raise UserError(
      f"--task {task.name} asks for a {task.kind}, and {source} is a LLaMA,"
      " which does conversations (chat) and classes; use an encoder"
    )
  check_prompt(task, config.task)
  path = pathlib.Path(source)
  found = llama_checkpoint.load(
    path if path.suffix == ".gguf" else checkpoint_folder.fetch(source)
  )
  llama_names.check(found)
  if not found.tokenizer:
    raise UserError(
      f"{source} has no {checkpoint_folder.TOKENIZER}; put it there"
    )
  kept = {name: getattr(config.model, name) for name in llama_checkpoint.OURS}
  model = dataclasses.replace(found.model, **kept)
  source_weights = dataclasses.replace(found, model=model)
  graphdef, boxes = llama.abstract(model)
  return LlamaLearner(
    task,
    config.task,
    config.data.length,
    config.data.rows == "packed",
    model,
    source_weights,
    _writer(found, config),
    graphdef,
    boxes,
  )


def _vocabulary(found: llama_names.Weights) -> tokenizer.tokenizers.Tokenizer:
  try:
    return tokenizer.tokenizers.Tokenizer.from_str(found.tokenizer)
  except Exception as error:  # the package has no kind of its own
    raise UserError(
      f"{found.source}: its {checkpoint_folder.TOKENIZER} cannot be read"
      f" ({error})"
    ) from None


def _writer(found: llama_names.Weights, config: Config) -> chat.Writer:
  """With the tokens that begin and end a text in this checkpoint."""
  described = found.extra.get(checkpoint_folder.TOKENIZER_CONFIG, {})

  def token(name: str) -> str:
    value = described.get(name) or ""
    return value["content"] if isinstance(value, dict) else value

  vocabulary = _vocabulary(found)
  known = [t for t in tokenizer.ENDS if vocabulary.token_to_id(t) is not None]
  end = token("eos_token") or next(iter(known), "")
  begin = vocabulary.token_to_id(token("bos_token") or "")
  # Where that is not said, the tokenizer itself puts it, or does not.
  put = begin is not None and vocabulary.encode("a").ids[:1] == [begin]
  wanted = begin is not None and described.get("add_bos_token", put)
  return chat.writer(
    config.task.template,
    found.tokenizer,
    end,
    (begin,) if wanted and begin is not None else (),
  )
