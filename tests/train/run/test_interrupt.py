"""Runs that come to harm, next to one that does not.

All share one tiny config, and are compared bit for bit.
"""

import json
import shutil
import signal
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.run.small_run import (
  assert_same_run,
  drive,
  final,
  losses,
  steps_of,
)
from train import pretrain
from train.data import corpus
from train.models import llama
from train.run import loop, metrics
from train.run.run_dir import FOLDER
from train.step import state as state_lib

pytestmark = pytest.mark.usefixtures("one_device", "undrawn")


@pytest.mark.parametrize(
  "number",
  [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM],
)
def test_a_signal_saves_and_the_same_command_goes_on(
  number, flags, whole, tmp_path, monkeypatch, capsys
):
  out, record = tmp_path / "run", loop.Reporter.record

  def interrupt(self, index, values):
    if index == 5:
      signal.raise_signal(number)
    return record(self, index, values)

  monkeypatch.setattr(loop.Reporter, "record", interrupt)
  assert pretrain.main(["--out", str(out), *flags]) == 130
  assert "stopped after step 7, which is saved" in capsys.readouterr().out
  assert steps_of(out) == [6, 7]
  monkeypatch.setattr(loop.Reporter, "record", record)
  assert pretrain.main(["--out", str(out), *flags]) == 0
  assert "continuing from the checkpoint of step 7" in capsys.readouterr().out
  assert_same_run(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
  "options",
  [
    ["--lean"],
    ["--lean", "--layerwise", "--optimizer", "q_galore"],
    # At rank 8 the matrices are large enough for the host's memory.
    [
      "--layerwise",
      "--set=mesh.offload=optimizer",
      "--set=optimizer.rank=8",
    ],
  ],
  ids=["lean", "lean_layerwise", "offloaded"],
)
def test_every_kind_of_step_goes_on_to_the_bit(
  options, flags, tmp_path, monkeypatch
):
  flags = [*flags, *options]
  whole, out = tmp_path / "whole", tmp_path / "run"
  assert pretrain.main(["--out", str(whole), *flags]) == 0
  record = loop.Reporter.record

  def interrupt(self, index, values):
    if index == 5:
      signal.raise_signal(signal.SIGTERM)
    return record(self, index, values)

  with monkeypatch.context() as patch:
    patch.setattr(loop.Reporter, "record", interrupt)
    assert pretrain.main(["--out", str(out), *flags]) == 130
  assert pretrain.main(["--out", str(out), *flags]) == 0
  assert losses(out) == losses(whole)
  assert sums(out) == sums(whole)


def sums(out):
  """The checksum of every array of the last state."""
  saved = out / FOLDER / "12" / "progress" / "data.json"
  return json.loads(saved.read_text())["check_sums"]


def test_a_second_signal_says_what_is_saved(
  flags, tmp_path, monkeypatch, capsys
):
  """It ends the program at once, also while the first is waited for."""
  out, record = tmp_path / "run", loop.Reporter.record

  def interrupt(self, index, values):
    if index == 6:
      signal.raise_signal(signal.SIGINT)
      signal.raise_signal(signal.SIGINT)
    return record(self, index, values)

  monkeypatch.setattr(loop.Reporter, "record", interrupt)
  assert pretrain.main(["--out", str(out), *flags]) == 130
  newest = steps_of(out)[-1]
  message = f"interrupted; step {newest} is saved, and the same command"
  assert message in capsys.readouterr().err


def test_a_signal_after_the_last_step_ends_the_program(
  flags, whole, tmp_path, monkeypatch, capsys, ctrl_c
):
  out = tmp_path / "run"
  shutil.copytree(whole, out)
  monkeypatch.setattr(
    pretrain, "report", lambda *_: signal.raise_signal(signal.SIGINT)
  )
  assert pretrain.main(["--out", str(out), *flags]) == 130
  assert "interrupted; step 12 is saved" in capsys.readouterr().err


@pytest.mark.parametrize(
  "how", ["deleted", pytest.param("replaced", marks=pytest.mark.slow)]
)
def test_a_run_whose_folder_is_lost_is_saved_beside_it(
  how, flags, whole, tmp_path, monkeypatch, capsys
):
  out, record = tmp_path / "run", loop.Reporter.record

  def lose(self, index, values):
    if index == 6:
      out.rename(tmp_path / "moved")  # as a deletion, but free of races
      if how == "replaced":
        out.mkdir()
    return record(self, index, values)

  monkeypatch.setattr(loop.Reporter, "record", lose)
  assert pretrain.main(["--out", str(out), *flags]) == 1
  beside = tmp_path / "run-kept-1"
  error = capsys.readouterr().err
  assert "was deleted or replaced" in error and f"--out {beside}" in error
  assert steps_of(beside) == [6]
  monkeypatch.setattr(loop.Reporter, "record", record)
  assert pretrain.main(["--out", str(beside), *flags]) == 0
  (state, _), (expected, _) = final(beside), final(whole)
  jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_a_finished_run_says_that_it_is_complete(
  flags, whole, tmp_path, capsys
):
  out = tmp_path / "run"
  shutil.copytree(whole, out)
  before = (out / metrics.FILE).read_text()
  assert pretrain.main(["--out", str(out), *flags]) == 0
  assert "complete: all 12 steps" in capsys.readouterr().out
  assert (out / metrics.FILE).read_text() == before
  assert_same_run(out, whole)


def test_the_time_so_far_goes_on_after_an_interruption(whole, flags, tmp_path):
  out = tmp_path / "run"
  shutil.copytree(whole, out)
  shutil.rmtree(out / FOLDER / "12")
  (progress,) = (out / FOLDER / "8" / "progress").glob("*.json")
  saved = json.loads(progress.read_text())
  progress.write_text(json.dumps(saved | {"seconds": 1000.0}))
  assert pretrain.main(["--out", str(out), *flags]) == 0
  records = metrics.read(out / metrics.FILE)
  times = {r["step"]: r["seconds"] for r in records if "seconds" in r}
  assert times[8] < 900 < 1000 < times[9] <= times[12] < 1100
  assert_same_run(out, whole)


HARMS = {
  "while its folder is made": ("os.mkdir", "8.orbax-checkpoint-tmp"),
  "before it is given its name": ("os.rename", "checkpoints/8"),
}


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMS)
def test_a_kill_during_a_save_loses_nothing_before_it(
  harm, flags, whole, tmp_path, capsys
):
  out = tmp_path / "run"
  done = drive(*HARMS[harm], out, flags)
  assert done.returncode == -signal.SIGKILL, done.stderr
  left = {p.name for p in (out / FOLDER).iterdir()}
  assert "8" not in left and {"4", "6"} <= left
  assert pretrain.main(["--out", str(out), *flags]) == 0
  assert "continuing from the checkpoint of step 6" in capsys.readouterr().out
  assert_same_run(out, whole)
  assert all(p.name.isdigit() for p in (out / FOLDER).iterdir())


@pytest.mark.slow
def test_a_kill_between_saves_loses_the_steps_since_the_last(
  flags, whole, tmp_path, capsys
):
  out = tmp_path / "run"
  done = drive("killed-after", 11, out, flags)
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert losses(out)[-1][0] in (10, 11)
  assert pretrain.main(["--out", str(out), *flags]) == 0
  assert "continuing from the checkpoint of step 8" in capsys.readouterr().out
  assert_same_run(out, whole)


def test_a_damaged_newest_checkpoint_gives_way(flags, whole, tmp_path, capsys):
  out = tmp_path / "run"
  shutil.copytree(whole, out)
  files = [p for p in (out / FOLDER / "12" / "state").rglob("*") if p.is_file()]
  largest = max(files, key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:100])
  assert pretrain.main(["--out", str(out), *flags]) == 0
  output = capsys.readouterr().out
  (line,) = [x for x in output.splitlines() if "is damaged" in x]
  assert "checkpoints/12 is damaged" in line and "step 8 is used" in line
  assert_same_run(out, whole)


def is_poison(rows):
  return (rows == rows[:, :1]).all(axis=1).any()


def poison(monkeypatch, numbers):
  """Gives some batches a row of one id, of which the model makes a nan."""
  plain, make_loader = llama.apply_with_balance, corpus.Corpus.loader

  def overflow(graphdef, params, ids, **more):
    logits, balance = plain(graphdef, params, ids, **more)
    return logits / jnp.where(is_poison(ids), 0.0, 1.0), balance

  def poisoned_loader(self, seed, *part, state=None):
    loader = make_loader(self, seed, *part, state=state)
    batches, done = loader._batches, (state or {"batches": 0})["batches"]

    def poisoned():
      for number, (rows, position) in enumerate(batches, done + 1):
        assert not is_poison(rows)
        if number in numbers:
          rows = np.array(rows)
          rows[3] = 7
        yield rows, position

    loader._batches = poisoned()
    return loader

  monkeypatch.setattr(llama, "apply_with_balance", overflow)
  monkeypatch.setattr(corpus.Corpus, "loader", poisoned_loader)


def test_bad_steps_are_skipped_and_too_many_in_a_row_end_the_run(
  flags, tmp_path, monkeypatch, capsys
):
  out = tmp_path / "run"
  poison(monkeypatch, (3, 5, 6, 7, 8))
  order = ["--out", str(out), *flags, "--set", "train.max_skips=3"]
  assert pretrain.main(order) == 1
  output = capsys.readouterr()
  assert "step     3  skipped: loss" in output.out
  assert "(1 in a row, 1 in all)" in output.out
  assert "(3 in a row, 4 in all)" in output.out
  (error,) = output.err.splitlines()
  assert "no finite gradient in 3 steps in a row (train.max_skips)" in error
  assert "saved as step 8" in error and "optimizer.learning_rate" in error
  # The batches went on meanwhile, so the same command gets past them.
  assert pretrain.main(order) == 0
  assert "continuing from the checkpoint of step 8" in capsys.readouterr().out
  assert [n for n, _ in losses(out)] == [1, 2, 4, 9, 10, 11, 12]
  records = {r["step"]: r for r in metrics.read(out / metrics.FILE)}
  assert records[9]["skipped"] == 5
  state, _ = final(out)
  assert (int(state.skipped), int(state.skips_in_row)) == (5, 0)
  assert state_lib.all_finite(state.params) and state_lib.all_finite(
    state.opt_state
  )


def small_disk(folder):
  """A command that runs another on a disk of 4 MB, or why there is none."""
  mount = f'mount -t tmpfs -o size=4m tmpfs "{folder}" && exec "$@"'
  before = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
  try:
    tried = subprocess.run([*before, "true"], capture_output=True, text=True)
  except FileNotFoundError as error:
    return None, str(error)
  return (None, tried.stderr) if tried.returncode else (before, "")


@pytest.mark.slow
def test_a_full_disk_ends_no_run_and_loses_no_checkpoint(
  flags, whole, tmp_path
):
  before, reason = small_disk(tmp_path)
  if before is None:
    pytest.skip(f"no small disk can be mounted here: {reason}")
  out = tmp_path / "run"
  saved = tmp_path.with_name("saved")  # the disk goes with its process
  copy = 'trap "cp -r $0 $1" EXIT; shift; "$@"'
  done = drive("full-disk", tmp_path, out, flags, *before,
               "bash", "-c", copy, str(out), str(saved))  # fmt: skip
  assert done.returncode == 0, done.stderr
  output = done.stdout
  for n in (6, 8):
    assert (
      f"the checkpoint of step {n} could not be written (No space" in output
    )
  assert "the newest complete one is of step 4" in output
  assert "step 12/12" in output  # it went on to the end
  assert "status 1\ncheckpoints 4\n" in output
  assert "status 1 with a full disk\n" in output
  assert "step 12 is done, but its state could not be saved" in done.stderr
  assert "make room and run the same command" in done.stderr
  assert output.count("continuing from the checkpoint of step 4") >= 1
  assert_same_run(saved, whole)
