"""Conversations in a checkpoint's own template."""

import pytest

from tests.train.finetuning import files
from train.common.errors import UserError
from train.common.fields import Fields
from train.finetuning import chat_template
from train.finetuning.chat import make_writer

MESSAGES = [
  {"role": "user", "content": "we the people"},
  {"role": "assistant", "content": "hold peace"},
  {"role": "user", "content": "of"},
  {"role": "assistant", "content": "these states"},
]
CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n'"
  " + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
)
# As Mistral's: a begin token, no roles, trimmed contents, a word of refusal.
BRACKETS = """\
{{ bos_token }}
{%- for message in messages %}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('roles must alternate') }}
  {%- elif message['role'] == 'user' %}
    {{- '[INST] ' + message['content'] | trim + ' [/INST]' }}
  {%- else %}
    {%- generation %}
    {{- ' ' + message['content'] + eos_token }}
    {%- endgeneration %}
  {%- endif %}
{%- endfor %}"""
FOREVER = (
  """\
{% if messages | length > 2 %}{% for i in range(99999) %}
{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"""
  + CHATML
)


@pytest.fixture(scope="module")
def make(writer):
  """Makes writers with a tokenizer that knows ChatML's tokens."""

  def make(template, **more):
    begin, end = files.SPECIAL_TOKENS[:2]
    given = {"bos_token": begin, "eos_token": end, "chat_template": template}
    text = writer.markup.to_str()
    tokenizer = type(writer.markup).from_str(text)
    fields = Fields("tokenizer_config.json", given | more)
    return chat_template.Writer(fields, tokenizer)

  return make


def decode(writer, ids):
  return writer.markup.decode(ids, skip_special_tokens=False)


def test_chatml_is_written_and_learned_as_by_ours(make, writer):
  own, ours = make(CHATML), writer.row(MESSAGES)
  found = own.row(MESSAGES)
  assert decode(own, found.ids) == decode(writer, ours.ids)
  learned = decode(own, found.ids[found.loss_mask])
  assert learned == decode(writer, ours.ids[ours.loss_mask])
  assert own.closing == "<|im_end|>" == writer.closing
  assert own.jinja("") == CHATML
  with pytest.raises(UserError, match=r"task\.system is for"):
    own.jinja("be brief")


def test_a_template_may_trim_and_refuse(make):
  own = make(BRACKETS)
  begin, end = files.SPECIAL_TOKENS[:2]
  assert own.closing == end
  messages = [{"role": "user", "content": " hold \n"}, *MESSAGES[1:]]
  row = own.row(messages)
  assert decode(own, row.ids) == (
    f"{begin}[INST] hold [/INST] hold peace{end}[INST] of [/INST] these"
    f" states{end}"
  )
  # The space before a reply belongs to its first token.
  learned = decode(own, row.ids[row.loss_mask])
  assert learned.replace(" ", "") == f"holdpeace{end}thesestates{end}"
  with pytest.raises(UserError, match=r"row 3: .*roles must alternate"):
    own.row(MESSAGES[1:], "row 3")


def test_a_text_of_a_user_is_no_token_of_the_template(make):
  messages = [{"role": "user", "content": "we <|im_end|>"}, *MESSAGES[1:]]
  with pytest.raises(UserError, match=r"row 3: a message has '<\|im_end\|>'"):
    make(CHATML).row(messages, "row 3")


@pytest.mark.parametrize(
  ("template", "message"),
  [
    ("{% for %}", r"cannot be used \(TemplateSyntaxError"),
    ("{{ messages.__class__.__mro__ }}", r"\(SecurityError"),
    ("{{ [].append(1) }}", r"\(SecurityError"),
    ("{{ messages[0]['content'] | upper }}", "as they are"),
    ("{{ ('x' * 9999999) * 9999 }}", "MemoryError|too much memory"),
    (CHATML.replace("<|im_end|>", "END"), "with no special token"),
  ],
)
def test_templates_that_cannot_be_used_are_refused(make, template, message):
  with pytest.raises(UserError, match=message):
    make(template)


def test_a_template_that_takes_forever_is_ended(make, monkeypatch):
  own = make(FOREVER)
  monkeypatch.setattr(chat_template, "SECONDS", 0.5)
  with pytest.raises(UserError, match=r"row 1: .* took more than 0.5 s"):
    own.row(MESSAGES, "row 1")


def test_a_template_is_found_by_its_name():
  several = [{"name": "tools", "template": "a"}]
  more = [*several, {"name": "default", "template": "b"}]
  find = lambda value: chat_template.find_template(
    Fields("tokenizer_config.json", {"chat_template": value})
  )
  assert find("a") == "a" and find(more) == "b"
  for value, message in (
    (None, "has no chat_template"),
    (several, "it must be a text"),
    (3, "it must be a text"),
  ):
    with pytest.raises(UserError, match=message):
      find(value)


def test_our_own_templates_can_be_own(make, writer):
  """Those that are exported are read as any other."""
  for name in ("chatml", "plain"):
    end = files.SPECIAL_TOKENS[1]
    ours = make_writer(name, writer.markup.to_str(), end)
    own = make(ours.jinja(""))
    assert own.closing == ours.closing
    row, found = ours.row(MESSAGES), own.row(MESSAGES)
    assert decode(own, found.ids) == decode(ours, row.ids)
