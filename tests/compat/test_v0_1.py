"""Runs that version 0.1.0 wrote go on, with the losses they had there.

`v0_1_runs.tar.xz` holds the folders of runs of eight steps (six when
fine-tuning) with their checkpoint of step 4, the text or the examples they
read, and in `losses.json` the losses of all their steps.
"""

import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest

from train import finetune, pretrain

ARCHIVE = pathlib.Path(__file__).with_name("v0_1_runs.tar.xz")
DONE = 4  # steps of the checkpoint
# One for each way in which states differ. The others are among the slow tests.
PRETRAINED = (
  "q_galore",
  "relora",
  *(
    pytest.param(name, marks=pytest.mark.slow)
    for name in (
      "galore",
      "ldadam",
      "fira",
      "gum",
      "galore_adafactor",
      "galore_8bit",
    )
  ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  out = tmp_path_factory.mktemp("v0_1")
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(out, filter="data")
  for path in out.glob("*/config.json"):
    text = path.read_text(encoding="utf-8")
    text = text.replace("@ROOT@", str(out)).replace("@CACHE@", str(out / "c"))
    path.write_text(text, encoding="utf-8")
  return out


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  found = jax.devices
  monkeypatch.setattr(jax, "devices", lambda *kinds: found(*kinds)[:1])
  monkeypatch.setattr(finetune.plot, "draw", lambda out, title: out / title)


def settings(run, groups):
  """The flags that say all that a run's config says in these groups."""
  flat = json.loads((run / "config.json").read_text(encoding="utf-8"))
  shown = lambda value: str(value).lower() if value in (True, False) else value
  return [
    word
    for name, value in flat.items()
    if name.partition(".")[0] in groups
    for word in ("--set", f"{name}={shown(value)}")
  ]


def check_losses(run, output):
  assert f"continuing from the checkpoint of step {DONE}" in output
  lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  found = [r["loss"] for r in map(json.loads, lines) if "loss" in r]
  wanted = json.loads((run / "losses.json").read_text(encoding="utf-8"))
  assert len(found) == len(wanted) > DONE
  np.testing.assert_allclose(found[DONE:], wanted[DONE:], rtol=2e-4)


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretraining_goes_on(name, folder, capsys):
  run = folder / name
  groups = ("model", "data", "optimizer", "train", "mesh", "run")
  flags = ["--optimizer", name, "--out", str(run), *settings(run, groups)]
  # Of methods whose defaults have changed since then.
  changed = name in ("galore", "galore_8bit", "q_galore")
  if changed:  # what the command does not say is as it was
    at = flags.index("optimizer.scale=0.25")
    del flags[at - 1 : at + 1]
  assert pretrain.main(flags) == 0
  output = capsys.readouterr().out
  check_losses(run, output)
  assert ("begun by version 0.1" in output) == changed


@pytest.mark.parametrize(
  "name", [pytest.param("galore", marks=pytest.mark.slow), "lora"]
)
def test_fine_tuning_goes_on(name, folder, capsys):
  run = folder / f"finetune_{name}"
  flags = ["--task", "mnli", "--from", str(folder / "bert")]
  flags += ["--optimizer", name, "--rank", "2", "--out", str(run)]
  chosen = {
    "data.path": folder / "mnli",
    "data.cache": folder / "c",
    "data.batch": 4,
    "data.length": 32,
    "optimizer.learning_rate": 0.05,
    "run.log_every": 1,
    "run.checkpoint_every": 4,
    "mesh.data": 1,
    "task.epochs": 1,
    "task.pool": "mean",
    "task.dropout": 0.05,
  }
  if name == "galore":
    chosen["optimizer.update_proj_gap"] = 3
  flags += [x for k, v in chosen.items() for x in ("--set", f"{k}={v}")]
  assert finetune.main(flags) == 0
  check_losses(run, capsys.readouterr().out)
