import dataclasses
import itertools
import json
import lzma
import math
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.train.conftest import speech
from train import data
from train import tokenizer as bpe
from train.config import DataConfig
from train.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
  return bpe.train([speech(20)], 300)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@hypothesis.given(st.text())
@hypothesis.settings(
  max_examples=200,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.example(bpe.END)
@hypothesis.example("naïve \u0000\r\n\t 🙂 e\u0301 \u202e")
def test_any_text_survives_the_tokenizer(tokenizer, text):
  ids = tokenizer.encode(text).ids
  assert tokenizer.decode(ids, skip_special_tokens=False) == text
  assert tokenizer.token_to_id(bpe.END) not in ids


def test_the_tokenizer_is_trained_once(tmp_path):
  first, path, found = bpe.cached(["union and peace"] * 9, 280, tmp_path)
  again, same, found_again = bpe.cached(["union and peace"] * 9, 280, tmp_path)
  _, other, _ = bpe.cached(["union and war"] * 9, 280, tmp_path)
  assert (found, found_again) == (False, True)
  assert path == same != other
  assert first.to_str() == again.to_str()
  assert again.encode_special_tokens


@hypothesis.given(st.integers(0, 200), st.integers(1, 20))
def test_packing_keeps_every_token_once_in_order(count, length):
  rows = data.pack(np.arange(count), length)
  assert rows.shape == (count // (length + 1), length + 1)
  assert rows.reshape(-1).tolist() == list(range(rows.size))
  assert count - rows.size <= length


def test_encoding_keeps_every_document_and_closes_it(
  tokenizer, cache, tmp_path
):
  texts = ["peace and union", "the people", "naïve"] * 5
  path = tmp_path / "a.jsonl"
  path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
  documents = data.load_documents(DataConfig(path=str(path)), cache)
  stream = data.encode(documents, tokenizer)
  end = tokenizer.token_to_id(bpe.END)
  ends = np.flatnonzero(stream == end)
  pieces = np.split(stream, ends + 1)[:-1]
  assert [tokenizer.decode(p[:-1].tolist()) for p in pieces] == texts
  assert stream.dtype == np.int32 and stream[-1] == end


@hypothesis.given(st.integers(2, 60), st.integers(2, 30))
def test_held_out_documents_are_never_trained_on(count, every):
  class Documents(list):
    def select(self, indices):
      return [self[i] for i in indices]

  documents: Any = Documents(range(count))
  if every // 2 >= count:
    with pytest.raises(UserError, match="holdout_every"):
      data.split(documents, every)
    return
  split: Any = data.split(documents, every)
  train, held_out = split
  assert sorted(train + held_out) == list(range(count))
  assert train and held_out
  assert all(b - a == every for a, b in itertools.pairwise(held_out))


def test_an_epoch_takes_every_row_once_and_each_epoch_anew():
  rows = np.arange(24)[:, None]
  epochs = [
    [data.batch_at(rows, 6, 7, 4 * e + i)[:, 0] for i in range(4)]
    for e in range(2)
  ]
  first, second = map(np.concatenate, epochs)
  assert sorted(first) == sorted(second) == list(range(24))
  assert (first != second).any() and (first != np.arange(24)).any()
  other = np.concatenate([data.batch_at(rows, 6, 8, i)[:, 0] for i in range(4)])
  assert (other != first).any()


def test_a_batch_depends_on_its_step_alone():
  rows = np.arange(50)[:, None]
  late = data.batch_at(rows, 8, 0, 17)
  for index in range(17):
    data.batch_at(rows, 8, 0, index)
  np.testing.assert_array_equal(data.batch_at(rows, 8, 0, 17), late)


@pytest.mark.parametrize("count, limit", [(10, 99), (10, 7), (8, 8), (1, 5)])
def test_evaluation_weighs_every_row_once(count, limit):
  rows = np.arange(count * 3).reshape(count, 3)
  seen = []
  for batch, weights in data.evaluation_batches(rows, 4, limit):
    assert batch.shape == (4, 3)
    seen += batch[weights == 1].tolist()
  assert len(seen) == min(count, limit)
  assert len({tuple(row) for row in seen}) == len(seen)
  assert {tuple(row) for row in seen} <= {tuple(row) for row in rows.tolist()}


def test_unigram_perplexity_by_hand():
  # Counts 3, 1, 0 and one each: probabilities 4/7, 2/7, 1/7.
  found = data.unigram_perplexity(
    np.array([[0, 0], [0, 1]]), np.array([[0, 1, 2]]), 3
  )
  assert math.isclose(found, (7 / 4 * 7 / 2 * 7) ** (1 / 3), rel_tol=1e-12)


def test_a_whole_corpus_is_split_packed_and_disjoint(text_file, tmp_path):
  config = DataConfig(
    path=str(text_file), length=16, batch=4, cache=str(tmp_path)
  )
  corpus = data.prepare(config, 300)
  assert corpus.train.shape[1] == corpus.held_out.shape[1] == 17
  text = corpus.tokenizer.decode(corpus.train.reshape(-1).tolist())
  paragraphs = text_file.read_text().split("\n\n")
  assert paragraphs[10] not in text
  assert all(p in text for p in paragraphs[:9] + paragraphs[11:20])


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.xz"])
def test_json_lines_compressed_or_not(tmp_path, cache, suffix):
  raw = b"".join(
    json.dumps({"year": i, "text": f"speech {i}"}).encode() + b"\n"
    for i in range(5)
  )
  path = tmp_path / f"speeches.{suffix}"
  path.write_bytes(lzma.compress(raw) if suffix.endswith("xz") else raw)
  documents = data.load_documents(DataConfig(path=str(path)), cache)
  assert list(documents["text"]) == [f"speech {i}" for i in range(5)]


def test_the_bundled_corpus_is_whole(cache):
  documents = data.load_documents(DataConfig(), cache)
  assert len(documents) == 233
  train, held_out = data.split(documents, 20)
  share = sum(map(len, held_out["text"])) / sum(map(len, documents["text"]))
  assert 0.02 < share < 0.08
  assert not set(train["text"]) & set(held_out["text"])


BAD_FILES = {
  "missing.txt": (None, "does not exist"),
  "empty.txt": (b"", "is empty"),
  "blank.txt": (b" \n\n \n", "no text"),
  "latin.txt": ("na\xefve".encode("latin-1"), "cannot be read"),
  "speech.pdf": (b"words", "ends in none of"),
  "broken.jsonl": (b'{"text": "a"}\n{"text', "cannot be read"),
  "other.jsonl": (b'{"body": "a"}\n', "no field 'text'"),
  "numbers.jsonl": (b'{"text": 3}\n', "not strings"),
  "single.txt": (b"one paragraph only", "single document"),
  "short.txt": (b"one\n\ntwo\n\nthree", "holdout_every"),
  "small.txt": (b"\n\n".join([b"words"] * 30), "fewer than one batch"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, name):
  content, message = BAD_FILES[name]
  path = tmp_path / name
  if content is not None:
    path.write_bytes(content)
  config = DataConfig(path=str(path), cache=str(tmp_path / "cache"))
  with pytest.raises(UserError, match=message) as raised:
    data.prepare(config, 300)
  assert name in str(raised.value) or "holdout" in message or "single" in name


def test_too_few_held_out_tokens(text_file, tmp_path):
  config = DataConfig(
    path=str(text_file), length=16, batch=2, cache=str(tmp_path)
  )
  config = dataclasses.replace(config, length=250, holdout_every=200)
  with pytest.raises(UserError, match="held-out documents do not fill"):
    data.prepare(config, 300)


def test_a_vocabulary_smaller_than_the_bytes(text_file):
  with pytest.raises(UserError, match=r"model.vocab_size is 100.* 257"):
    data.prepare(DataConfig(path=str(text_file)), 100)
