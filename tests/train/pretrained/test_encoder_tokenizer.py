import json
import os
import pathlib

import numpy as np
import pytest
import tokenizers

from tests.train.pretrained import encoder_files
from train.common.errors import UserError
from train.models import encoder
from train.pretrained import encoder_tokenizer

CONFIG = encoder.Config(60, 16, 24, 2, 4, max_length=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  found = tmp_path_factory.mktemp("bert")
  encoder_files.write_bert(found)
  return found


@pytest.fixture(scope="module")
def tokenizer(folder):
  return encoder_tokenizer.load(folder, CONFIG)


def tokens(tokenizer, row):
  return [tokenizer.tokenizer.id_to_token(i) for i in row.ids]


def test_pairs_have_two_types_and_a_spelled_special_token_is_text(
  tokenizer,
):
  [row] = tokenizer.texts(["We [SEP]"], ["windows?"])
  assert " ".join(tokens(tokenizer, row)) == (
    "[CLS] we [UNK] [UNK] [UNK] [SEP] wind ##ow ##s ? [SEP]"
  )
  assert row.types.tolist() == [0] * 6 + [1] * 5
  assert row.ids.dtype == row.types.dtype == np.int32


def test_rows_are_padded_to_few_lengths(tokenizer):
  rows = tokenizer.texts(["we", "we the people"], ["of", "one"])
  batch = tokenizer.pad(rows, multiple=8, count=3)
  assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(
    ("ids", "mask", "types"), (3, 8)
  )
  assert batch["mask"].sum(axis=1).tolist() == [5, 7, 0]
  for row, ids, mask in zip(rows, batch["ids"], batch["mask"], strict=False):
    np.testing.assert_array_equal(ids[mask == 1], row.ids)
    assert (ids[mask == 0] == CONFIG.pad_id).all()
  assert tokenizer.pad(rows, length=20)["types"].shape == (2, 20)
  # At most the number of positions of the model.
  assert tokenizer.pad(rows, multiple=100)["ids"].shape == (2, 32)


CONTEXT = "We hold  that these states are one, and " * 3


def test_windows_cover_the_context_and_overlap(tokenizer):
  found = tokenizer.windows(["why?", "who?"], [CONTEXT, "we"], 20, 4, query=4)
  assert [w.example for w in found] == [0] * (len(found) - 1) + [1]
  assert len(found) > 3
  last = []
  for window in found[:-1]:
    inside = window.offsets[:, 0] >= 0
    assert (window.types[inside] == 1).all() and len(window.ids) <= 20
    spans = window.offsets[inside].tolist()
    assert last[-4:] == spans[:4] or not last
    last = [*last, *spans[4:]] if last else spans
    words = [CONTEXT[start:stop].lower() for start, stop in spans]
    assert words == np.array(tokens(tokenizer, window))[inside].tolist()
  # Each of the context's tokens is in a window, in order.
  whole = tokenizer.tokenizer
  whole.no_truncation()
  expected = whole.encode(CONTEXT, add_special_tokens=False).offsets
  assert list(map(tuple, last)) == expected


def test_long_questions_are_truncated_between_words(tokenizer):
  [window] = tokenizer.windows(["we the people of"], ["one"], 20, 2, query=2)
  assert " ".join(tokens(tokenizer, window)) == "[CLS] we the [SEP] one [SEP]"


def test_truncation_of_one_call_does_not_affect_the_next(tokenizer):
  text = ["we " * 30]
  assert len(tokenizer.texts(text, length=8)[0].ids) == 8
  assert len(tokenizer.texts(text, length=32)[0].ids) == 32
  tokenizer.windows(["we"], text, 20, 2, query=2)
  assert len(tokenizer.texts(text, length=32)[0].ids) == 32
  again = tokenizers.Tokenizer.from_str(tokenizer.text)
  assert again.truncation is None and again.padding is None


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda t: t.texts(["we"], length=33), "33 tokens: .* has 32 positions"),
    (lambda t: t.texts(["we"], length=3), "need 4 or more"),
    (lambda t: t.windows(["we"], ["one"], 32, 20, query=20), "need 44 or more"),
    (
      lambda t: t.texts(["we " * 20], ["one"], 8, "only_second"),
      "use longest_first",
    ),
  ],
)
def test_impossible_lengths_are_refused(tokenizer, call, message):
  with pytest.raises(UserError, match=message):
    call(tokenizer)


def test_do_lower_case_of_the_settings_is_used(tmp_path):
  encoder_files.write_bert(tmp_path)
  settings = tmp_path / "tokenizer_config.json"
  for lower, expected in (("true", "we"), ("false", "[UNK]")):
    settings.write_text(f'{{"do_lower_case": {lower}}}')
    found = encoder_tokenizer.load(tmp_path, CONFIG)
    [row] = found.texts(["WE"])
    assert tokens(found, row)[1] == expected


def write_json(folder: pathlib.Path, change) -> None:
  found = encoder_tokenizer.load(folder, CONFIG).tokenizer
  change(found)
  found.save(str(folder / "tokenizer.json"))


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path):
  encoder_files.write_bert(tmp_path)
  roberta = encoder.Config(60, 16, 24, 2, 4, n_types=1)
  with pytest.raises(UserError, match="gives the second text the type 1"):
    encoder_tokenizer.load(tmp_path, roberta)
  beyond = encoder.Config(60, 16, 24, 2, 4, pad_id=50)
  with pytest.raises(UserError, match="no token 50, the model's pad_token_id"):
    encoder_tokenizer.load(tmp_path, beyond)
  bare = tokenizers.processors.Sequence([])

  def strip(found):
    found.post_processor = bare

  write_json(tmp_path, strip)
  with pytest.raises(UserError, match="adds no special tokens to a text"):
    encoder_tokenizer.load(tmp_path, CONFIG)
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
    encoder_tokenizer.load(tmp_path, CONFIG)


def test_a_vocabulary_without_special_tokens_is_refused(tmp_path):
  (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nwe\n")
  with pytest.raises(UserError, match=r"vocabulary has no \[CLS\]"):
    encoder_tokenizer.load(tmp_path, CONFIG)


def test_a_pipe_in_place_of_a_vocabulary_is_not_waited_for(tmp_path):
  encoder_files.write_roberta(tmp_path)
  (tmp_path / "vocab.json").unlink()
  os.mkfifo(tmp_path / "vocab.json")
  with pytest.raises(UserError, match=r"vocab\.json .*not a regular file"):
    encoder_tokenizer.load(tmp_path, CONFIG)


@pytest.mark.parametrize("value", ["true", 1, [], {"a": 1}])
def test_a_setting_of_a_wrong_type_is_named(value, tmp_path):
  encoder_files.write_bert(tmp_path)
  text = json.dumps({"do_lower_case": value})
  (tmp_path / "tokenizer_config.json").write_text(text)
  with pytest.raises(UserError, match=r"config\.json: do_lower_case is .*true"):
    encoder_tokenizer.load(tmp_path, CONFIG)
