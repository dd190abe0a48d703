"""The grid of fine-tuning runs: which are missing, and their tables."""

import json
import math
import pathlib
import re

import pytest

from train.common.errors import UserError
from train.experiments import finetune_grid, results

DOCS = pathlib.Path(__file__).parents[3] / "docs"


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


def test_the_best_rate_is_used_and_finished_runs_are_skipped(tmp_path):
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
  # With another setting it is another run, whose rate was not picked yet.
  longer = ("--set", "task.epochs=1")
  assert plan(*longer, "--rates", "3e-3") == [*first, *second]
  # The same holds for another checkpoint.
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


def test_rates_that_were_picked_on_other_examples_are_ignored(tmp_path):
  path = tmp_path / "results.jsonl"
  picked = [(1e-3, 0.9, "old"), (2e-3, 0.5, "new"), (3e-3, 0.4, "new")]
  rows = [
    record("lora:4", rate, score, stage="pick") | {"examples": examples}
    for rate, score, examples in picked
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  given = ["run", str(path), "--from", "x", "--task", "cola"]
  assert planned([*given, "--methods", "lora:4"]) == [("lora:4", 2e-3, 0)]


def test_the_best_rate_of_a_chat_has_the_lowest_perplexity(tmp_path):
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


def test_the_fingerprint_of_a_checkpoint_depends_on_its_weights(tmp_path):
  folders = [tmp_path / name for name in "abc"]
  for folder, weights in zip(folders, (b"one", b"two", b"one"), strict=True):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
  first, second, same = map(finetune_grid.fingerprint, map(str, folders))
  assert first == same != second
  assert finetune_grid.fingerprint("hub:a/b") == "hub:a/b"
  with pytest.raises(UserError, match="there are no weights"):
    finetune_grid.fingerprint(str(tmp_path))


def test_the_docs_tables_match_the_recorded_runs():
  text = (DOCS / "results" / "fine-tuning.md").read_text(encoding="utf-8")
  named = set(re.findall(r"docs/results/fine-tuning/([\w-]+\.jsonl)", text))
  assert "rotten_tomatoes-minilm.jsonl" in named
  for name in named:
    assert (
      finetune_grid.table(results.read(DOCS / "results" / "fine-tuning" / name))
      in text
    ), name


def test_tables_separate_tasks_and_rates():
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
