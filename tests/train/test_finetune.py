"""Fine-tuning from the command to its files, on tiny models and data."""

import dataclasses
import json
import shutil
import signal

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from tests.train.finetuning import files
from train import finetune, plot
from train.common.errors import UserError
from train.experiments import finetune_grid
from train.experiments import results as results_lib
from train.finetuning import evaluation, job, recipes, spans, tasks
from train.methods import leaves
from train.parallel import mesh as mesh_lib
from train.pretrained import (
  checkpoint_folder,
  encoder_checkpoint,
  llama_checkpoint,
)
from train.run import history, loop, metrics, signals

pytestmark = pytest.mark.usefixtures("one_device", "undrawn")

DEVICES = jax.devices()
SMALL = {
  "data.batch": 4,
  "data.length": 32,
  "optimizer.learning_rate": 0.01,
  "optimizer.update_proj_gap": 3,
  "run.log_every": 1,
  "mesh.data": 1,
}


MNLI = {
  "task__epochs": 4,
  "task__pool": "mean",
  "task__dropout": 0.05,
  "optimizer__learning_rate": 0.05,
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
  return files.write_bert(tmp_path_factory.mktemp("bert") / "out")


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
  return files.write_roberta(tmp_path_factory.mktemp("roberta") / "out")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
  return files.write_llama(tmp_path_factory.mktemp("llama") / "out")


def words(task, source, data, out, optimizer="galore", **changes):
  settings = SMALL | {"data.path": data, "data.cache": data.parent / "cache"}
  settings |= {k.replace("__", "."): v for k, v in changes.items()}
  found = ["--task", task, "--from", str(source), "--optimizer", optimizer]
  found += ["--rank", "2", "--out", str(out)]
  return found + [x for k, v in settings.items() for x in ("--set", f"{k}={v}")]


def run(*args, **changes):
  """Makes a run that must succeed; returns its result."""
  assert finetune.main(words(*args, **changes)) == 0
  return json.loads((args[3] / "result.json").read_text())


def losses(out):
  records = metrics.read(out / metrics.FILE)
  return [(r["step"], r["loss"]) for r in records if "loss" in r]


@pytest.fixture(scope="module")
def mnli(bert, tmp_path_factory):
  """GaLore on pairs with three labels: folders of the run and data, result."""
  folder = tmp_path_factory.mktemp("mnli")
  data = files.write_glue(folder / "data", "mnli")
  found = run("mnli", bert, data, folder / "run", **MNLI)
  return folder / "run", data, found


def test_both_validation_splits_are_scored_each_epoch(mnli):
  out, _, found = mnli
  assert found["steps"] == 24  # four epochs of 24 rows, four in a batch
  assert set(found["scores"]) == {
    "held_out_loss",
    "accuracy",
    "validation_mismatched_held_out_loss",
    "validation_mismatched_accuracy",
  }
  evaluated = [r for r in metrics.read(out / metrics.FILE) if "accuracy" in r]
  assert [r["step"] for r in evaluated] == [0, 6, 12, 18, 24]
  trained = [loss for _, loss in losses(out)]
  assert np.mean(trained[-6:]) < np.mean(trained[:6]) - 0.1


@pytest.mark.slow
def test_the_grid_picks_rates_and_runs_the_best(mnli, bert, tmp_path, capsys):
  _, data, _ = mnli
  results = tmp_path / "results.jsonl"
  changes = MNLI | {"task__epochs": 1}
  given = words("mnli", bert, data, tmp_path, **changes)
  settings = [x for x in given[given.index("--set") :] if x != "--set"]
  settings = [x for x in settings if "learning_rate" not in x]
  common = [str(results), "--task", "mnli", "--from", str(bert), "--methods"]
  common += ["galore:2", "--work", str(tmp_path / "work")]
  common += [word for x in settings for word in ("--set", x)]
  picks = ["pick", *common, "--rates", "0.05", "1e-9"]
  assert finetune_grid.main(picks) == 0
  picked = results_lib.read(results)
  assert [r["learning_rate"] for r in picked] == [0.05, 1e-9]
  assert len({r["examples"] for r in picked}) == 1
  assert (
    finetune_grid.main(picks) == 0 and results_lib.read(results) == picked
  )  # all done
  assert finetune_grid.main(["run", *common]) == 0
  (found,) = results_lib.read(results)[2:]
  best = max(picked, key=lambda r: r["scores"]["accuracy"])
  assert found["learning_rate"] == best["learning_rate"]
  assert found["examples"] != best["examples"]  # the validation split
  assert "validation_mismatched_accuracy" in found["scores"]
  assert "validation_mismatched_accuracy" not in best["scores"]
  capsys.readouterr()
  assert finetune_grid.main(["table", str(results)]) == 0
  score = f"{found['scores']['accuracy']:.4f}"
  rate = f"{found['learning_rate']:g}"
  held_out = f"{best['scores']['accuracy']:.4f}"
  loss = f"{found['scores']['held_out_loss']:.4f}"
  row = f"| galore:2 | {rate} | {held_out} | {score} | {loss} | 1 |"
  assert row in capsys.readouterr().out


def test_the_picture_has_a_panel_for_the_score(mnli, tmp_path, monkeypatch):
  panels = []
  monkeypatch.setattr(
    plot.plt.Axes, "set_ylabel", lambda self, text: panels.append(text)
  )
  path = plot.overlay([history.load(mnli[0])], tmp_path / "run.png", "steps")
  assert path.exists() and "held-out accuracy" in panels
  assert not any("perplexity" in panel for panel in panels)


def test_the_exported_model_has_the_scores_of_the_run(mnli):
  out, data, found = mnli
  given = words("mnli", out / "model", data, out, **MNLI)
  config = finetune.make_config(finetune.parse(given))
  model = finetune.load_model(finetune.load_examples(config), config)
  assert model.loaded.notes == ()
  extra = json.loads((out / "model" / checkpoint_folder.CONFIG).read_text())
  assert extra["id2label"]["1"] == "neutral"
  assert extra["galore_optax_pool"] == "mean"
  read = finetune.tokenize(model, finetune.load_examples(config), config)
  score = jax.jit(
    lambda batch: (
      model.outputs(model.params, batch),
      model.loss(model.params, batch, None),
      model.count_items(batch),
    )
  )
  again = evaluation.evaluate(model, read.evaluated, 9, score)
  assert again == pytest.approx(found["scores"], abs=1e-5)


def test_the_folder_of_a_run_is_not_a_checkpoint(mnli, tmp_path, capsys):
  out, data, _ = mnli
  error = refused(capsys, words("mnli", out, data, tmp_path / "run"))
  assert f"its weights are in {out / 'model'}" in error
  with pytest.raises(UserError, match=r"--x tokens: .* fine-tuning run"):
    plot.overlay([history.load(out)], tmp_path / "run.png", "tokens")


def stop_after_five_steps(given, monkeypatch):
  """Starts a run, and stops it by a signal after five steps."""
  calls = []
  with monkeypatch.context() as patch:
    patch.setattr(
      signals,
      "agreed_stop",
      lambda *_: lambda: calls.append(0) or len(calls) == 5,
    )
    assert finetune.main(given) == 130


def with_sigterm(module, name, given):
  """The exit status of a command that is asked to stop at this function."""
  plain = getattr(module, name)

  def stopped(*args):
    signal.raise_signal(signal.SIGTERM)
    return plain(*args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, name, stopped)
    return finetune.main(given)


@pytest.mark.slow
def test_a_stopped_run_continues_with_the_same_numbers(
  mnli, bert, tmp_path, monkeypatch, capsys
):
  out, data, _ = mnli
  given = words("mnli", bert, data, tmp_path / "run", **MNLI)
  stop_after_five_steps(given, monkeypatch)
  assert [n for n, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5]
  # Asked to stop while it prepares, it saves after a step.
  assert with_sigterm(finetune.job_lib, "prepare", given) == 130
  assert "stopped after step 6, which is saved" in capsys.readouterr().out
  # Asked to stop while it reports, it says what is saved.
  assert with_sigterm(finetune, "finish", given) == 130
  assert "interrupted; step 24 is saved, and the" in capsys.readouterr().err
  assert finetune.main(given) == 0
  assert losses(tmp_path / "run") == losses(out)
  first, second = (
    json.loads((folder / "result.json").read_text())
    for folder in (out, tmp_path / "run")
  )
  assert first == second
  before = losses(out)
  assert finetune.main(given) == 0  # complete: nothing is trained again
  assert losses(tmp_path / "run") == before


def test_scores_are_kept_where_the_log_is_gone(mnli, tmp_path):
  """A missing record is no divergence."""
  out = tmp_path / "run"
  shutil.copytree(mnli[0], out)
  steps = json.loads((out / "config.json").read_text())["train.steps"]
  assert evaluation.final_scores(out, steps)
  (out / metrics.FILE).unlink()
  with pytest.raises(
    UserError, match=f"no record of step {steps}.*result.json"
  ):
    evaluation.final_scores(out, steps)


@pytest.mark.slow
def test_regression_with_lora_trains_only_adapters_and_head(bert, tmp_path):
  data = files.write_glue(tmp_path / "data", "stsb", train=12)
  found = run("stsb", bert, data, tmp_path / "run", "lora", task__epochs=1)
  assert set(found["scores"]) == {"held_out_loss", "pearson", "spearman"}
  sizes = found["bytes"]
  # Rank 2; each of two layers has four matrices of 16 x 16, two of 16 x 24.
  assert sizes["adapters"] == 4 * 2 * 2 * (4 * 32 + 2 * 40)
  head = 4 * (16 * 16 + 16 + 16 + 1)
  assert sizes["gradients"] == sizes["adapters"] + head
  assert sizes["optimizer_blocks"] == 2 * sizes["adapters"]
  start, trained = (
    encoder_checkpoint.load(f, head="classify", labels=1).params
    for f in (bert, tmp_path / "run" / "model")
  )
  same = lambda name: np.array_equal(
    start["embed"][name]["embedding"], trained["embed"][name]["embedding"]
  )
  assert same("words") and same("positions")
  kernel = lambda tree: tree["layers"]["attn"]["q"]["kernel"]
  assert not np.array_equal(kernel(start), kernel(trained))


@pytest.mark.slow
def test_a_roberta_classifies_pairs_with_lora(roberta, tmp_path):
  data = files.write_glue(tmp_path / "data", "mrpc", train=32)
  found = run("mrpc", roberta, data, tmp_path / "run", "lora", task__epochs=4)
  assert set(found["scores"]) == {"held_out_loss", "f1", "accuracy"}
  trained = [loss for _, loss in losses(tmp_path / "run")]
  assert np.mean(trained[-8:]) < np.mean(trained[:8])
  start, end = (
    encoder_checkpoint.load(f, "classify", 2).params
    for f in (roberta, tmp_path / "run" / "model")
  )
  # RoBERTa's head has two layers; both are trained in full.
  for part in ("pooler", "head"):
    assert (start[part]["kernel"] != end[part]["kernel"]).any()
  words_ = lambda tree: tree["embed"]["words"]["embedding"]
  np.testing.assert_array_equal(words_(start), words_(end))


def test_the_spans_of_a_roberta_are_characters(roberta, tmp_path):
  """Its tokens are bytes, and include the space before a word."""
  data = files.write_squad(tmp_path / "data", unanswerable=False)
  given = words("squad", roberta, data, tmp_path, task__query=8, task__stride=8)
  config = finetune.make_config(finetune.parse(given))
  found = finetune.load_examples(config)
  model = finetune.load_model(found, config)
  prepared = model.tokenize(found.evaluated[0])
  logits = {
    i: tuple(
      10.0 * np.eye(32)[prepared.targets[name][i]] for name in ("start", "end")
    )
    for i in range(len(prepared.rows))
  }
  decided = model.predict(prepared, logits)
  assert spans.score(decided, found.evaluated[0].labels)["f1"] == 1
  batch = model.collate(prepared, range(4), 4)
  start, end = jax.jit(model.outputs)(model.params, batch)
  assert start.shape == end.shape == batch["ids"].shape


@pytest.mark.parametrize(
  "name", [pytest.param("squad", marks=pytest.mark.slow), "squad_v2"]
)
def test_spans_of_long_contexts_are_found_in_windows(bert, tmp_path, name):
  data = files.write_squad(tmp_path / "data", name == "squad_v2")
  found = run(
    name,
    bert,
    data,
    tmp_path / "run",
    "adamw",
    task__epochs=0,
    train__steps=3,
    data__eval_rows=4,
    task__query=8,
    task__stride=8,
    task__freeze="^embed/",
  )
  expected = {"held_out_loss", "f1", "exact_match"}
  if name == "squad_v2":
    expected |= {"has_answer_f1", "has_answer_exact_match"}
    expected |= {"no_answer_accuracy"}
  assert set(found["scores"]) == expected
  # Frozen weights have neither a gradient nor moments.
  assert found["bytes"]["gradients"] < found["bytes"]["weights"]
  assert found["bytes"]["optimizer"] < 2.1 * found["bytes"]["gradients"]


@pytest.mark.slow
def test_a_llama_learns_conversations_packed_and_with_4_bit_weights(
  llama, tmp_path
):
  data = files.write_lines(tmp_path / "chat.jsonl", files.conversations(40))
  found = run(
    "chat",
    llama,
    data,
    tmp_path / "run",
    "qlora",
    data__length=64,
    data__holdout_every=5,
    task__epochs=1,
  )
  start = metrics.read(tmp_path / "run" / metrics.FILE)[0][
    "held_out_perplexity"
  ]
  assert found["scores"]["held_out_perplexity"] < start
  written = llama_checkpoint.load(tmp_path / "run" / "model")
  assert written.model.n_layers == 2
  # It has the chat template, and ends where it was trained to end.
  end = tokenizers.Tokenizer.from_str(written.tokenizer).token_to_id(
    files.SPECIAL_TOKENS[1]
  )
  assert written.end_ids == (end,)
  described = written.extra["tokenizer_config.json"]
  assert described["eos_token"] == files.SPECIAL_TOKENS[1]
  assert files.SPECIAL_TOKENS[0] in described["chat_template"]


def test_a_llama_classifies_by_likelihood(llama, tmp_path):
  rows = files.glue_rows(tasks.TASKS["sst2"], 48)
  data = files.write_lines(tmp_path / "some.jsonl", rows)
  found = run(
    "classify",
    llama,
    data,
    tmp_path / "run",
    "adamw",
    data__length=64,
    data__holdout_every=4,
    task__first="sentence",
    task__labels="peace,people",
    task__prompt="{first} ",
    task__epochs=3,
  )
  start = metrics.read(tmp_path / "run" / metrics.FILE)[0]
  assert found["scores"]["held_out_loss"] < start["held_out_loss"]
  # 12 examples are held out.
  assert found["scores"]["accuracy"] in [i / 12 for i in range(13)]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
  rows = files.conversations(60)
  folder = tmp_path_factory.mktemp("chats")
  return files.write_lines(folder / "chat.jsonl", rows)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lean_fine_tuning_is_the_usual_one(accumulate, bert, mnli, tmp_path):
  """Without clipping, which would see other norms; with the same dropout."""
  _, data, _ = mnli
  changes = MNLI | {"task__epochs": 1, "optimizer__clip": 0}
  usual = run("mnli", bert, data, tmp_path / "usual", **changes)
  changes |= {"train__lean": "true", "train__accumulate": accumulate}
  lean = run("mnli", bert, data, tmp_path / "lean", **changes)
  rtol = 1e-4 if accumulate == 1 else 0.1  # another basis, another dropout
  np.testing.assert_allclose(
    *([x for _, x in losses(tmp_path / name)] for name in ("lean", "usual")),
    rtol=rtol,
  )
  assert lean["scores"].keys() == usual["scores"].keys()


def test_a_run_that_ends_without_a_finite_loss_has_no_scores(
  llama, chats, tmp_path, capsys
):
  """Not even the scores of an earlier evaluation; the grid skips its rate."""
  changes = {"train__steps": 4, "data__holdout_every": 5}
  out = tmp_path / "run"
  given = words("chat", llama, chats, out, "adamw", **changes)
  worse = [*given, "--set", "optimizer.learning_rate=1e18"]
  for _ in range(2):
    assert finetune.main(worse) == 1
    assert "not finite after step 4" in capsys.readouterr().err
    assert json.loads((out / "result.json").read_text())["scores"] == {}
  results, rates = tmp_path / "results.jsonl", ["1e18", "1e-3"]
  settings = [x for x in given[given.index("--set") :] if x != "--set"]
  settings = [x for x in settings if "learning_rate" not in x]
  common = [str(results), "--task", "chat", "--from", str(llama)]
  common += ["--methods", "adamw", "--work", str(tmp_path / "work")]
  common += [word for x in settings for word in ("--set", x)]
  assert finetune_grid.main(["pick", *common, "--rates", *rates]) == 0
  assert [bool(r["scores"]) for r in results_lib.read(results)] == [
    False,
    True,
  ]
  assert finetune_grid.main(["run", *common]) == 0
  assert results_lib.read(results)[-1]["learning_rate"] == 1e-3
  assert finetune_grid.main(["run", *common, "--rates", "1e18"]) == 0
  capsys.readouterr()
  assert finetune_grid.main(["table", str(results)]) == 0
  row = "| adamw | 1e+18 | diverged | diverged | diverged | 0 of 1 |"
  assert row in capsys.readouterr().out


def test_tokens_without_an_embedding_are_refused(
  llama, chats, tmp_path, capsys
):
  """As after adding tokens to tokenizer.json but not to the model."""
  vocabulary = tokenizers.Tokenizer.from_file(str(llama / "tokenizer.json"))
  vocabulary.add_tokens([f"<more{i}>" for i in range(99)])
  other = tmp_path / "other"
  other.mkdir()
  for file in llama.iterdir():
    (other / file.name).write_bytes(file.read_bytes())
  vocabulary.save(str(other / "tokenizer.json"))
  finetune.main(
    [
      *words("chat", other, chats, tmp_path / "run", data__holdout_every=5),
      "--dry-run",
    ]
  )  # tokens that no text contains do no harm
  assert not capsys.readouterr().err
  rows = [
    {"messages": [
      {"role": "user", "content": "<more98>"},
      {"role": "assistant", "content": "yes <more98>"},
    ]}
  ] * 20  # fmt: skip
  marked = vocabulary.to_str().replace("<|im_end|>", "<|end|>")
  marked = marked.replace("<more98>", "<|im_end|>")
  (other / "tokenizer.json").write_text(marked)
  data = files.write_lines(tmp_path / "marked.jsonl", rows)
  error = refused(capsys, words("chat", other, data, tmp_path / "run"))
  assert "'<|im_end|>'" in error and f"{300:,} rows" in error


@pytest.mark.slow
def test_8_bit_weights_are_exported_in_the_dtype_of_the_rest(
  mnli, bert, tmp_path
):
  _, data, _ = mnli
  changes = {"train__steps": 1, "model__dtype": "bfloat16"}
  run("mnli", bert, data, tmp_path / "run", "q_galore", **changes)
  file = tmp_path / "run" / "model" / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  assert {str(x.dtype) for x in tensors.values()} == {"float32"}


def test_a_run_does_not_overwrite_its_own_checkpoint(mnli, capsys):
  out, data, _ = mnli
  given = words("mnli", out / "model", data, out, **MNLI)
  error = refused(capsys, [*given, "--overwrite"])
  assert "is in --out" in error and "another --out" in error
  assert (out / "model" / "config.json").exists()


def test_other_commands_name_the_folder_of_the_model(mnli):
  out, _, _ = mnli
  with pytest.raises(UserError, match=r"fine-tuning run; .*model"):
    llama_checkpoint.load(out)


def refused(capsys, given):
  """The error of a command that must not start to train."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "train", lambda *_: pytest.fail("it trains"))
    assert finetune.main(given) == 2
  return capsys.readouterr().err


@pytest.mark.parametrize(
  ("task", "changes", "error"),
  [
    ("colla", {}, "--task 'colla' is unknown; the tasks are cola, stsb"),
    ("cola", {"task__first": "text"}, "no column 'text'; its columns are"),
    ("cola", {"task__label": "mark"}, "no column 'mark'"),
    ("cola", {"data__validation": "test"}, "not published"),
    ("cola", {"data__validation": "dev"}, "no split 'dev'"),
    ("cola", {"data__batch": 99}, "24 rows, fewer than data.batch=99"),
    (
      "cola",
      {"task__freeze": "^nothing"},
      "matches none of the model's weights",
    ),
    (
      "cola",
      {"train__layerwise": "true"},
      "To use less memory in a step, set train.accumulate",
    ),
    ("cola", {"task__pool": "last"}, "must be one of , first, mean"),
    (
      "cola",
      {"model__d_model": 32},
      "The checkpoint of --from decides the model's sizes",
    ),
    ("chat", {"task__first": "sentence"}, "row 0 holds"),
    (
      "chat",
      {"task__first": "sentence", "task__second": "sentence"},
      "an encoder",
    ),
    ("span", {}, "no column 'question'"),
  ],
)
def test_wrong_input_is_reported_before_training(
  bert, tmp_path, capsys, task, changes, error
):
  data = files.write_glue(tmp_path / "data", "cola")
  given = words(task, bert, data, tmp_path / "run", **changes)
  assert error in refused(capsys, given)
  assert not (tmp_path / "run").exists()


def test_an_unknown_label_is_named_with_its_row(bert, tmp_path, capsys):
  data = files.write_glue(tmp_path / "data", "cola")
  rows = files.glue_rows(tasks.TASKS["cola"], 24)
  rows[17]["label"] = 2
  files.write_lines(data / "train.jsonl", rows)
  error = refused(capsys, words("cola", bert, data, tmp_path / "run"))
  assert "row 17" in error and "the label 2 is none of unacceptable" in error


def test_a_checkpoint_of_another_architecture_is_refused(
  bert, llama, tmp_path, capsys
):
  data = files.write_glue(tmp_path / "data", "stsb")
  other = tmp_path / "gpt2"
  other.mkdir()
  for file in bert.iterdir():
    (other / file.name).write_bytes(file.read_bytes())
  config = json.loads((other / checkpoint_folder.CONFIG).read_text())
  config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
  (other / checkpoint_folder.CONFIG).write_text(json.dumps(config))
  out = tmp_path / "run"
  error = refused(capsys, words("stsb", other, data, out))
  assert "'gpt2'; known ones are bert, roberta, llama, mistral, " in error
  missing = tmp_path / "missing"
  error = refused(capsys, words("stsb", missing, data, out))
  assert str(missing) in error and "encoder" not in error
  error = refused(capsys, words("stsb", llama, data, out))
  assert "is a LLaMA" in error and "use an encoder" in error
  error = refused(capsys, words("stsb", bert, data, out, "muon"))
  assert "not for fine-tuning" in error


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "galore_8bit", "q_galore"])
def test_every_kind_of_state_continues_after_a_stop(
  bert, tmp_path, method, monkeypatch
):
  data = files.write_glue(tmp_path / "data", "cola")
  outs = [tmp_path / name for name in ("whole", "stopped")]
  given = [
    words("cola", bert, data, out, method, task__epochs=2) for out in outs
  ]
  assert finetune.main(given[0]) == 0
  stop_after_five_steps(given[1], monkeypatch)
  assert finetune.main(given[1]) == 0
  assert losses(outs[0]) == losses(outs[1])
  first, second = (
    json.loads((out / "result.json").read_text()) for out in outs
  )
  assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("method", recipes.METHODS)
def test_every_method_gets_the_same_batches_and_counts_its_bytes(
  bert, tmp_path, method, monkeypatch
):
  data = files.write_glue(tmp_path / "data", "cola")
  batches = []
  make_job = job.job_lib.Job

  def spying(**parts):
    put = lambda b: batches.append(b["ids"]) or parts["put"](b)
    evaluate = dataclasses.replace(parts["evaluate"], put=put)
    return make_job(**parts | {"put": put, "evaluate": evaluate})

  monkeypatch.setattr(job.job_lib, "Job", spying)
  found = run("cola", bert, data, tmp_path / "run", method, task__epochs=1)
  assert found["optimizer"] == method
  # Evaluations at both ends; between them the training batches.
  config = finetune.make_config(
    finetune.parse(words("cola", bert, data, tmp_path, method))
  )
  model = finetune.load_model(finetune.load_examples(config), config)
  made = finetune.tokenize(model, finetune.load_examples(config), config)
  steps = made.batches.per_epoch
  wanted = [
    model.collate(made.train, rows, 4)["ids"]
    for rows in made.batches.rows_of_epoch(0, 0)
  ]
  begin = (len(batches) - steps) // 2
  for ours, other in zip(batches[begin : begin + steps], wanted, strict=True):
    np.testing.assert_array_equal(ours, other)
  sizes = found["bytes"]
  if method in ("q_galore", "qlora"):
    assert sizes["weights"] < 84_000


@pytest.mark.parametrize("change", [{}, {"task__freeze": "^embed/"}])
def test_weights_and_moments_are_sharded(bert, tmp_path, change):
  """Checks shardings only; nothing is compiled."""
  data = files.write_glue(tmp_path / "data", "cola")
  given = words(
    "cola", bert, data, tmp_path, "adamw", mesh__data=2, mesh__fsdp=2, **change
  )
  config = finetune.make_config(finetune.parse(given))
  model = finetune.load_model(finetune.load_examples(config), config)
  mesh = mesh_lib.make_mesh(config.mesh, 4, DEVICES[:4])
  _, abstract = job.setup(model, config, mesh)
  found = {
    leaves.path_of(path): sharding.spec
    for path, sharding in jax.tree_util.tree_leaves_with_path(
      (abstract.shardings.params, abstract.shardings.opt_state)
    )
  }
  kernels = [x for name, x in found.items() if "attn/q/kernel" in name]
  assert len(kernels) == 3  # of the weight and its two moments
  assert all("fsdp" in str(spec) for spec in kernels)
  frozen = [n for n in found if n.endswith("embed/words/embedding")]
  assert len(frozen) == (1 if change else 3)
