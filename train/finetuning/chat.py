"""Conversations as tokens: templates, loss masks, packed rows.

The loss is computed on the assistant's messages and the token that ends each.
Text in a message is never tokenized as one of the template's special tokens.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from train.common import inputs
from train.common.errors import UserError
from train.finetuning.config import TemplateName

ASSISTANT = "assistant"
# Names that other data sets use for the roles.
ROLES = {
  "human": "user",
  "gpt": ASSISTANT,
  "bot": ASSISTANT,
  "model": ASSISTANT,
}


class Template(NamedTuple):
  """The text around each message of a conversation."""

  before: str  # {role} is replaced
  after: str  # in the loss of the assistant; "": the token that ends a text
  gap: str  # between messages
  tokens: tuple[str, ...] = ()  # special tokens that the vocabulary must have


TEMPLATES: dict[TemplateName, Template] = {
  "chatml": Template(
    "<|im_start|>{role}\n",
    "<|im_end|>",
    "\n",
    ("<|im_start|>", "<|im_end|>"),
  ),
  "llama3": Template(
    "<|start_header_id|>{role}<|end_header_id|>\n\n",
    "<|eot_id|>",
    "",
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
  ),
  "plain": Template("### {role}:\n", "", "\n\n"),
}


class Row(NamedTuple):
  """The tokens of a conversation, or of several that share a row."""

  ids: np.ndarray  # (n,) int32
  loss_mask: np.ndarray  # (n,) bool: whether a token is in the loss
  segments: np.ndarray  # (n,) int32: the token's conversation, counted from 1


@dataclasses.dataclass(frozen=True)
class Writer:
  """Tokenizes conversations in a template."""

  template: Template
  start: tokenizers.Tokenizer  # for the start of a text, where it may add " "
  markup: tokenizers.Tokenizer  # for the template, with its special tokens
  plain: tokenizers.Tokenizer  # for messages: special tokens are plain text
  end: str  # the token that ends a text
  begin: tuple[int, ...]  # ids at the start of every text

  @property
  def closing(self) -> str:
    """The token that ends a message of the assistant."""
    return self.template.after or self.end

  def jinja(self, system: str) -> str:
    """The template in Jinja, with a system message for want of another."""
    begin = "".join(self.markup.id_to_token(i) or "" for i in self.begin)
    return jinja_template(self, begin, system)

  def row(self, messages: Sequence[Mapping[str, str]], where: str = "") -> Row:
    """The tokens of a whole conversation, at a location for errors."""
    source = f"{where}: the tokenizer" if where else "the tokenizer"
    ids, mask = [*self.begin], [False] * len(self.begin)
    for message in messages:
      for text, is_content, in_loss in self._parts(message):
        markup = self.markup if len(ids) > len(self.begin) else self.start
        tokenizer = self.plain if is_content else markup
        with inputs.refusing(f"{source} cannot encode a message"):
          new = tokenizer.encode(text, add_special_tokens=False).ids
        ids += new
        mask += [in_loss] * len(new)
    return Row(
      np.array(ids, np.int32), np.array(mask), np.ones(len(ids), np.int32)
    )

  def _parts(self, message: Mapping[str, str]) -> list[tuple[str, bool, bool]]:
    """The texts of a message: text, whether it is content, is in the loss."""
    role, template = message["role"], self.template
    is_assistant = role == ASSISTANT
    after = template.after or (self.end if is_assistant else "")
    return [
      (template.before.format(role=role), False, False),
      (message["content"], True, is_assistant),
      (after, False, is_assistant),
      (template.gap, False, False),
    ]


def make_writer(
  name: TemplateName, tokenizer: str, end: str, begin: tuple[int, ...] = ()
) -> Writer:
  """A writer with a checkpoint's tokenizer.

  Args:
    name: name of the template.
    tokenizer: content of the tokenizer.json.
    end: the token that ends a text.
    begin: ids at the start of every text.

  Raises:
    UserError: the vocabulary lacks a token of the template.
  """
  template = TEMPLATES[name]
  inner = _without_prefix(tokenizer)
  start, markup, plain = map(
    tokenizers.Tokenizer.from_str, (tokenizer, inner, inner)
  )
  for each in (start, markup, plain):
    each.no_padding()
    each.no_truncation()
  plain.encode_special_tokens = True
  needed = template.tokens or (end,)
  missing = [token for token in needed if markup.token_to_id(token) is None]
  if missing:
    raise UserError(
      f"task.template={name} needs the tokens {', '.join(needed)}, and the"
      f" checkpoint's tokenizer has no {missing[0]!r}; the templates are"
      f" {', '.join(TEMPLATES)}"
    )
  return Writer(template, start, markup, plain, end, begin)


def _without_prefix(tokenizer: str) -> str:
  """A tokenizer.json that does not put a space before a text.

  Those made by SentencePiece do, and would before every part of a message.
  """
  # Written again by the package, which knows one spelling only.
  config = json.loads(tokenizers.Tokenizer.from_str(tokenizer).to_str())
  for step in _steps(config.get("pre_tokenizer"), "pretokenizers"):
    if step["type"] == "Metaspace":
      step["prepend_scheme"] = "never"
    elif step["type"] == "ByteLevel":
      step["add_prefix_space"] = False
  normalizer = config.get("normalizer")
  if normalizer and normalizer["type"] == "Prepend":
    config["normalizer"] = None
  elif normalizer and normalizer["type"] == "Sequence":
    steps = [x for x in normalizer["normalizers"] if x["type"] != "Prepend"]
    normalizer["normalizers"] = steps
  return json.dumps(config)


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
  """The steps of a part of a tokenizer.json."""
  if not part:
    return []
  return part[inner] if part["type"] == "Sequence" else [part]


def jinja_template(writer: Writer, begin: str, system: str) -> str:
  """The template in Jinja, as the `chat_template` of `transformers`.

  Args:
    writer: the writer of the same template.
    begin: the token at the start of every text, or "".
    system: system message for conversations that have none, or "".
  """
  template, assistant = writer.template, json.dumps(ASSISTANT)
  head, tail = map(json.dumps, template.before.split("{role}"))
  message = lambda role, content: " ~ ".join((head, role, tail, content))
  after = json.dumps(template.after or writer.end)
  if not template.after:
    after = f"({after} if message['role'] == {assistant} else '')"
  gap = json.dumps(template.gap)
  parts = [f"{{{{ {json.dumps(begin)} }}}}"] if begin else []
  if system:
    opening = message(json.dumps("system"), json.dumps(system))
    opening += f" ~ {json.dumps(template.after)} ~ {gap}"
    parts += ["{% if messages[0]['role'] != 'system' %}"]
    parts += [f"{{{{ {opening} }}}}{{% endif %}}"]
  content = message("message['role']", "message['content']")
  content += f" ~ {after} ~ {gap}"
  parts += [f"{{% for message in messages %}}{{{{ {content} }}}}"]
  prompt = " ~ ".join((head, assistant, tail))
  parts += ["{% endfor %}{% if add_generation_prompt %}"]
  parts += [f"{{{{ {prompt} }}}}{{% endif %}}"]
  return "".join(parts)


def with_system_message(
  messages: list[dict[str, str]], system: str
) -> list[dict[str, str]]:
  """Puts a system message at the start, unless there is one already."""
  if not system or messages[0]["role"] == "system":
    return messages
  return [{"role": "system", "content": system}, *messages]


def parse_conversation(
  value: Any, reply: str | None, where: str
) -> list[dict[str, str]]:
  """The messages of an example, checked.

  Args:
    value: a list of `{"role", "content"}` or of `{"from", "value"}`, or the
      text of a question.
    reply: the assistant's last message; None if `value` contains it.
    where: the location of the example in errors.

  Raises:
    UserError: the value has another form, or no message of the assistant.
  """
  if reply is not None and isinstance(value, str):
    return [
      {"role": "user", "content": value},
      {"role": ASSISTANT, "content": reply},
    ]
  last = [] if reply is None else [{"role": ASSISTANT, "content": reply}]
  if not isinstance(value, Sequence) or isinstance(value, str):
    raise UserError(
      f"{where} holds {str(value)[:60]!r}; a conversation is a list of"
      ' {"role": ..., "content": ...}, or a question and an answer in the'
      " columns task.first and task.second"
    )
  messages = [_parse_message(each, where) for each in value] + last
  if not any(m["role"] == ASSISTANT and m["content"] for m in messages):
    raise UserError(f"{where} has no message of the assistant to learn from")
  return messages


def _parse_message(value: Any, where: str) -> dict[str, str]:
  if isinstance(value, Mapping):
    role = value.get("role", value.get("from"))
    content = value.get("content", value.get("value"))
    if isinstance(role, str) and isinstance(content, str):
      return {"role": ROLES.get(role, role), "content": content}
  raise UserError(
    f'{where}: {str(value)[:60]!r} is not a message {{"role": ..., "content":'
    " ...}"
  )


def truncate(rows: Sequence[Row], length: int) -> tuple[list[Row], int]:
  """Rows of at most `length` tokens, and how many rows lost their whole loss.

  The latter are left out.
  """
  short = [Row(*(x[:length] for x in row)) for row in rows]
  with_loss = [row for row in short if row.loss_mask[1:].any()]
  return with_loss, len(rows) - len(with_loss)


def pack(rows: Sequence[Row], length: int) -> list[Row]:
  """Packs several conversations into each row, without cutting any.

  Best fit, in descending order of length: each conversation goes into the
  fullest row that has room for it. `segments` tells them apart.
  """
  packed: list[list[int]] = []
  by_room: list[list[int]] = [[] for _ in range(length + 1)]
  for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].ids)):
    size = len(rows[i].ids)
    room = next((n for n in range(size, length + 1) if by_room[n]), None)
    if room is None:
      room, index = length, len(packed)
      packed.append([])
    else:
      index = by_room[room].pop()
    packed[index].append(i)
    by_room[room - size].append(index)
  return [_join([rows[i] for i in sorted(some)]) for some in packed]


def _join(rows: Sequence[Row]) -> Row:
  masks = [row.loss_mask.copy() for row in rows]
  for mask in masks:
    mask[0] = False  # it would be predicted from another conversation
  segments = [
    np.full(len(row.ids), i, np.int32) for i, row in enumerate(rows, 1)
  ]
  return Row(
    np.concatenate([row.ids for row in rows]),
    np.concatenate(masks),
    np.concatenate(segments),
  )
