import dataclasses
import errno
import json
import pathlib

import pytest

from train.common import atomic_files
from train.common.errors import UserError
from train.config import presets, schema
from train.finetuning import recipes
from train.run import run_dir

BASE = presets.make("sotu_small", "galore")


def test_a_folder_of_another_run_is_refused(tmp_path):
  out = tmp_path / "run"
  run_dir.check_folder(out, BASE, overwrite=False)
  assert not out.exists()
  run_dir.write_config(out, BASE, overwrite=False)
  run_dir.check_folder(out, BASE, overwrite=False)
  other = schema.override(BASE, ["optimizer.rank=8", "train.seed=5"])
  with pytest.raises(UserError) as raised:
    run_dir.check_folder(out, other, overwrite=False)
  for word in (str(out), "optimizer.rank: 48 there, 8 now", "train.seed: 0",
               "--overwrite", "--out"):  # fmt: skip
    assert word in str(raised.value)
  run_dir.check_folder(out, other, overwrite=True)


def test_what_changes_no_number_may_change(tmp_path):
  run_dir.write_config(tmp_path, BASE, overwrite=False)
  free = schema.override(BASE, ["run.keep=7", "mesh.fsdp=2"])
  run_dir.check_folder(tmp_path, free, overwrite=False)


def test_overwriting_deletes_the_run_and_nothing_else(tmp_path):
  run_dir.write_config(tmp_path, BASE, overwrite=False)
  (tmp_path / "metrics.jsonl").write_text("{}\n")
  (tmp_path / run_dir.FOLDER / "9").mkdir(parents=True)
  (tmp_path / "notes.md").write_text("mine")
  other = dataclasses.replace(BASE, train=schema.TrainConfig(steps=5))
  run_dir.write_config(tmp_path, other, overwrite=True)
  assert {p.name for p in tmp_path.iterdir()} == {"config.json", "notes.md"}
  saved = json.loads((tmp_path / "config.json").read_text())
  assert saved["train.steps"] == 5


def test_a_second_process_is_refused(tmp_path):
  out = tmp_path / "run"
  with run_dir.held(out):
    run_dir.check_folder(
      out, BASE, overwrite=False
    )  # the lock is no file of it
    with (
      pytest.raises(UserError, match=f"another process .*--out {out}"),
      run_dir.held(out),
    ):
      pass
  with run_dir.held(out):
    pass


def test_a_link_to_checkpoints_elsewhere_is_deleted_and_they_are_not(tmp_path):
  elsewhere = tmp_path / "disk"
  (elsewhere / "9").mkdir(parents=True)
  out = tmp_path / "run"
  run_dir.write_config(out, BASE, overwrite=False)
  (out / run_dir.FOLDER).symlink_to(elsewhere)
  run_dir.write_config(out, BASE, overwrite=True)
  assert not (out / run_dir.FOLDER).exists() and (elsewhere / "9").exists()


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
  (tmp_path / "thesis.tex").write_text("words")
  for overwrite in (False, True):
    with pytest.raises(UserError, match="not empty"):
      run_dir.check_folder(tmp_path, BASE, overwrite)
  with pytest.raises(UserError, match="is a file"):
    run_dir.check_folder(tmp_path / "thesis.tex", BASE, False)


def test_a_broken_config_is_named(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(UserError, match=r"config.json cannot be read"):
    run_dir.check_folder(tmp_path, BASE, overwrite=False)


def test_a_field_that_a_run_does_not_know_had_its_default(tmp_path):
  run_dir.write_config(tmp_path, BASE, overwrite=False)
  path = tmp_path / "config.json"
  saved = json.loads(path.read_text())
  del saved["train.z_loss"]
  path.write_text(json.dumps(saved))
  run_dir.check_folder(tmp_path, BASE, overwrite=False)
  changed = schema.override(BASE, ["train.z_loss=0.1"])
  with pytest.raises(UserError, match=r"train.z_loss: 0.0 there, 0.1 now"):
    run_dir.check_folder(tmp_path, changed, overwrite=False)


def test_an_empty_value_is_shown_as_such(tmp_path):
  run_dir.write_config(tmp_path, BASE, overwrite=False)
  other = schema.override(BASE, ["data.path=my.txt"])
  with pytest.raises(UserError, match=r'data.path: "" there, my.txt now'):
    run_dir.check_folder(tmp_path, other, overwrite=False)


def test_files_have_the_permissions_of_any_other(tmp_path):
  (tmp_path / "plain").write_text("")
  atomic_files.write_text(tmp_path / "new" / "a", "one")
  atomic_files.write_text(tmp_path / "new" / "a", "two")
  assert (tmp_path / "new" / "a").read_text() == "two"
  modes = {p.stat().st_mode for p in (tmp_path / "plain", tmp_path / "new/a")}
  assert len(modes) == 1


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
  atomic_files.write_text(tmp_path / "a", "old")

  def full(self, target):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(pathlib.Path, "replace", full)
  with pytest.raises(OSError, match="No space"):
    atomic_files.write_text(tmp_path / "a", "new")
  assert [p.name for p in tmp_path.iterdir()] == ["a"]
  assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("existed", [False, True])
def test_a_folder_that_cannot_be_filled_is_as_before(tmp_path, existed):
  out = tmp_path / "out"
  if existed:
    out.mkdir()
  full = pytest.raises(UserError, match=r"--out .*No space")
  with full, atomic_files.new_folder(out, "--out"):
    (out / "half").write_text("x")
    raise OSError(errno.ENOSPC, "No space left on device")
  assert out.exists() == existed and not list(tmp_path.rglob("half"))


@pytest.mark.parametrize("saved", ["", None, "auto", "bfloat16"])
def test_a_run_keeps_the_dtype_of_its_moments(tmp_path, saved, capsys):
  """Older versions wrote "", or no such field, and had float32 moments."""
  now = presets.make("llama_60m", "galore")
  name = run_dir.STATE_DTYPE
  flat = {k: v for k, v in schema.flatten(now).items() if k != name}
  flat |= {} if saved is None else {name: saved}
  (tmp_path / run_dir.CONFIG).write_text(json.dumps(flat))
  config = run_dir.goes_on_as_begun(tmp_path, now, [])
  was_float32 = not saved
  assert config.optimizer.state_dtype == ("" if was_float32 else "auto")
  wanted = "float32" if was_float32 else None
  assert config.optimizer.moments_dtype == wanted
  assert ("float32 moments" in capsys.readouterr().out) == was_float32
  if saved != "bfloat16":
    run_dir.check_folder(tmp_path, config, overwrite=False)
  # What the command says stays.
  asked = schema.override(now, [f"{name}=bfloat16"])
  found = run_dir.goes_on_as_begun(tmp_path, asked, [f"{name}=bfloat16"])
  assert found == asked


@pytest.mark.parametrize(
  ("field", "value", "refused"),
  [
    ("model.d_model", 16, False),  # the checkpoint's
    ("data.documents", "paragraph", False),
    ("optimizer.accumulate", 1, False),
    ("optimizer.accumulate", 2, True),
    ("data.length", 7, True),
    ("train.unknown", 1, True),
  ],
)
def test_a_fine_tuning_run_of_version_0_1_goes_on(
  tmp_path, field, value, refused
):
  """It wrote all fields of pre-training, too, which had to be the defaults."""
  config = recipes.make("cola", "galore")
  run_dir.write_config(tmp_path, config, overwrite=False)
  saved = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(saved | {field: value}))
  if refused:
    with pytest.raises(UserError, match=f"{field}: {value} there"):
      run_dir.check_folder(tmp_path, config, overwrite=False)
  else:
    run_dir.check_folder(tmp_path, config, overwrite=False)
