"""The examples of a task: files, columns, labels, held-out parts."""

import dataclasses
import shutil

import pytest

from tests.train.finetuning import files
from train.common.errors import UserError
from train.config.schema import SharedDataConfig
from train.finetuning import examples as examples_lib
from train.finetuning import labels as labels_lib
from train.finetuning import (
  tables,
)
from train.finetuning.tasks import GLUE, TASKS


@pytest.mark.parametrize("task", GLUE, ids=lambda task: task.name)
def test_glue_is_read_from_files_with_the_columns_of_the_hub(task, tmp_path):
  folder = files.write_glue(tmp_path / "data", task.name)
  config = SharedDataConfig(path=str(folder))
  found = examples_lib.load(task, config, tmp_path / "cache")
  assert [s.name for s in found.evaluated] == list(task.validation)
  assert len(found.train) == 24 and len(found.evaluated[0]) == 9
  rows = files.glue_rows(task, 24)
  assert found.train.labels == [row["label"] for row in rows]
  assert found.train.first == [row[task.first] for row in rows]
  assert (found.train.second is None) == (not task.second)


COLUMNS = [
  ("csv", "review,mood\ngood one,happy\nbad one,sad\n" * 6),
  ("tsv", "review\tmood\ngood one\thappy\nbad one\tsad\n" * 6),
]


@pytest.mark.parametrize(("kind", "text"), COLUMNS)
def test_local_tables_with_named_columns_and_classes(tmp_path, kind, text):
  # Only the first line is a header.
  head, *lines = text.splitlines()
  lines = [line for line in lines if line != head]
  path = tmp_path / f"own.{kind}"
  path.write_text("\n".join([head, *lines]) + "\n")
  task = TASKS["classify"].with_columns("review", "", "mood", ())
  config = SharedDataConfig(path=str(path), holdout_every=4)
  found = examples_lib.load(task, config, tmp_path / "cache")
  assert found.task.labels == ("happy", "sad")
  assert len(found.train) == 9 and len(found.evaluated[0]) == 3
  # task.labels sets the order of the classes.
  task = task.with_columns("", "", "", ("sad", "happy"))
  found = examples_lib.load(task, config, tmp_path / "cache")
  assert found.train.labels[:2] == [1, 0]


def test_a_hub_set_numbers_its_classes_itself(tmp_path, monkeypatch):
  import datasets

  labels = datasets.ClassLabel(names=["pos", "neg"])
  table = datasets.Dataset.from_dict(
    {"text": ["a", "b"], "label": [0, 1]},
    datasets.Features({"text": datasets.Value("string"), "label": labels}),
  )
  monkeypatch.setattr(
    tables.datasets, "load_dataset", lambda *_, **__: {"train": table}
  )
  config = SharedDataConfig(path="hub:own/set", holdout_every=2)
  with pytest.raises(
    UserError, match="numbers the classes as pos, neg, but the task"
  ):
    examples_lib.load(TASKS["rotten_tomatoes"], config, tmp_path)
  found = examples_lib.load(TASKS["classify"], config, tmp_path)
  assert found.task.labels == ("pos", "neg")


FORM = r"an answer is \{\"text\": \[...\]"


@pytest.mark.parametrize(
  ("value", "error"),
  [
    ({"text": ["no"], "answer_start": [0]}, "but the context has"),
    ({"text": ["in"], "answer_start": [-8]}, "at character -8"),
    ({"text": [""], "answer_start": [0]}, "but the context has"),
    ({"text": "in", "answer_start": 0}, FORM),
    ({"text": ["in"], "answer_start": [0, 3]}, FORM),
    ({"text": None, "answer_start": None}, FORM),
    ({"text": ["in"]}, FORM),
    ("people", FORM),
  ],
)
def test_answers_must_be_at_their_starts(value, error):
  with pytest.raises(UserError, match=error):
    labels_lib.parse_span(value, "in Paris", "row 2")
  right = {"text": ["Paris"], "answer_start": [3]}
  assert labels_lib.parse_span(right, "in Paris", "") == labels_lib.Span(
    ("Paris",), (3,)
  )


def test_a_wrong_answer_is_named_with_its_row(tmp_path):
  rows = files.squad_rows(4, unanswerable=False)
  rows[2]["answers"] = {"text": ["wrong"], "answer_start": [0]}
  path = files.write_lines(tmp_path / "squad.jsonl", rows)
  config = SharedDataConfig(path=str(path), holdout_every=2)
  with pytest.raises(
    UserError, match="row 2, column 'answers': the answer is 'wrong'"
  ):
    examples_lib.load(TASKS["squad"], config, tmp_path)


def read_labels(tmp_path, values, labels=(), kind="jsonl"):
  """The classes in a column, and the indices of its values."""
  path = tmp_path / f"own.{kind}"
  rows = [{"text": f"text {i}", "label": v} for i, v in enumerate(values)]
  if kind == "jsonl":
    files.write_lines(path, rows)
  else:
    between = "," if kind == "csv" else "\t"
    lines = [between.join(map(str, row.values())) for row in rows]
    path.write_text("\n".join([between.join(rows[0]), *lines]) + "\n")
  same = path.with_name(f"same.{kind}")
  shutil.copy(path, same)
  config = SharedDataConfig(path=str(path), validation=str(same))
  task = TASKS["classify"].with_columns("", "", "", labels)
  found = examples_lib.load(task, config, tmp_path / "cache")
  assert found.evaluated[0].labels == found.train.labels
  return found.task.labels, found.train.labels


@pytest.mark.parametrize(
  ("values", "labels", "found"),
  [
    ([5, 1, 2], (), [2, 0, 1]),  # three classes, not six
    ([1, -1, 1], (), [1, 0, 1]),
    ([2.0, 1.0, 2.0], (), [1, 0, 1]),
    ([True, False], (), [1, 0]),
    (["b", " A", "B"], (), [1, 0, 1]),
    ([1, 3, 2], ("1", "2", "3"), [0, 2, 1]),  # names, not indices
    ([0, 1], ("1", "0"), [1, 0]),
    ([True, False], ("0", "1"), [1, 0]),
    ([1, 0], ("no", "yes"), [1, 0]),  # indices: the names are not numbers
    (["YES", "no"], ("no", "yes"), [1, 0]),
  ],
)
def test_classes_are_names_or_indices(tmp_path, values, labels, found):
  names, counted = read_labels(tmp_path, values, labels)
  assert counted == found and len(names) == max(found) + 1


def test_the_text_none_and_quotes_are_not_special(tmp_path):
  stance = ["None", "favor", "NA", "None"]
  for kind in ("csv", "tsv"):
    names, _ = read_labels(tmp_path, stance, kind=kind)
    assert names == ("favor", "na", "none")
  path = tmp_path / "quoted.tsv"
  path.write_text('text\tlabel\n"a\tx\nb"\ty\nnull\tx\n')
  config = SharedDataConfig(path=str(path), validation="none", holdout_every=2)
  found = examples_lib.load(TASKS["classify"], config, tmp_path / "cache")
  read = [*found.train.first, *found.evaluated[0].first]
  assert sorted(read) == ['"a', 'b"', "null"]


@pytest.mark.parametrize(
  ("values", "error"),
  [
    (
      [1.0, float("nan")],
      "row 1, column 'label': the label nan is not a finite",
    ),
    ([True, False], "the label True is not a finite"),
    ([-1, -1.0], "holds only -1 .*not published"),
  ],
)
def test_labels_that_are_not_finite_or_secret_are_refused(
  tmp_path, values, error
):
  rows = [{"text": "a", "label": v} for v in values]
  table = tables.datasets.Dataset.from_list(rows)
  with pytest.raises(UserError, match=error):
    labels_lib.parse(values, None, table, TASKS["regress"], "a.csv")


def test_a_folder_may_contain_other_files_than_tables(tmp_path):
  folder = files.write_glue(tmp_path / "data", "cola")
  (folder / "README.md").write_text("# CoLA\n")
  (folder / "dataset_infos.json").write_text('{"a": {"b": 1}}')
  (folder / "train[1].txt").write_text("notes")
  config = SharedDataConfig(path=str(folder))
  found = examples_lib.load(TASKS["cola"], config, tmp_path / "cache")
  assert len(found.train) == 24
  odd = (folder / "train.jsonl").rename(folder / "set[1].jsonl")
  alone = SharedDataConfig(path=str(odd), holdout_every=4)
  assert (
    len(examples_lib.load(TASKS["cola"], alone, tmp_path / "c").train) == 18
  )
  twice = f"{folder}/validation.jsonl,{folder}/test.jsonl,{folder}/test.jsonl"
  with pytest.raises(UserError, match="two files 'test'"):
    examples_lib.load(
      TASKS["cola"], SharedDataConfig(path=str(odd), validation=twice), tmp_path
    )


def test_an_empty_file_is_reported(tmp_path):
  folder = files.write_glue(tmp_path / "data", "rte")
  load = lambda path: examples_lib.load(
    TASKS["rte"], SharedDataConfig(path=str(path)), tmp_path / "cache"
  )
  (folder / "train-1.jsonl").touch()  # an empty shard
  assert len(load(folder).train) == 24
  (tmp_path / "none.jsonl").touch()
  with pytest.raises(UserError, match="is empty; it needs examples"):
    load(tmp_path / "none.jsonl")


def test_answers_of_a_chat_must_be_texts(tmp_path):
  rows = [{"question": "2+2?", "answer": 4}] * 2
  path = files.write_lines(tmp_path / "chat.jsonl", rows)
  task = TASKS["chat"].with_columns("question", "answer", "", ())
  with pytest.raises(UserError, match="column 'answer' holds 4, not a text"):
    examples_lib.load(
      task, SharedDataConfig(path=str(path)), tmp_path / "cache"
    )


def test_the_training_split_is_not_evaluated(tmp_path):
  folder = files.write_glue(tmp_path / "data", "rte")
  load = lambda **changes: examples_lib.load(
    TASKS["rte"],
    SharedDataConfig(**changes),
    tmp_path / "cache",
  )
  with pytest.raises(UserError, match="names 'train', the training split"):
    load(path=str(folder), validation="train")
  found = load(path=str(folder), split="validation", holdout_every=3)
  assert [split.name for split in found.evaluated] == ["held_out"]
  file = next(folder.glob("train*"))
  with pytest.raises(UserError, match="is also trained on"):
    load(path=str(file), validation=str(file))


def test_changed_examples_have_another_digest(tmp_path):
  folder = files.write_glue(tmp_path / "data", "rte")
  config = SharedDataConfig(path=str(folder))
  found = examples_lib.load(TASKS["rte"], config, tmp_path / "cache")
  part = found.train.take(range(len(found.train)))
  assert examples_lib.digest(dataclasses.replace(found, train=part)) == (
    examples_lib.digest(found)
  )
  part.first[3] += " more"
  other = examples_lib.digest(dataclasses.replace(found, train=part))
  assert other != examples_lib.digest(found)


@pytest.mark.parametrize(("name", "labels", "error"), [
  ("mrpc", ("a", "b", "c"), "F1 of its second class, and there are 3 classes"),
  ("classify", ("sad", "Sad"), "at least two that differ"),
  ("classify", ("sad",), "at least two that differ"),
])  # fmt: skip
def test_equal_names_of_classes_are_refused(name, labels, error):
  task = dataclasses.replace(TASKS[name], labels=labels)
  with pytest.raises(UserError, match=error):
    examples_lib._check_classes(task, "data.path x")


def test_held_out_examples_come_from_all_classes(tmp_path):
  """Every second row is of one class, so every fourth is, too."""
  path = tmp_path / "own.jsonl"
  rows = [{"text": f"{i}", "label": i % 2} for i in range(80)]
  files.write_lines(path, rows)
  config = SharedDataConfig(path=str(path), holdout_every=4)
  found, again = (
    examples_lib.load(TASKS["classify"], config, tmp_path / "cache")
    for _ in range(2)
  )
  (held_out,) = found.evaluated
  assert len(held_out) == 20 and 5 < sum(held_out.labels) < 15
  assert held_out.first == again.evaluated[0].first
  assert not set(held_out.first) & set(found.train.first)
  assert found.train.training and not held_out.training


def test_questions_on_the_same_context_are_held_out_together(tmp_path):
  rows = files.squad_rows(4, unanswerable=False)
  rows = [row for row in rows for _ in range(3)]
  path = files.write_lines(tmp_path / "squad.jsonl", rows)
  config = SharedDataConfig(path=str(path), holdout_every=2)
  found = examples_lib.load(TASKS["squad"], config, tmp_path)
  (held_out,) = found.evaluated
  assert not set(found.train.second or ()) & set(held_out.second or ())
  assert len(held_out) == 6


def test_every_row_has_a_label():
  task = TASKS["classify"].with_columns("text", "", "label", ("none", "some"))
  with pytest.raises(UserError, match="it, row 2, column 'label' is empty"):
    labels_lib.check_none_missing(["none", "some", None, "some"], task, "it")
