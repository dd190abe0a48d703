import collections
import dataclasses
import itertools
import json
import math
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from train.common.errors import UserError
from train.config.schema import DataConfig
from train.data import corpus as corpus_lib
from train.data import holdout, packing


def config_of(path, folder, **fields):
  settings: dict[str, Any] = {"length": 16, "batch": 4} | fields
  return DataConfig(path=str(path), cache=str(folder), **settings)


@hypothesis.given(st.integers(0, 200), st.integers(1, 20))
def test_packing_has_every_token_once_in_order(count, length):
  found = packing.pack(np.arange(count), length)
  assert found.shape == (count // (length + 1), length + 1)
  assert found.reshape(-1).tolist() == list(range(found.size))
  assert count - found.size <= length


def test_padding_puts_each_document_in_a_row():
  found = packing.pad([np.arange(2), np.arange(9), np.arange(4)], 3)
  assert found.tolist() == [[0, 1, -1, -1], [0, 1, 2, 3], [0, 1, 2, 3]]
  assert found.dtype == np.int32


@hypothesis.given(st.integers(2, 60), st.integers(2, 30))
def test_held_out_documents_are_never_trained_on(count, every):
  class Documents(list):
    def select(self, indices):
      return [self[i] for i in indices]

  documents: Any = Documents(range(count))
  if every // 2 >= count:
    with pytest.raises(UserError, match="holdout_every"):
      holdout.split(documents, every)
    return
  split: Any = holdout.split(documents, every)
  train, held_out = split
  assert sorted(train + held_out) == list(range(count))
  assert train and held_out
  assert all(b - a == every for a, b in itertools.pairwise(held_out))


def take(feed, count, state=None, part=0, parts=1, seed=7):
  state = feed.start(part, parts) if state is None else state
  found = itertools.islice(feed.batches(state, seed, part, parts), count)
  return [(batch[:, 0].tolist(), after) for batch, after in found]


def test_an_epoch_has_every_row_once_and_an_order_of_its_own():
  feed = packing.Rows(np.arange(26)[:, None], 6)
  batches = [batch for batch, _ in take(feed, 8)]
  first, second = np.reshape(batches, (2, 24)).tolist()
  assert len(set(first)) == len(set(second)) == 24
  assert first != second and first != sorted(first)
  assert [batch for batch, _ in take(feed, 4, seed=8)] != batches[:4]


def test_rows_in_memory_continue_from_any_position():
  feed = packing.Rows(np.arange(50)[:, None], 8)
  whole = take(feed, 20)
  for index in (1, 5, 6, 7, 17):  # an epoch has six batches
    state = json.loads(json.dumps(whole[index - 1][1]))
    assert take(feed, 3, state) == whole[index : index + 3]
    halves = [take(feed, 1, state, part, 2)[0] for part in (0, 1)]
    assert halves[0][0] + halves[1][0] == whole[index][0]
    assert halves[0][1] == halves[1][1] == whole[index][1]


@pytest.mark.parametrize("count, parts", [(10, 1), (10, 2), (8, 2), (1, 4)])
def test_evaluation_reads_every_row_once(count, parts):
  held_out = np.arange(count * 3, dtype=np.int32).reshape(count, 3)
  streams = [
    list(corpus_lib.evaluation_batches(held_out, 4, part, parts))
    for part in range(parts)
  ]
  assert len({len(stream) for stream in streams}) == 1
  assert all(batch.shape == (4 // parts, 3) for s in streams for batch in s)
  read = np.concatenate(
    [np.concatenate(batch) for batch in zip(*streams, strict=True)]
  )
  real = read[read[:, 0] != packing.PAD]
  assert real.tolist() == held_out.tolist()
  assert (read[len(real) :] == packing.PAD).all()


def test_unigram_perplexity_by_hand():
  # Counts 3, 1, 0 plus one each: probabilities 4/7, 2/7, 1/7.
  found = corpus_lib.unigram_perplexity(
    np.array([3, 1, 0]), np.array([[0, 1], [2, packing.PAD]])
  )
  assert math.isclose(found, (7 / 4 * 7 / 2 * 7) ** (1 / 3), rel_tol=1e-12)


@pytest.fixture(scope="module")
def corpus(text_file, tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus")
  return corpus_lib.prepare(config_of(text_file, folder, prefetch=0), 300)


def test_training_and_held_out_rows_are_disjoint(corpus, text_file):
  train = corpus.feed.rows
  assert train.shape[1] == corpus.held_out.shape[1] == 17
  text = corpus.tokenizer.decode(train.reshape(-1).tolist())
  paragraphs = text_file.read_text().split("\n\n")
  assert paragraphs[10] not in text
  assert all(p in text for p in paragraphs[:9] + paragraphs[11:20])
  counts = collections.Counter(train.reshape(-1).tolist())
  assert all(corpus.counts[i] == n for i, n in counts.items())
  assert corpus.counts.sum() == train.size == corpus.train_tokens


def test_held_out_bytes_are_those_of_the_predicted_tokens(corpus):
  texts = map(corpus.tokenizer.decode, corpus.held_out[:, 1:].tolist())
  assert corpus.held_out_bytes == sum(len(t.encode()) for t in texts)


def test_a_loader_continues_from_its_state(corpus):
  with corpus.loader(seed=3) as loader:
    first = [next(loader).tolist() for _ in range(3)]
    state = loader.state()
  with corpus.loader(seed=3) as loader:
    assert [next(loader).tolist() for _ in range(3)] == first
    fourth = next(loader)
  with corpus.loader(seed=3, state=state) as loader:
    np.testing.assert_array_equal(next(loader), fourth)
  assert first[0] != first[1]
  with pytest.raises(UserError, match=r"data.batch is 4.* 3 processes"):
    corpus.loader(seed=3, parts=3)


def test_a_copy_of_a_held_out_document_is_not_trained_on(tmp_path):
  texts = [f"speech number {i} of the people" for i in range(60)]
  texts[31] = f"  {texts[10]}\n"  # 10, 30 and 50 are held out
  path = tmp_path / "speeches.jsonl"
  path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
  corpus = corpus_lib.prepare(config_of(path, tmp_path), 300)
  text = corpus.tokenizer.decode(corpus.feed.rows.reshape(-1).tolist())
  assert "number 10" not in text and "number 31" not in text
  assert text.count("number ") == 56


def test_padded_rows_hold_one_document_each(tmp_path):
  texts = [f"{i} " + "peace " * (i % 9) for i in range(40)]
  path = tmp_path / "speeches.jsonl"
  path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
  corpus = corpus_lib.prepare(config_of(path, tmp_path, rows="padded"), 300)
  assert len(corpus.feed.rows) == 38 and len(corpus.held_out) == 2
  train = [t for i, t in enumerate(texts) if i % 20 != 10]
  for row, text in zip(corpus.feed.rows, train, strict=True):
    ids = [*corpus.tokenizer.encode(text).ids, corpus.encoder.end]
    expected = (ids + [packing.PAD] * 17)[:17]
    assert row.tolist() == expected
  padding = (corpus.feed.rows == packing.PAD).sum()
  assert corpus.train_tokens == corpus.feed.rows.size - padding > 0


def test_another_file_can_be_held_out(text_file, tmp_path):
  other = tmp_path / "other.txt"
  other.write_text("\n\n".join(f"an address, part {i}" for i in range(30)))
  config = config_of(text_file, tmp_path, validation=str(other), eval_rows=3)
  corpus = corpus_lib.prepare(config, 300)
  assert "address" in corpus.tokenizer.decode(corpus.held_out[1].tolist())
  assert len(corpus.held_out) == 3
  text = corpus.tokenizer.decode(corpus.feed.rows.reshape(-1).tolist())
  assert all(p in text for p in text_file.read_text().split("\n\n")[:99])


def test_a_text_that_is_all_held_out_is_refused(text_file, tmp_path):
  config = config_of(text_file, tmp_path, validation=str(text_file))
  with pytest.raises(UserError, match="every document to train on is also"):
    corpus_lib.prepare(config, 300)


def test_the_bundled_corpus_has_all_speeches(tmp_path_factory):
  from train.data import sources

  folder = tmp_path_factory.mktemp("bundled")
  documents: Any = sources.load(DataConfig(), folder).train
  assert len(documents) == 233
  train, held_out = holdout.split(documents, 20)
  share = sum(map(len, held_out["text"])) / sum(map(len, documents["text"]))
  assert 0.02 < share < 0.08
  assert len(holdout.without(train, held_out["text"], "")) == len(train) == 221


def test_too_few_held_out_tokens_are_refused(text_file, tmp_path):
  config = config_of(text_file, tmp_path, batch=2)
  config = dataclasses.replace(config, length=250, holdout_every=200)
  with pytest.raises(UserError, match="held-out documents do not fill"):
    corpus_lib.prepare(config, 300)


def test_a_vocabulary_smaller_than_the_bytes_is_refused(text_file, tmp_path):
  with pytest.raises(UserError, match=r"model.vocab_size is 100.* 257"):
    corpus_lib.prepare(config_of(text_file, tmp_path), 100)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"length": 0}, "data.length must be above 0, got 0"),
    ({"batch": -1}, "data.batch must be above 0, got -1"),
    ({"eval_rows": 0}, "data.eval_rows must be above 0"),
    ({"shuffle_buffer": 0}, "data.shuffle_buffer must be above 0"),
    ({"holdout_every": 1}, "data.holdout_every must be above 1"),
    ({"prefetch": -1}, "data.prefetch must be above -1"),
    ({"path": "hub:"}, "data.path is 'hub:'; write hub:NAME"),
    ({"tokenizer": "hub:"}, "data.tokenizer is 'hub:'; write hub:NAME"),
    ({"split": ""}, "data.split is empty"),
    ({"text_field": ""}, "data.text_field is empty"),
    ({"end_token": "</s>"}, "data.end_token is '</s>', but the tokenizer"),
  ],
)
def test_a_wrong_field_is_named(fields, message):
  with pytest.raises(UserError) as raised:
    DataConfig(**fields)
  assert str(raised.value).startswith(message)
