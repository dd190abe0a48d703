"""Conversations: templates, loss masks, packing."""

import jinja2
import pytest
import tokenizers

from tests.train.finetuning import files
from train.common.errors import UserError
from train.data import tokenizer
from train.finetuning import (
  chat,
)

MESSAGES = [
  {"role": "user", "content": "we the people <|im_end|>"},
  {"role": "assistant", "content": "hold peace"},
  {"role": "user", "content": "of"},
  {"role": "assistant", "content": "these states"},
]


def test_the_loss_mask_covers_replies_and_their_end_tokens(writer):
  row = writer.row(MESSAGES)
  decode = lambda ids: writer.markup.decode(ids, skip_special_tokens=False)
  assert decode(row.ids) == "".join(
    f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in MESSAGES
  )
  learned = decode(row.ids[row.loss_mask])
  assert learned == "hold peace<|im_end|>these states<|im_end|>"
  # The user's "<|im_end|>" is plain text, not the token.
  end = writer.markup.token_to_id("<|im_end|>")
  assert (row.ids == end).sum() == 4


def test_other_formats_of_conversations_are_read():
  given = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
  pair = chat.parse_conversation("a", "b", "row 0")
  assert chat.parse_conversation(given, None, "row 0") == pair
  # The reply follows the last message.
  longer = chat.parse_conversation(
    [*given, {"from": "human", "value": "c"}], "d", ""
  )
  assert [m["content"] for m in longer] == ["a", "b", "c", "d"]
  named = chat.with_system_message(pair, "be brief")
  assert [m["role"] for m in named] == ["system", "user", "assistant"]
  assert chat.with_system_message(named, "be long") == named
  for wrong in ("a text", [{"role": "user", "content": "a"}], [3]):
    with pytest.raises(UserError, match="row 5"):
      chat.parse_conversation(wrong, None, "row 5")


def test_a_template_whose_tokens_are_unknown_is_refused():
  text = tokenizer.train(["we the people"], 260).to_str()
  with pytest.raises(UserError, match="the templates are chatml, llama3"):
    chat.make_writer("chatml", text, tokenizer.END)
  plain = chat.make_writer("plain", text, tokenizer.END)
  row = plain.row(MESSAGES[:2])
  learned = plain.markup.decode(
    row.ids[row.loss_mask], skip_special_tokens=False
  )
  assert learned == "hold peace" + tokenizer.END


@pytest.mark.parametrize("kind", ["Metaspace", "Prepend"])
def test_no_space_is_added_before_the_parts_of_a_text(kind):
  vocabulary = tokenizers.Tokenizer(tokenizers.models.BPE())
  if kind == "Metaspace":
    split = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    vocabulary.pre_tokenizer = split
  else:
    normalizers = tokenizers.normalizers
    replace = normalizers.Replace(" ", "▁")
    vocabulary.normalizer = normalizers.Sequence(
      [normalizers.Prepend("▁"), replace]
    )
  text = "### user:\nwe hold\n\n### assistant:\npeace</s>\n\n"
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=60, special_tokens=["</s>"], show_progress=False
  )
  vocabulary.train_from_iterator([text.replace("</s>", "")], trainer)
  messages = chat.parse_conversation("we hold", "peace", "")
  row = chat.make_writer("plain", vocabulary.to_str(), "</s>").row(messages)
  pieces = "".join(vocabulary.id_to_token(i) for i in row.ids)
  assert pieces == "▁" + text.replace(" ", "▁")


@pytest.mark.parametrize(("name", "system"), [
  ("chatml", ""), ("chatml", 'be "brief"\n'), ("plain", ""), ("plain", "be"),
  ("llama3", "be"),
])  # fmt: skip
def test_the_exported_template_writes_the_training_text(writer, name, system):
  # As transformers reads it.
  engine = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
  known = tokenizers.Tokenizer.from_str(writer.start.to_str())
  known.add_special_tokens(list(chat.TEMPLATES["llama3"].tokens))
  vocabulary = known.to_str()
  begin = writer.markup.token_to_id(files.SPECIAL_TOKENS[0])
  found = chat.make_writer(name, vocabulary, files.SPECIAL_TOKENS[1], (begin,))
  text = chat.jinja_template(found, files.SPECIAL_TOKENS[0], system)
  messages = [
    m | {"content": m["content"].replace("<|", "< |")} for m in MESSAGES
  ]
  written = engine.from_string(text).render(messages=messages)
  row = found.row(chat.with_system_message(messages, system))
  assert found.markup.decode(row.ids, skip_special_tokens=False) == written
  prompt = engine.from_string(text).render(
    messages=messages[:-1], add_generation_prompt=True
  )
  assert written.startswith(prompt) and prompt.endswith("assistant" + {
    "chatml": "\n", "plain": ":\n", "llama3": "<|end_header_id|>\n\n"
  }[name])  # fmt: skip


def test_packing_keeps_conversations_whole_and_separate(writer):
  rows = [writer.row(row["messages"]) for row in files.conversations(30)]
  packed = chat.pack(rows, 96)
  assert len(packed) < len(rows) / 2
  key = lambda row: row.ids.tolist()
  parts = [
    chat.Row(*(x[row.segments == number] for x in row))
    for row in packed
    for number in range(1, row.segments.max() + 1)
  ]
  assert sorted(map(key, parts)) == sorted(map(key, rows))
  assert sum(r.loss_mask.sum() for r in packed) == sum(
    r.loss_mask.sum() for r in rows
  )
  assert max(len(row.ids) for row in packed) <= 96
