"""Conversations as tokens: templates, what is learned of them, packed rows.

Only what the assistant says is learned, with the token that ends it. What a
user writes is never read as one of the template's own tokens.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from train.common.errors import UserError
from train.finetuning.config import TemplateName

ASSISTANT = "assistant"
# Names of roles in conversations of other origins.
ROLES = {
  "human": "user",
  "gpt": ASSISTANT,
  "bot": ASSISTANT,
  "model": ASSISTANT,
}


class Template(NamedTuple):
  """What stands around a turn; {role} is replaced."""

  before: str
  after: str  # learned with the turn; "": the token that ends a text
  gap: str  # behind it
  needed: tuple[str, ...] = ()  # tokens that the vocabulary must have


TEMPLATES: dict[TemplateName, Template] = {
  "chatml": Template(
    "<|im_start|>{role}\n",
    "<|im_end|>",
    "\n",
    ("<|im_start|>", "<|im_end|>"),
  ),
  "plain": Template("### {role}:\n", "", "\n\n"),
}


class Row(NamedTuple):
  """Tokens of a conversation, or of several that share a row."""

  ids: np.ndarray  # (n,) int32
  learn: np.ndarray  # (n,) bool: whether a token is predicted
  segments: np.ndarray  # (n,) int32: which conversation it is of, from 1


@dataclasses.dataclass(frozen=True)
class Writer:
  """Writes conversations in a template."""

  template: Template
  first: tokenizers.Tokenizer  # reads what a text begins with
  marks: tokenizers.Tokenizer  # reads the template's tokens as tokens
  plain: tokenizers.Tokenizer  # reads them as text
  end: str  # the token that ends a text
  begin: tuple[int, ...]  # ids that stand before every text

  def row(self, messages: Sequence[Mapping[str, str]]) -> Row:
    """A whole conversation."""
    ids, learn = [*self.begin], [False] * len(self.begin)
    for message in messages:
      for text, own, wanted in self._parts(message):
        known = self.marks if len(ids) > len(self.begin) else self.first
        source = self.plain if own else known
        found = source.encode(text, add_special_tokens=False).ids
        ids += found
        learn += [wanted] * len(found)
    return Row(
      np.array(ids, np.int32), np.array(learn), np.ones(len(ids), np.int32)
    )

  def _parts(self, message: Mapping[str, str]) -> list[tuple[str, bool, bool]]:
    """Texts of a turn: whether someone wrote it, whether it is learned."""
    role, said = message["role"], message["role"] == ASSISTANT
    template = self.template
    after = template.after or (self.end if said else "")
    return [
      (template.before.format(role=role), False, False),
      (message["content"], True, said),
      (after, False, said),
      (template.gap, False, False),
    ]


def writer(
  name: TemplateName, text: str, end: str, begin: tuple[int, ...] = ()
) -> Writer:
  """A writer with a tokenizer.

  Args:
    name: of the template.
    text: of the tokenizer.json.
    end: the token that ends a text.
    begin: ids that stand before every text.

  Raises:
    UserError: the vocabulary lacks what the template is made of.
  """
  template = TEMPLATES[name]
  later = _without_prefix(text)
  first, marks, plain = map(tokenizers.Tokenizer.from_str, (text, later, later))
  for one in (first, marks, plain):
    one.no_padding()
    one.no_truncation()
  plain.encode_special_tokens = True
  needed = template.needed or (end,)
  missing = [token for token in needed if marks.token_to_id(token) is None]
  if missing:
    raise UserError(
      f"task.template={name} needs the tokens {', '.join(needed)}, and the"
      f" checkpoint's tokenizer has no {missing[0]!r}; the templates are"
      f" {', '.join(TEMPLATES)}"
    )
  return Writer(template, first, marks, plain, end, begin)


def _without_prefix(text: str) -> str:
  """A tokenizer.json that puts no space before what it reads.

  One that does, as of SentencePiece, would put it before every piece.
  """
  found = json.loads(text)
  for step in _steps(found.get("pre_tokenizer"), "pretokenizers"):
    if step["type"] == "Metaspace":
      step["prepend_scheme"] = "never"
    elif step["type"] == "ByteLevel":
      step["add_prefix_space"] = False
  normalizer = found.get("normalizer")
  if normalizer and normalizer["type"] == "Prepend":
    found["normalizer"] = None
  elif normalizer and normalizer["type"] == "Sequence":
    kept = [x for x in normalizer["normalizers"] if x["type"] != "Prepend"]
    normalizer["normalizers"] = kept
  return json.dumps(found)


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
  """A part of a tokenizer.json, step by step."""
  if not part:
    return []
  return part[inner] if part["type"] == "Sequence" else [part]


def jinja(writer: Writer, begin: str, system: str) -> str:
  """The template as `transformers` writes it: a `chat_template`.

  Args:
    writer: whose conversations it writes.
    begin: the token that stands before every text, or "".
    system: message that opens conversations that have none such.
  """
  template, said = writer.template, json.dumps(ASSISTANT)
  head, tail = template.before.split("{role}")
  turn = lambda role, content: " ~ ".join(
    (json.dumps(head), role, json.dumps(tail), content)
  )
  after = json.dumps(template.after or writer.end)
  if not template.after:
    after = f"({after} if message['role'] == {said} else '')"
  end, gap = (f" ~ {x}" for x in (after, json.dumps(template.gap)))
  parts = [f"{{{{ {json.dumps(begin)} }}}}"] if begin else []
  if system:
    closed = f" ~ {json.dumps(template.after)}{gap}"
    opening = turn(json.dumps("system"), json.dumps(system)) + closed
    parts += ["{% if messages[0]['role'] != 'system' %}"]
    parts += [f"{{{{ {opening} }}}}{{% endif %}}"]
  spoken = turn("message['role']", "message['content']")
  parts += [f"{{% for message in messages %}}{{{{ {spoken}{end}{gap} }}}}"]
  asked = " ~ ".join((json.dumps(head), said, json.dumps(tail)))
  parts += ["{% endfor %}{% if add_generation_prompt %}"]
  parts += [f"{{{{ {asked} }}}}{{% endif %}}"]
  return "".join(parts)


def opened(messages: list[dict[str, str]], system: str) -> list[dict[str, str]]:
  """A conversation with a system's message, if it has none of its own."""
  if not system or messages[0]["role"] == "system":
    return messages
  return [{"role": "system", "content": system}, *messages]


def conversation(
  value: Any, answer: str | None, place: str
) -> list[dict[str, str]]:
  """The messages of an example, checked.

  Args:
    value: a list of `{"role", "content"}`, or of `{"from", "value"}`, or the
      text of a question.
    answer: to that question, or to the last message; None where `value` has
      the answers.
    place: the example, as messages call it.

  Raises:
    UserError: it is none of them, or the assistant says nothing in it.
  """
  if answer is not None and isinstance(value, str):
    return [
      {"role": "user", "content": value},
      {"role": ASSISTANT, "content": answer},
    ]
  last = [] if answer is None else [{"role": ASSISTANT, "content": answer}]
  if not isinstance(value, Sequence) or isinstance(value, str):
    raise UserError(
      f"{place} holds {str(value)[:60]!r}; a conversation is a list of"
      ' {"role": ..., "content": ...}, or a question and an answer in the'
      " columns task.first and task.second"
    )
  found = [_message(one, place) for one in value] + last
  if not any(m["role"] == ASSISTANT and m["content"] for m in found):
    raise UserError(
      f"{place}: the assistant says nothing that could be learned"
    )
  return found


def _message(value: Any, place: str) -> dict[str, str]:
  if isinstance(value, Mapping):
    role = value.get("role", value.get("from"))
    content = value.get("content", value.get("value"))
    if isinstance(role, str) and isinstance(content, str):
      return {"role": ROLES.get(role, role), "content": content}
  raise UserError(
    f'{place}: {str(value)[:60]!r} is no message {{"role": ..., "content":'
    " ...}"
  )


def cut(rows: Sequence[Row], length: int) -> tuple[list[Row], int]:
  """Rows of at most `length` tokens, and how many had nothing left to learn."""
  short = [Row(*(x[:length] for x in row)) for row in rows]
  kept = [row for row in short if row.learn[1:].any()]
  return kept, len(rows) - len(kept)


def pack(rows: Sequence[Row], length: int) -> list[Row]:
  """Several conversations in a row, none of them cut.

  Each goes into the fullest open row that has room for it, in the order of
  their lengths. Their numbers keep them apart.
  """
  order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
  inside: list[list[int]] = []
  with_room: list[list[int]] = [[] for _ in range(length + 1)]
  for i in order:
    size = len(rows[i].ids)
    left = next((n for n in range(size, length + 1) if with_room[n]), None)
    if left is None:
      left, place = length, len(inside)
      inside.append([])
    else:
      place = with_room[left].pop()
    inside[place].append(i)
    with_room[left - size].append(place)
  return [_join([rows[i] for i in sorted(some)]) for some in inside]


def _join(rows: Sequence[Row]) -> Row:
  learn = [row.learn.copy() for row in rows]
  for one in learn:
    one[0] = False  # it would be predicted from another conversation
  numbers = [
    np.full(len(row.ids), i, np.int32) for i, row in enumerate(rows, 1)
  ]
  return Row(
    np.concatenate([row.ids for row in rows]),
    np.concatenate(learn),
    np.concatenate(numbers),
  )
