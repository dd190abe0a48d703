import bz2
import csv
import gzip
import io
import json
import lzma
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from train.common.errors import UserError
from train.config.schema import DataConfig
from train.data import corpus, sources, stream

TEXTS = [f"speech {i}, naïve 🙂" for i in range(5)]


def as_json(texts, field="text"):
  lines = [json.dumps({"year": i, field: t}) for i, t in enumerate(texts)]
  return ("\n".join(lines) + "\n").encode()


def as_array(texts):
  return json.dumps([{"text": text} for text in texts]).encode()


def as_csv(texts, separator=","):
  file = io.StringIO()
  writer = csv.writer(file, delimiter=separator)
  writer.writerows([["year", "text"], *([i, t] for i, t in enumerate(texts))])
  return file.getvalue().encode()


def as_parquet(texts):
  sink = io.BytesIO()
  pa.parquet.write_table(pa.table({"text": texts}), sink)
  return sink.getvalue()


def as_text(texts, between="\n\n"):
  return between.join(texts).encode()


FORMS = {
  "a.txt": as_text(TEXTS),
  "a.md": as_text(TEXTS),
  "a.txt.gz": gzip.compress(as_text(TEXTS)),
  "a.jsonl": as_json(TEXTS),
  "a.json": as_array(TEXTS),
  "a.json.gz": gzip.compress(as_json(TEXTS)),
  "a.jsonl.xz": lzma.compress(as_json(TEXTS)),
  "a.ndjson.bz2": bz2.compress(as_json(TEXTS)),
  "a.csv": as_csv(TEXTS),
  "a.csv.gz": gzip.compress(as_csv(TEXTS)),
  "a.tsv": as_csv(TEXTS, "\t"),
  "a.parquet": as_parquet(TEXTS),
  "[a] *b.jsonl": as_json(TEXTS),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def no_patience(monkeypatch):
  # `datasets` retries a failed read, which does not help with local files.
  monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)


def texts_of(config, cache):
  source = sources.load(config, cache)
  assert source.streamed == (config.stream == "true")
  train: Any = source.train
  if source.streamed:
    return list(stream.Shards(train, source.field, source.name).documents())
  return list(train["text"])


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_file_in_memory_and_streamed(form, tmp_path, cache):
  path = tmp_path / form
  path.write_bytes(FORMS[form])
  for choice in ("false", "true"):
    config = DataConfig(path=str(path), stream=choice)
    assert texts_of(config, cache) == TEXTS


@pytest.mark.parametrize("choice", ["false", "true"])
def test_folders_and_globs_are_read_in_the_order_of_names(
  choice, tmp_path, cache
):
  for i, text in enumerate(TEXTS):
    folder = tmp_path / "set" / str(i % 2)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"part-{i}.jsonl").write_bytes(as_json([text]))
  (tmp_path / "set" / ".cache").mkdir()
  (tmp_path / "set" / ".cache" / "x.jsonl").write_bytes(as_json(["hidden"]))
  (tmp_path / "set" / "LICENSE").write_text("terms")
  (tmp_path / "set" / "empty.jsonl").touch()
  folder = DataConfig(path=str(tmp_path / "set"), stream=choice)
  assert texts_of(folder, cache) == [TEXTS[i] for i in (0, 2, 4, 1, 3)]
  some = DataConfig(path=str(tmp_path / "set/*/part-[01].*"), stream=choice)
  assert texts_of(some, cache) == TEXTS[:2]


def test_a_text_file_is_split_into_documents(tmp_path, cache):
  path = tmp_path / "a.txt"
  path.write_text("one\ntwo\n\nthree")
  found = {
    by: texts_of(DataConfig(path=str(path), documents=by), cache)
    for by in ("paragraph", "line", "file")
  }
  assert found == {
    "paragraph": ["one\ntwo", "three"],
    "line": ["one", "two", "three"],
    "file": ["one\ntwo\n\nthree"],
  }


@pytest.mark.parametrize("choice", ["false", "true"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_byte_order_mark_is_no_text(name, choice, tmp_path, cache):
  text = b"\xef\xbb\xbfone\n\ntwo"
  packed = gzip.compress(text) if name.endswith("gz") else text
  (tmp_path / name).write_bytes(packed)
  (tmp_path / "b.txt").write_bytes(b"three")  # has none
  config = DataConfig(path=str(tmp_path), stream=choice)
  assert texts_of(config, cache) == ["one", "two", "three"]


@pytest.mark.parametrize("choice", ["false", "true"])
def test_text_field_names_the_column(choice, tmp_path, cache):
  path = tmp_path / "a.jsonl"
  path.write_bytes(as_json(TEXTS, "content"))
  config = DataConfig(path=str(path), text_field="content", stream=choice)
  assert texts_of(config, cache) == TEXTS


BAD_FILES = {
  "missing.txt": (None, "does not exist"),
  "miss*.txt": (None, "matches no file"),
  "empty.txt": (b"", "is empty"),
  "blank.txt": (b" \n\n \n", "no text|no document|do not fill"),
  "latin.txt": ("na\xefve".encode("latin-1"), "cannot be read.*utf-8"),
  "latin.csv": ("text\nna\xefve".encode("latin-1"), "cannot be read.*utf-8"),
  "speech.pdf": (b"words", "does not end in any of"),
  "broken.jsonl": (b'{"text": "a"}\n{"text', "cannot be read"),
  "broken.json.gz": (gzip.compress(as_json(TEXTS))[:40], "cannot be read"),
  "broken.parquet": (b"words", "cannot be read"),
  "other.jsonl": (b'{"body": "a"}\n', "no field 'text'.*body.*text_field"),
  "numbers.jsonl": (b'{"text": 3}\n', "not strings"),
}


@pytest.mark.parametrize("choice", ["false", "true"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_errors_name_the_file_and_the_fault(
  tmp_path, cache, name, choice, caplog
):
  content, message = BAD_FILES[name]
  path = tmp_path / name
  if content is not None:
    path.write_bytes(content)
  config = DataConfig(path=str(path), cache=str(cache), stream=choice)
  with pytest.raises(UserError, match=message) as raised:
    corpus.prepare(config, 300)
  assert name in str(raised.value)
  assert "\n" not in str(raised.value)
  # `datasets` does not also log the error.
  assert not [r for r in caplog.records if r.levelname == "ERROR"]


def test_a_file_that_is_too_small_is_refused(tmp_path, cache):
  texts = {
    "one paragraph only": "single document",
    "one\n\ntwo\n\nthree": "holdout_every",
    "\n\n".join(["words and words"] + [str(i) for i in range(30)]): (
      "fewer than one batch"
    ),
  }
  path = tmp_path / "small.txt"
  for text, message in texts.items():
    path.write_text(text)
    config = DataConfig(path=str(path), cache=str(cache), length=4)
    with pytest.raises(UserError, match=message):
      corpus.prepare(config, 300)


def test_ambiguous_folders_are_refused(tmp_path, cache):
  with pytest.raises(UserError, match="a folder without files that end in"):
    sources.load(DataConfig(path=str(tmp_path)), cache)
  (tmp_path / "a.jsonl").write_bytes(as_json(TEXTS))
  (tmp_path / "README.md").write_text("# A set")
  with pytest.raises(UserError, match=r"kinds.*\.(md|jsonl) and .*glob"):
    sources.load(DataConfig(path=str(tmp_path)), cache)


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_column_that_is_no_utf8_is_refused(stream, tmp_path):
  """As parquet files can have, whose text is not decoded when it is read."""
  path = tmp_path / "a.parquet"
  table = pa.table({"text": ["one text " * 9, "another text " * 9]})
  pa.parquet.write_table(
    table,
    path,
    compression="none",
    use_dictionary=False,
    write_statistics=False,
  )
  path.write_bytes(path.read_bytes().replace(b"another", b"\xffnother"))
  config = DataConfig(
    path=str(path), stream=stream, cache=str(tmp_path / "cache")
  )
  with pytest.raises(UserError, match=r"a\.parquet.* cannot be read.*utf-8"):
    corpus.prepare(config, 300)
