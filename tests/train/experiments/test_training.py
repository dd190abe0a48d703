"""One run: resuming, damaged folders, divergence."""

import json
import math
import types

import pytest

from tests.train.experiments import fakes
from train.common.errors import UserError
from train.experiments import (
  plan,
  texts,
  training,
)
from train.run import metrics, run_dir


@pytest.mark.parametrize("last, test", [(5, 4.0), (10, math.nan)])
def test_a_run_without_a_finite_loss_at_its_end_diverged(
  last, test, tmp_path, monkeypatch
):
  job = types.SimpleNamespace(out=tmp_path)
  config = types.SimpleNamespace(train=types.SimpleNamespace(steps=10))
  log = metrics.Log(tmp_path, 0)
  log.write(last, held_out_loss=4.0)
  log.close()
  state = types.SimpleNamespace(opt_state=(), params={}, skipped=0)
  outcome = types.SimpleNamespace(stopped=False, state=state)
  monkeypatch.setattr(training.loop, "train", lambda *_: outcome)
  monkeypatch.setattr(training, "_test_loss", lambda *_: test)
  found = training._finish(config, job, state, None, lambda: False)
  assert found["status"] == "diverged" and "validation_loss" not in found


def test_a_damaged_folder_is_started_over(tmp_path):
  run = plan.Plan(fakes.TINIEST, 640, "x", {}).missing()[0]
  out = tmp_path / run.key
  out.mkdir()
  (out / run_dir.CONFIG).write_text("{ torn", encoding="utf-8")
  parts = texts.Parts(*(tmp_path / f"{n}.txt" for n in "abc"))
  with pytest.raises(UserError, match=r"data\.path"):  # the text is missing
    training.train(run, parts, tmp_path, lambda: False)
  assert json.loads((out / run_dir.CONFIG).read_text())["train.seed"] == 0


def test_a_run_whose_checkpoints_are_damaged_starts_over(tmp_path, monkeypatch):
  run = plan.Plan(fakes.TINIEST, 640, "x", {}).missing()[0]
  config = training.config_of(run, texts.Parts(*"abc"))
  existed = []

  def prepare(_, out, *__):
    existed.append((out / run_dir.FOLDER).exists())
    if existed[-1]:
      raise UserError("no checkpoint can be read")
    return "job", "state"

  monkeypatch.setattr(training.setup_lib, "make", lambda *_: None)
  monkeypatch.setattr(training.job_lib, "prepare", prepare)
  (tmp_path / run_dir.FOLDER / "5").mkdir(parents=True)
  assert training._prepare(config, tmp_path, None, None) == ("job", "state")
  assert existed == [True, False]
  monkeypatch.setattr(training.job_lib, "prepare", lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):  # other errors are not hidden
    training._prepare(config, tmp_path, None, None)
