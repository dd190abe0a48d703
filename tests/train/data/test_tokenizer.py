import json
import tracemalloc

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tests.train.conftest import speech
from train.common.errors import UserError
from train.config.schema import DataConfig
from train.data import tokenizer


@pytest.fixture(scope="module")
def trained():
  return tokenizer.train([speech(20)], 300)


@hypothesis.given(st.text())
@hypothesis.settings(
  max_examples=100,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.example(tokenizer.END)
@hypothesis.example("naïve \u0000\r\n\t 🙂 e\u0301 \u202e")
def test_any_text_decodes_to_itself(trained, text):
  encoder = tokenizer.Encoder(trained, trained.token_to_id(tokenizer.END))
  (ids,) = encoder.encode([text])
  assert ids[-1] == encoder.end and encoder.end not in ids[:-1]
  assert trained.decode(ids[:-1].tolist(), skip_special_tokens=False) == text
  ((same, widths),) = encoder.measure([text])
  np.testing.assert_array_equal(same, ids)
  assert len(widths) == len(ids) and widths.sum() == len(text.encode())


def test_the_tokenizer_is_trained_once(tmp_path):
  first, path, found = tokenizer.cached(["union and peace"] * 9, 280, tmp_path)
  again, same, found_again = tokenizer.cached(
    ["union and peace"] * 9, 280, tmp_path
  )
  _, other, _ = tokenizer.cached(["union and war"] * 9, 280, tmp_path)
  assert (found, found_again) == (False, True)
  assert path == same != other
  assert first.to_str() == again.to_str()
  assert again.encode_special_tokens


@pytest.mark.parametrize("content", ["", "{}", '{"model"', "\0\0"])
def test_a_damaged_tokenizer_in_the_cache_is_made_again(
  content, tmp_path, capsys
):
  texts = ["union and peace"] * 9
  first, path, _ = tokenizer.cached(texts, 280, tmp_path)
  path.write_text(content)
  again, same, found = tokenizer.cached(texts, 280, tmp_path)
  assert (same, found) == (path, False) and again.to_str() == first.to_str()
  assert f"{path} cannot be read" in capsys.readouterr().out
  assert tokenizer.cached(texts, 280, tmp_path)[2]


def t5_like(size=40, sentinels=10):
  """A unigram tokenizer with T5's special tokens, sentinels last."""
  pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
  pieces += [(c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz<>_0123456789"]
  pieces = [*pieces[:size], ("▁the", -1.0)]
  names = [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
  found = tokenizers.Tokenizer(
    models.Unigram([*pieces, *((n, 0.0) for n in names)], 2, False)
  )
  found.normalizer = normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
  found.pre_tokenizer = pre_tokenizers.Metaspace()
  found.decoder = decoders.Metaspace()
  found.add_special_tokens(["<pad>", "</s>", "<unk>", *names])
  found.enable_padding(length=64)
  found.enable_truncation(4)
  return found, len(pieces)


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_text(t5_like()[0].to_str())
  return path


def find(path, vocab_size, folder, **fields):
  config = DataConfig(tokenizer=str(path), **fields)
  return tokenizer.find(config, vocab_size, [], folder)


def test_a_tokenizer_from_a_file_ends_documents_with_its_own_token(
  file, tmp_path
):
  encoder = find(file, 64, tmp_path)
  (ids,) = encoder.encode(["the  cab </s>"])
  tokens = [encoder.tokenizer.id_to_token(int(i)) for i in ids]
  assert tokens[:5] == ["▁the", "▁", "c", "a", "b"]
  assert tokens[-1] == "</s>" and tokens.count("</s>") == 1
  # Neither padded to 64 nor truncated to 4, as the file says.
  assert 5 < len(ids) < 20
  assert find(tmp_path, 64, tmp_path).end == encoder.end


def test_sentinels_beyond_the_vocabulary_are_dropped(file, tmp_path):
  _, pieces = t5_like()
  encoder = find(file, pieces + 3, tmp_path)
  assert encoder.tokenizer.get_vocab_size() == pieces + 3
  (ids,) = encoder.encode(["<extra_id_0> <extra_id_9>"])
  assert ids.max() < pieces + 3
  assert find(file, pieces + 10, tmp_path).tokenizer.get_vocab_size() > pieces
  with pytest.raises(UserError, match=r"model.vocab_size is 40; set model.voc"):
    find(file, 40, tmp_path)


def test_bytes_of_a_normalizing_tokenizer_add_up(file, tmp_path):
  encoder = find(file, 64, tmp_path)
  texts = ["the  cab", "añb🙂", " the ", "é", ""]
  for text, (ids, widths) in zip(texts, encoder.measure(texts), strict=True):
    assert len(ids) == len(widths)
    assert widths.sum() == len(text.encode()) and (widths >= 0).all()


def test_the_end_token_is_configured_read_or_known(file, tmp_path):
  encoder = find(file, 64, tmp_path, end_token="<pad>")
  assert encoder.end == 0
  settings = tmp_path / "tokenizer_config.json"
  for own in ("<unk>", {"content": "<unk>"}):
    settings.write_text(json.dumps({"eos_token": own}))
    assert find(file, 64, tmp_path).end == 2
  with pytest.raises(UserError, match=r"no token '<eot>'.*data.end_token"):
    find(file, 64, tmp_path, end_token="<eot>")


def test_an_exported_tokenizer_adds_no_special_tokens(file, tmp_path):
  """T5's own tokenizer adds an end token."""
  given = tokenizers.Tokenizer.from_file(str(file))
  given.post_processor = tokenizers.processors.TemplateProcessing(
    "$A <pad>", special_tokens=[("<pad>", 0)]
  )
  given.save(str(file))
  encoder = find(file, 64, tmp_path, end_token="<pad>")
  kept = tokenizers.Tokenizer.from_str(encoder.tokenizer.to_str())
  assert kept.encode("the cab").ids == [*encoder.encode(["the cab"])[0][:-1]]


def test_files_that_are_not_tokenizers_are_refused(tmp_path):
  path = tmp_path / "tokenizer.json"
  with pytest.raises(UserError, match="does not exist"):
    find(path, 64, tmp_path)
  path.write_text("{}")
  with pytest.raises(UserError, match=r"not a tokenizer\.json that"):
    find(path, 64, tmp_path)


SPM = {
  "unigram": {},
  "bpe": {},
  "bpe as LLaMA's": {
    "model_type": "bpe", "byte_fallback": True, "split_digits": True,
    "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
  },
  "unigram of bytes": {"model_type": "unigram", "byte_fallback": True},
}  # fmt: skip


@pytest.mark.parametrize("name", SPM)
def test_a_sentencepiece_file_gives_the_ids_of_sentencepiece(name, tmp_path):
  sentencepiece = pytest.importorskip("sentencepiece")
  text = tmp_path / "text"
  text.write_text(f"{speech(40)}\n" + "    return x\n" * 20)
  options = {"model_type": name} | SPM[name]
  sentencepiece.SentencePieceTrainer.train(
    input=str(text), model_prefix=str(tmp_path / "x"), vocab_size=330,
    hard_vocab_limit=False, minloglevel=2, **options,
  )  # fmt: skip
  path = tmp_path / "x.model"
  theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
  ours = find(path, theirs.vocab_size(), tmp_path)
  texts = [speech(3, 7), "  two  spaces\n\tand a 🙂 naïve zebra", "    x", "",
           "1234 peace", "ﬁne"]  # fmt: skip
  for text, ids in zip(texts, ours.encode(texts), strict=True):
    assert ids.tolist() == [*theirs.encode(text), theirs.eos_id()], text
  if "byte_fallback" in options:
    for text in texts:
      ids = theirs.encode(text)
      assert ours.tokenizer.decode(ids) == theirs.decode(ids)


def test_files_that_are_not_sentencepiece_models_are_refused(tmp_path):
  sentencepiece = pytest.importorskip("sentencepiece")
  path = tmp_path / "x.model"
  path.write_bytes(b"words")
  with pytest.raises(UserError, match="is not a SentencePiece model"):
    find(path, 330, tmp_path)
  text = tmp_path / "text"
  text.write_text(speech(9))
  sentencepiece.SentencePieceTrainer.train(
    input=str(text), model_prefix=str(tmp_path / "x"), model_type="char",
    vocab_size=30, hard_vocab_limit=False, minloglevel=2,
  )  # fmt: skip
  with pytest.raises(UserError, match="unigram and bpe models are supported"):
    find(path, 330, tmp_path)


def sentencepiece_model(path, kind, pieces, charsmap=b""):
  """Writes a SentencePiece model of these pieces: text and type."""
  pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
  proto = pb2.ModelProto()
  proto.trainer_spec.model_type = kind
  proto.normalizer_spec.precompiled_charsmap = charsmap
  for i, (piece, type_) in enumerate(pieces):
    proto.pieces.add(piece=piece, score=-float(i), type=type_)
  path.write_bytes(proto.SerializeToString())


SPECIAL = [("<unk>", 2), ("</s>", 3)]


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize(
  ("pieces", "charsmap", "says"),
  [
    ([*SPECIAL, ("a", 1), ("a" * 100_000, 1)], b"", "piece 3 has 100,000 char"),
    ([*SPECIAL, ("", 1)], b"", "piece 2 has 0 characters"),
    ([("</s>", 3), ("a", 1)], b"", "no piece for unknown text"),
    ([*SPECIAL, ("a", 1)], b"\xff\xff\xff\x7f", "charsmap is damaged"),
    ([*SPECIAL, ("a", 1)], b"\x03\0\0\0abc", "charsmap is damaged"),
  ],
)
def test_pieces_that_no_tokenizer_has(kind, pieces, charsmap, says, tmp_path):
  path = tmp_path / "a.model"
  sentencepiece_model(path, kind, pieces, charsmap)
  with pytest.raises(UserError, match=says):
    find(path, 400, tmp_path)


def peak(call):
  """Bytes of Python's objects that a call takes at most."""
  tracemalloc.start()
  try:
    call()
  finally:
    _, found = tracemalloc.get_traced_memory()
    tracemalloc.stop()
  return found


def test_a_long_piece_takes_memory_once(tmp_path):
  path = tmp_path / "a.model"
  sentencepiece_model(path, 2, [*SPECIAL, ("b", 1), ("b" * 4096, 1)])
  # All halves of the piece take 16 MB.
  assert peak(lambda: find(path, 10, tmp_path)) < 2_000_000


def test_pieces_that_are_made_of_each_other_are_limited(tmp_path, monkeypatch):
  path = tmp_path / "a.model"
  pieces = [("a" * n, 1) for n in range(1, 300)]
  sentencepiece_model(path, 2, [*SPECIAL, *pieces])
  find(path, 400, tmp_path)
  monkeypatch.setattr(tokenizer.sentencepiece_model, "MERGED", 1_000_000)
  with pytest.raises(UserError, match=r"a\.model: its pieces merge in more"):
    find(path, 400, tmp_path)


def test_a_map_of_characters_in_a_tokenizer_json_is_checked(file, tmp_path):
  content = json.loads(file.read_text())
  content["normalizer"] = {
    "type": "Sequence",
    "normalizers": [
      {"type": "Precompiled", "precompiled_charsmap": "////fwAAAAA="}
    ],
  }
  file.write_text(json.dumps(content))
  with pytest.raises(UserError, match="charsmap is damaged"):
    find(file, 40, tmp_path)
