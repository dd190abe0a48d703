"""Tiny checkpoints, and files with the columns of data sets on the hub."""

import json
import pathlib
import random

from tests.train.conftest import TINY, WORDS
from tests.train.pretrained import encoder_files
from train.data import tokenizer
from train.finetuning import tasks
from train.models import encoder, llama
from train.pretrained import encoder_checkpoint, llama_checkpoint, llama_names

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>")


def write_bert(out: pathlib.Path) -> pathlib.Path:
  """A folder with a BERT of two layers."""
  return _write_encoder(out, encoder_files.write_bert)


def write_roberta(out: pathlib.Path) -> pathlib.Path:
  """A folder with a RoBERTa of two layers."""
  return _write_encoder(
    out,
    encoder_files.write_roberta,
    family="roberta",
    position_offset=2,
    n_types=1,
    pad_id=1,
  )


def _write_encoder(out: pathlib.Path, write, **fields) -> pathlib.Path:
  given = out.with_name("given")
  given.mkdir()
  size = write(given)
  config = encoder.Config(size, 16, 24, 2, 4, max_length=32, **fields)
  loaded = encoder_checkpoint.Loaded(
    config,
    encoder.init(config, 0),
    encoder_checkpoint.encoder_tokenizer.load(given, config),
    (),
  )
  encoder_checkpoint.save(loaded, out)
  return out


def write_llama(out: pathlib.Path) -> pathlib.Path:
  """A folder with a LLaMA of two layers whose tokenizer knows ChatML."""
  vocabulary = tokenizer.train([" ".join(WORDS) * 9], 290)
  vocabulary.add_special_tokens(list(SPECIAL_TOKENS))
  params = llama.init(TINY, 0)
  source = llama_names.from_params(
    "test",
    TINY,
    lambda: params,
    tokenizer=vocabulary.to_str(),
    extra={"tokenizer_config.json": {"eos_token": SPECIAL_TOKENS[1]}},
  )
  llama_checkpoint.save(source, out)
  return out


def text(source: random.Random, count: int = 6) -> str:
  return " ".join(source.choices(WORDS, k=count))


def write_lines(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def glue_rows(task: tasks.Task, count: int, seed: int = 0) -> list[dict]:
  """Rows of a GLUE task; the first word determines the label."""
  source = random.Random(seed)
  rows = []
  for number in range(count):
    label = number % max(2, len(task.labels))
    row = {task.first: f"{WORDS[label]} {text(source)}"}
    if task.second:
      row[task.second] = text(source, 4)
    value = label if task.labels else round(5 * source.random(), 1)
    rows.append(row | {"label": value, "idx": number})
  return rows


def write_glue(
  folder: pathlib.Path, name: str, train: int = 24
) -> pathlib.Path:
  """A folder with the splits of a GLUE task, the test's labels hidden."""
  task = tasks.TASKS[name]
  folder.mkdir(exist_ok=True)
  write_lines(folder / "train.jsonl", glue_rows(task, train))
  for number, split in enumerate(task.validation, 1):
    write_lines(folder / f"{split}.jsonl", glue_rows(task, 9, number))
  hidden = [row | {"label": -1} for row in glue_rows(task, 3)]
  write_lines(folder / "test.jsonl", hidden)
  return folder


def squad_rows(count: int, unanswerable: bool, seed: int = 0) -> list[dict]:
  """Questions whose answer starts at the word that they name."""
  source = random.Random(seed)
  rows = []
  for number in range(count):
    context = text(source, 40)
    words = context.split()
    start_word = source.randrange(len(words) - 3)
    start = len(" ".join([*words[:start_word], ""]))
    answer = " ".join(words[start_word : start_word + 2])
    answers = {"text": [answer], "answer_start": [start]}
    if unanswerable and number % 3 == 2:
      answers = {"text": [], "answer_start": []}
    rows.append(
      {
        "id": str(number),
        "title": "words",
        "context": context,
        "question": f"who {words[start_word]} ?",
        "answers": answers,
      }
    )
  return rows


def write_squad(folder: pathlib.Path, unanswerable: bool) -> pathlib.Path:
  folder.mkdir(exist_ok=True)
  write_lines(folder / "train.jsonl", squad_rows(12, unanswerable))
  write_lines(folder / "validation.jsonl", squad_rows(6, unanswerable, 1))
  return folder


def conversations(count: int, seed: int = 0) -> list[dict]:
  source = random.Random(seed)
  return [
    {
      "messages": [
        {"role": "user", "content": text(source, 2 + number % 5)},
        {"role": "assistant", "content": text(source, 3)},
      ]
    }
    for number in range(count)
  ]
