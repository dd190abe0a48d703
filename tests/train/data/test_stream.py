import collections
import gzip
import itertools
import json

import numpy as np
import pytest

from train.common.errors import UserError
from train.config.schema import DataConfig
from train.data import corpus as corpus_lib
from train.data import holdout, stream

SHARDS, DOCUMENTS = 3, 40


def document(shard, index):
  return f"<{shard}:{index}> " + "peace and union " * ((shard + index) % 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Shards of unequal length in the format of C4; one is empty."""
  root = tmp_path_factory.mktemp("shards")
  for shard in range(SHARDS):
    lines = [
      json.dumps({"text": document(shard, i), "url": "x"})
      for i in range(DOCUMENTS + shard)
    ]
    path = root / f"c4-train.{shard:05d}.json.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
  (root / "c4-train.00009.json.gz").write_bytes(gzip.compress(b""))
  held_out = root / "validation" / "held.json"
  held_out.parent.mkdir()
  # The last is also a training document.
  texts = [*(f"held out {i} of them" for i in range(5)), document(1, 7)]
  held_out.write_text("\n".join(json.dumps({"text": t}) for t in texts))
  return root


@pytest.fixture(scope="module")
def make(folder, tmp_path_factory):
  cache = tmp_path_factory.mktemp("cache")

  def prepare(**fields):
    settings = {
      "path": str(folder / "c4-*.gz"),
      "validation": str(folder / "validation/held.json"),
      "stream": "true", "length": 8, "batch": 4, "eval_rows": 99,
      "shuffle_buffer": 16, "cache": str(cache), "prefetch": 0,
    }  # fmt: skip
    return corpus_lib.prepare(DataConfig(**(settings | fields)), 300)

  return prepare


@pytest.fixture(scope="module")
def packed(make):
  return make()


@pytest.fixture(scope="module")
def padded(make):
  return make(rows="padded", length=60)


def take(corpus, count, state=None, seed=5, part=0, parts=1):
  with corpus.loader(seed, part, parts, state) as loader:
    found = []
    for _ in range(count):
      rows = next(loader).tolist()
      found.append((rows, json.loads(json.dumps(loader.state()))))
    return found


def names(corpus, batches):
  """The documents that begin in the batches, by epoch."""
  found = collections.defaultdict(list)
  for rows, state in batches:
    for row in rows:
      text = corpus.tokenizer.decode([i for i in row if i >= 0])
      name = text.partition("> ")[0].strip("<")
      shard, index = map(int, name.split(":"))
      found[state["epoch"]].append((shard, index))
  return found


ALL = {(s, i) for s in range(SHARDS) for i in range(DOCUMENTS + s)}


def test_an_epoch_has_every_document_once_and_an_order_of_its_own(padded):
  rows = [row for batch, _ in take(padded, 70) for row in batch]
  texts = [padded.tokenizer.decode([i for i in r if i >= 0]) for r in rows]
  # The copy of a held-out document is skipped.
  expected = sorted(document(*name) for name in ALL - {(1, 7)})
  size = len(expected)
  assert sorted(texts[:size]) == sorted(texts[size : 2 * size]) == expected
  assert texts[:size] != texts[size : 2 * size]
  assert texts[:16] != sorted(texts[:16])
  assert take(padded, 3) != take(padded, 3, seed=6)


def test_packed_rows_hold_the_documents_end_to_end(packed, padded):
  ids = np.array([batch for batch, _ in take(packed, 30)]).reshape(-1)
  order = [row for batch, _ in take(padded, 30) for row in batch]
  expected = [i for row in order for i in row if i >= 0]
  assert ids.tolist() == expected[: len(ids)]


def test_any_position_continues_bit_for_bit(packed):
  whole = take(packed, 130)
  states = [state for _, state in whole]
  middles = [s for s in states if s["offset"] and s["document"]]
  assert {s["epoch"] for s in states} >= {0, 1, 2}
  assert {s["block"] for s in states} >= {0, 3} and middles
  assert len({s["shard"] for s in states}) > 2
  for index in [*range(1, 12), 38, 39, 40, 41, 42, 76, 80, 81, 82, 117]:
    assert take(packed, 4, states[index]) == whole[index + 1 : index + 5]
  # Positions within a block, at its end, and at the end of an epoch.
  edges = [i for i in range(1, 125) if states[i]["block"] == 0
           and states[i - 1]["block"]]  # fmt: skip
  for index in edges:
    for near in (index - 1, index):
      assert take(packed, 3, states[near]) == whole[near + 1 : near + 4]
  assert edges


def test_padded_rows_continue_bit_for_bit(padded):
  whole = take(padded, 70)
  for index in (0, 1, 3, 4, 15, 29, 30, 31, 45, 62):
    state = whole[index][1]
    assert take(padded, 4, state) == whole[index + 1 : index + 5]


def test_prefetching_does_not_change_rows_or_positions(make, packed):
  ahead = make(prefetch=3)
  whole = take(ahead, 12)
  assert whole == take(packed, 12)
  assert take(ahead, 2, whole[6][1]) == whole[7:9]


@pytest.mark.parametrize("parts", [2, 4])
def test_the_parts_of_a_stream_are_disjoint(parts, make):
  # Two parts divide four shards; of four parts, one has the empty file.
  corpus = make(rows="padded", length=60, shuffle_buffer=7)
  read = []
  for part in range(parts):
    if parts == 4 and part == 3:
      with pytest.raises(UserError, match=r"no document.* part 4 of 4"):
        take(corpus, 1, part=part, parts=parts)
      continue
    batches = take(corpus, 40, part=part, parts=parts)
    assert all(len(rows) == 4 // parts for rows, _ in batches)
    read.append({name for v in names(corpus, batches).values() for name in v})
  for one, other in itertools.combinations(read, 2):
    assert not one & other
  assert len(set.union(*read)) > 60


def test_more_parts_than_shards_divide_the_examples(folder, make):
  corpus = make(
    path=str(folder / "c4-train.00001.json.gz"), rows="padded", length=60
  )
  parts = [take(corpus, 22, part=part, parts=2) for part in (0, 1)]
  epochs = [names(corpus, batches).values() for batches in parts]
  found = [[*itertools.chain(*epoch)] for epoch in epochs]
  assert {i % 2 for _, i in found[0]} == {0}
  assert {i % 2 for _, i in found[1]} == {1}
  assert len(set(found[0] + found[1])) == DOCUMENTS  # 41, one held out
  assert found[0][:9] != sorted(found[0][:9])


def test_documents_are_held_out_by_their_text(make, folder):
  corpus = make(validation="none", holdout_every=4, rows="padded", length=60)
  held = {n for n in ALL if holdout.is_held_out(document(*n), 4)}
  assert 10 < len(held) < 60
  trained = names(corpus, take(corpus, 60))
  assert not {n for v in trained.values() for n in v} & held
  texts = [
    corpus.tokenizer.decode([i for i in row if i >= 0])
    for row in corpus.held_out.tolist()
  ]
  assert sorted(texts) == sorted(document(*name) for name in held)


def test_held_out_rows_stop_at_the_limit(make, packed):
  few = make(eval_rows=2)
  assert few.held_out.tolist() == packed.held_out[:2].tolist()
  text = few.tokenizer.decode(few.held_out[:, 1:].reshape(-1).tolist())
  assert few.held_out_bytes == len(text.encode())
  assert "held out" in packed.tokenizer.decode(packed.held_out[0].tolist())


def test_a_stream_trains_a_tokenizer_and_counts_tokens(make):
  plain = make(validation="none", holdout_every=4)
  assert plain.tokenizer.get_vocab_size() <= 300
  assert plain.counts.sum() > 500 and plain.train_tokens is None


def test_positions_of_another_text_are_refused(packed, folder, make):
  state = take(packed, 1)[0][1]
  with pytest.raises(UserError, match=r"has parts=1, but now parts=2"):
    packed.loader(0, 0, 2, state)
  with pytest.raises(UserError, match="position is of a text in memory"):
    packed.loader(0, state={"batches": 3})
  with pytest.raises(UserError, match=r"shards=4, but now shards=1"):
    other = make(path=str(folder / "c4-train.00001.json.gz"))
    other.loader(0, state=state)


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_a_stream_smaller_than_a_batch_is_refused(make, form):
  corpus = make(batch=2000, rows=form)
  with pytest.raises(UserError, match="fewer rows of 9 tokens than"):
    take(corpus, 1)


def test_a_broken_shard_is_named(make, tmp_path, folder):
  for path in folder.glob("*.gz"):
    (tmp_path / path.name).write_bytes(path.read_bytes())
  corpus = make(path=str(tmp_path), prefetch=2)
  broken = tmp_path / "c4-train.00002.json.gz"
  broken.write_bytes(broken.read_bytes()[:150])
  with pytest.raises(UserError, match="shard 3 of 4 cannot be read"):
    take(corpus, 99)


def test_chunks_are_limited_in_number_and_size(monkeypatch):
  monkeypatch.setattr(stream, "CHUNK", 3)
  monkeypatch.setattr(stream, "CHARACTERS", 10)
  texts = ["a", "b", "c", "d" * 11, "e" * 5, "f" * 5, "g"]
  found = [len(chunk) for chunk in stream.chunks(texts)]
  assert found == [3, 1, 2, 1]
