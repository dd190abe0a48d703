"""Conversations as a checkpoint's own chat template writes them.

The template is rendered in another process (`template_worker.py`), which is
ended if it takes too long.
"""

import importlib.util
import json
import os
import pathlib
import re
import selectors
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from train.common import inputs
from train.common.errors import UserError
from train.common.fields import Fields
from train.finetuning import chat

WORKER = pathlib.Path(__file__).with_name("template_worker.py")
SECONDS = 10.0  # that one rendering may take
# Stands for the content of a message: characters for private use, which no
# template reads or trims.
MARK = "\ue000{}\ue001"
FIND_MARK = re.compile(MARK.format("([0-9]+)"))
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
PROBE = (
  {"role": "user", "content": "a"},
  {"role": chat.ASSISTANT, "content": "b"},
)
Messages = Sequence[Mapping[str, str]]


class Span(NamedTuple):
  """The part of a text that is the content of a message."""

  message: int
  start: int
  end: int


class Renderer:
  """Writes conversations by a template."""

  def __init__(self, template: str, tokens: Mapping[str, str], source: str):
    """Compiles a template.

    Args:
      template: in Jinja.
      tokens: variables of the template, such as `bos_token`.
      source: the template, as messages call it.

    Raises:
      UserError: it is no template.
    """
    if importlib.util.find_spec("jinja2") is None:
      raise UserError(f"{source} needs the package jinja2; pip install jinja2")
    self._tokens, self._source = dict(tokens), source
    self._process = subprocess.Popen(
      [sys.executable, str(WORKER)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
    )
    weakref.finalize(self, self._process.kill)
    self._ask(template, "")

  def text(self, messages: Messages, where: str) -> tuple[str, list[Span]]:
    """A conversation as text, and the contents of its messages therein.

    Args:
      messages: with `role` and `content`.
      where: the location of the conversation in errors.

    Raises:
      UserError: the template refuses the messages, takes too long, or writes
        their contents in another way than as they are.
    """
    contents = [m["content"] for m in messages]
    if any(FIND_MARK.search(content) for content in contents):
      raise UserError(f"{where} has characters for private use (U+E000)")
    stand_ins = [
      {**m, "content": MARK.format(i)} for i, m in enumerate(messages)
    ]
    marked = self._render(stand_ins, where)
    text = self._render(messages, where)
    spans = _locate(text, marked, contents)
    if spans is not None:
      return text, spans
    raise UserError(
      f"{where}: {self._source} does not write the contents of its messages as"
      " they are, so that it cannot be seen which text is the assistant's; use"
      " another task.template"
    )

  def _render(self, messages: Messages, where: str) -> str:
    variables = {"messages": messages, "add_generation_prompt": False}
    return self._ask({**self._tokens, **variables}, where)

  def _ask(self, request: Any, where: str) -> str:
    """The worker's answer."""
    before = f"{where}: {self._source}" if where else self._source
    found = _exchange(self._process, json.dumps(request).encode() + b"\n")
    if found is None:
      self._process.kill()
      raise UserError(
        f"{before} took more than {SECONDS:g} s or too much memory; use another"
        " task.template"
      )
    answer = json.loads(found)
    if "error" in answer:
      raise UserError(f"{before} cannot be used ({answer['error']})")
    return answer["text"]


def _exchange(process: subprocess.Popen, request: bytes) -> bytes | None:
  """Writes a line to a process and reads one; None if it takes too long."""
  assert process.stdin is not None and process.stdout is not None
  end, found = time.monotonic() + SECONDS, b""
  try:
    process.stdin.write(request)
    process.stdin.flush()
  except BrokenPipeError:
    return None
  with selectors.DefaultSelector() as selector:
    selector.register(process.stdout, selectors.EVENT_READ)
    while not found.endswith(b"\n"):
      if not selector.select(max(0.0, end - time.monotonic())):
        return None
      part = os.read(process.stdout.fileno(), 2**16)
      if not part:
        return None
      found += part
  return found


def _locate(
  text: str, marked: str, contents: Sequence[str]
) -> list[Span] | None:
  """Where a text has the contents for which another has marks.

  Args:
    text: a conversation as the template writes it.
    marked: the same with marks in place of contents.
    contents: of the messages; they may be without the spaces around them.

  Returns:
    None where the texts differ in anything else.
  """
  before, *rest = FIND_MARK.split(marked)  # text, number, text, ...
  spans, at = [], len(before)
  for number, after in zip(map(int, rest[::2]), rest[1::2], strict=True):
    whole = contents[number]
    fits = (c for c in (whole, whole.strip()) if text.startswith(c + after, at))
    content = next(fits, None)
    if content is None:
      return None
    spans.append(Span(number, at, at + len(content)))
    at += len(content) + len(after)
  return spans if text.startswith(before) and at == len(text) else None


class Writer:
  """Tokenizes conversations as a checkpoint's own template writes them.

  The text is tokenized as a whole, as it is when the model is used.
  """

  begin = ()  # the template writes the token at the start itself

  def __init__(self, settings: Fields, tokenizer: tokenizers.Tokenizer):
    """Prepares a template, and writes a conversation to see that it works.

    Args:
      settings: those of tokenizer_config.json.
      tokenizer: the checkpoint's.

    Raises:
      UserError: there is no template, or it cannot be used.
    """
    self._template = find_template(settings)
    self._source = f"the chat_template of {settings.source}"
    tokens = {n: t for n in TOKENS if (t := settings.token(n))}
    self._renderer = Renderer(self._template, tokens, self._source)
    self.markup = tokenizer
    self.markup.no_padding()
    self.markup.no_truncation()
    added = tokenizer.get_added_tokens_decoder().items()
    self._special = {i for i, token in added if token.special}
    probe = self.row(PROBE)
    last = int(probe.ids[probe.loss_mask][-1])
    self.closing = tokenizer.id_to_token(last) or ""

  def jinja(self, system: str) -> str:
    """The template, for the trained model."""
    if system:
      raise UserError(
        "task.system is for templates of task.template that can be written"
        " anew; task.template=own would not say it when the model is used. Put"
        " it into the conversations"
      )
    return self._template

  def row(self, messages: Messages, where: str = "") -> chat.Row:
    """The tokens of a whole conversation; see `chat.Writer`."""
    text, spans = self._renderer.text(messages, where)
    with inputs.refusing("the tokenizer cannot encode a conversation"):
      encoding = self.markup.encode(text, add_special_tokens=False)
    starts, ends = np.array(encoding.offsets).reshape(-1, 2).T
    special = np.isin(encoding.ids, list(self._special))
    mask = np.zeros(len(starts), bool)
    for message, first, last in spans:
      inside = (starts < last) & (ends > first)
      if (special & inside).any():
        raise UserError(
          f"{where}: a message has"
          f" {encoding.tokens[np.argmax(special & inside)]!r}, which the"
          " template would read as one of its own tokens; remove it, or use"
          " another task.template"
        )
      if messages[message]["role"] != chat.ASSISTANT:
        continue
      after = np.flatnonzero(special & (starts >= last))
      if not after.size:
        raise UserError(
          f"{self._source} ends the assistant's messages with no special token"
          " of the tokenizer; use another task.template"
        )
      mask |= (starts < ends[after[0]]) & (ends > first)
    return chat.Row(
      np.array(encoding.ids, np.int32), mask, np.ones(len(mask), np.int32)
    )


def find_template(settings: Fields) -> str:
  """The chat template in a tokenizer_config.json.

  Raises:
    UserError: there is none, or no text.
  """
  name = "chat_template"
  named = settings.values.get(name)
  if isinstance(named, list):  # several, of which one is for conversations
    for each in named:
      if isinstance(each, Mapping) and each.get("name") == "default":
        return Fields(settings.source, each).text("template")
  if not settings.has(name):
    raise UserError(
      f"{settings.source} has no chat_template, which task.template=own needs;"
      " use another one"
    )
  return settings.text(name)
