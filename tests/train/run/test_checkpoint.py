import json
import os
import shutil

import jax
import numpy as np
import pytest

from tests.marks import moves_arrays
from tests.train.conftest import make_trainer
from train.common.errors import UserError
from train.config import schema
from train.parallel import mesh as mesh_lib
from train.run import checkpoint, metrics
from train.run.checksums import check_sums
from train.run.run_dir import FOLDER

PROGRESS = checkpoint.Progress(1.5, {"step": 4, "text": "ü"})


def save(out, *saves, keep=2, keep_best=0):
  """Saves states with their held-out losses, one after another."""
  store = checkpoint.Checkpoints(out, keep, keep_best)
  for state, loss in saves:
    store.save(state, PROGRESS, loss)
  store.close()
  return store


def at(state, step):
  return state._replace(step=state.step * 0 + step)


def kept(out):
  return sorted(p.name for p in (out / FOLDER).iterdir())


@pytest.fixture(scope="module")
def state(trainer, rows):
  """After four steps, in which bases and moments have become their own."""
  state = trainer.init()
  with jax.set_mesh(trainer.mesh):
    for _ in range(4):
      state, _ = trainer.train_step(state, trainer.put(rows))
  return state


def test_a_state_comes_back_bit_for_bit_and_trains_on(
  trainer, state, rows, tmp_path
):
  state = jax.tree.map(lambda x: x.copy(), state)
  with jax.set_mesh(trainer.mesh):
    store = checkpoint.Checkpoints(tmp_path, keep=2)
    store.save(state, PROGRESS)
    # The step consumes the state while it is being written.
    state, values = trainer.train_step(state, trainer.put(rows))
    store.close()
    assert store.latest == 4 and not store.failure
    restored, progress = checkpoint.restore(tmp_path, trainer.abstract)
    assert progress == PROGRESS
    assert int(restored.step) == 4
    repeated, same = trainer.train_step(restored, trainer.put(rows))
  assert float(values["loss"]) == float(same["loss"])
  jax.tree.map(np.testing.assert_array_equal, state, repeated)


def test_a_state_moves_to_another_mesh(state, tmp_path):
  if jax.device_count() < 8:
    pytest.skip(f"needs 8 devices, found {jax.device_count()}")
  save(tmp_path, (state, None))
  other = make_trainer("galore", 8, fsdp=2, tensor=2)
  restored, _ = checkpoint.restore(tmp_path, other.abstract)
  jax.tree.map(np.testing.assert_array_equal, state, restored)
  kernel = restored.params["layers"]["mlp"]["up"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 16, 24)


def test_the_newest_and_the_best_are_kept(state, tmp_path):
  losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: None, 5: 3.5, 6: None}
  store = save(
    tmp_path, *[(at(state, n), x) for n, x in losses.items()], keep_best=1
  )
  assert kept(tmp_path) == ["2", "5", "6"]
  assert store.best() == 3.0
  again = checkpoint.Checkpoints(tmp_path, 2, 1)
  assert again.best() == 3.0 and again.latest == 6
  again.save(at(state, 7), PROGRESS, 2.0)
  again.save(at(state, 8), PROGRESS)
  again.save(at(state, 9), PROGRESS)
  again.close()
  assert kept(tmp_path) == ["7", "8", "9"]


def test_a_folder_without_checkpoints_restores_nothing(trainer, tmp_path):
  assert checkpoint.restore(tmp_path, trainer.abstract) is None


def biggest(folder):
  return max(folder.rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)


def truncate(folder):
  path = biggest(folder / "state")
  path.write_bytes(path.read_bytes()[:50])


def garble(folder):
  """Changes a few bytes in the middle of the arrays."""
  path = biggest(folder / "state")
  data = bytearray(path.read_bytes())
  data[len(data) // 2 : len(data) // 2 + 8] = b"\xff" * 8
  path.write_bytes(data)


def lose(folder):
  biggest(folder / "state").unlink()


def lose_progress(folder):
  (folder / "progress" / "progress").unlink(missing_ok=True)
  for path in (folder / "progress").iterdir():
    path.unlink()


def garble_metrics(folder):
  for path in (folder / "metrics").iterdir():
    path.write_bytes(b"\x00\xff{")


def empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


DAMAGES = [truncate, garble, lose, lose_progress, empty]


# Orbax leaves coroutines behind where a read fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
  damage, trainer, state, tmp_path
):
  save(tmp_path, (at(state, 4), 3.0), (at(state, 8), 2.0))
  damage(tmp_path / FOLDER / "8")
  printed = []
  restored, _ = checkpoint.restore(tmp_path, trainer.abstract, printed.append)
  assert int(restored.step) == 4
  jax.tree.map(np.testing.assert_array_equal, state.params, restored.params)
  (text,) = printed
  assert "checkpoints/8 is damaged" in text and "step 4 is used" in text
  assert "\n" not in text
  assert kept(tmp_path) == ["4", "8.damaged"]
  save(tmp_path, (at(state, 8), 2.0))
  assert kept(tmp_path) == ["4", "8", "8.damaged"]


def test_checkpoints_of_another_state_are_refused(trainer, state, tmp_path):
  save(tmp_path, (at(state, 4), None), (at(state, 8), None))
  other = make_trainer("sgd", devices=1)
  with pytest.raises(UserError) as raised:
    checkpoint.restore(tmp_path, other.abstract)
  for word in ("step 8: ", "step 4: ", str(tmp_path / FOLDER), "--overwrite"):
    assert word in str(raised.value)
  assert kept(tmp_path) == ["4", "8"]  # nothing was set aside


def test_the_log_forgets_what_will_happen_again(tmp_path):
  log = metrics.Log(tmp_path, resumed_at=0)
  for index in range(1, 6):
    log.write(index, loss=float(index), rate=float("nan"))
  log.close()
  with (tmp_path / metrics.FILE).open("a") as file:
    file.write('{"step": 6, "lo')  # killed while writing
  metrics.Log(tmp_path, resumed_at=3).close()
  assert metrics.read(tmp_path / metrics.FILE) == [
    {"step": i, "loss": float(i)} for i in (1, 2, 3)
  ]


def test_the_log_keeps_what_a_full_disk_does_not_take(tmp_path, capsys):
  log = metrics.Log(tmp_path, resumed_at=0)
  log.write(1, loss=1.0)
  with open("/dev/full", "wb", buffering=0) as full:
    disk, log._file = log._file, full
    log.write(2, loss=2.0)
    log.write(3, loss=3.0)
    log._file = disk
  assert [r["step"] for r in metrics.read(tmp_path / metrics.FILE)] == [1]
  log.write(4, loss=4.0)
  log.close()
  found = metrics.read(tmp_path / metrics.FILE)
  assert found == [{"step": i, "loss": float(i)} for i in (1, 2, 3, 4)]
  assert not capsys.readouterr().out
  log = metrics.Log(tmp_path, resumed_at=4)
  with open("/dev/full", "wb", buffering=0) as full:
    log._file = full
    log.write(5, loss=5.0)
    log.close()
  assert "1 records could not be written" in capsys.readouterr().out


def test_throughput_leaves_pauses_out():
  speed = metrics.Throughput()
  for now in (0.0, 1.0, 2.0):
    speed.update(100, now)
  assert speed.rate == 100
  speed.pause()
  speed.update(100, 50.0)
  assert speed.rate == 100
  speed.update(100, 50.5)
  assert speed.rate == 200


def test_a_checkpoint_that_was_renamed_is_noticed(trainer, state, tmp_path):
  save(tmp_path, (at(state, 4), None), (at(state, 8), None))
  (tmp_path / FOLDER / "8").rename(tmp_path / FOLDER / "20")
  printed = []
  restored, _ = checkpoint.restore(tmp_path, trainer.abstract, printed.append)
  assert int(restored.step) == 4
  (text,) = printed
  assert "checkpoints/20 is damaged (it holds step 8" in text
  shutil.rmtree(tmp_path / FOLDER / "4")
  (tmp_path / FOLDER / "20.damaged").rename(tmp_path / FOLDER / "20")
  with pytest.raises(UserError, match=r"step 20: it holds step 8.*name it 8"):
    checkpoint.restore(tmp_path, trainer.abstract)
  (tmp_path / FOLDER / "20").rename(tmp_path / FOLDER / "8")
  restored, _ = checkpoint.restore(tmp_path, trainer.abstract)
  assert int(restored.step) == 8


@pytest.mark.parametrize("name", ["²", "٤", "007", "4"])
def test_what_is_no_folder_of_a_step_is_left_alone(
  name, trainer, state, tmp_path
):
  save(tmp_path, (at(state, 3), None))
  (tmp_path / FOLDER / name).write_text("")
  assert checkpoint.steps_in(tmp_path) == [3]


def test_a_file_in_place_of_the_checkpoints_is_named(trainer, tmp_path):
  (tmp_path / FOLDER).write_text("")
  for use in (
    lambda: checkpoint.restore(tmp_path, trainer.abstract),
    lambda: checkpoint.Checkpoints(tmp_path, 1),
  ):
    with pytest.raises(UserError, match="checkpoints is a file"):
      use()


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"data": [{"step": 5}]}, "its position in the data differs"),
    ({"data": {}}, r"data is \{\}; it must be the positions"),
    ({"seconds": "1.5"}, 'seconds is "1.5"; it must be a number'),
    ({"check_sums": "1"}, 'check_sums is "1"; it must be a list'),
  ],
)
def test_damaged_progress_is_named(change, says, trainer, state, tmp_path):
  save(tmp_path, (at(state, 4), None))
  (path,) = (tmp_path / FOLDER / "4" / "progress").glob("*.json")
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(UserError, match=says):
    checkpoint.restore(tmp_path, trainer.abstract)


def test_progress_of_before_there_was_a_hash_is_read(trainer, state, tmp_path):
  save(tmp_path, (at(state, 4), None))
  (path,) = (tmp_path / FOLDER / "4" / "progress").glob("*.json")
  saved = json.loads(path.read_text())
  del saved["digest"]
  path.write_text(json.dumps(saved))
  _, progress = checkpoint.restore(tmp_path, trainer.abstract)
  assert progress == PROGRESS


def test_a_pipe_in_a_checkpoint_is_not_waited_for(trainer, state, tmp_path):
  save(tmp_path, (at(state, 4), None))
  path = biggest(tmp_path / FOLDER / "4" / "state")
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(UserError, match="is not a regular file"):
    checkpoint.restore(tmp_path, trainer.abstract)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{\xff}", b"{} {}", None])
def test_a_damaged_file_of_a_loss_is_dropped(content, state, tmp_path, capsys):
  save(tmp_path, (at(state, 4), 3.0), (at(state, 8), 2.0))
  path = tmp_path / FOLDER / "8" / "metrics" / "metrics"
  path.unlink()
  path.mkdir() if content is None else path.write_bytes(content)
  store = checkpoint.Checkpoints(tmp_path, 1, 1)
  assert f"note: {path}" in capsys.readouterr().out
  assert store.best() == 3.0 and store.latest == 8
  store.close()


@pytest.mark.parametrize("loss", ["low", None, [], {}])
def test_the_best_loss_is_a_number(loss, state, tmp_path):
  save(tmp_path, (at(state, 4), 3.0), (at(state, 8), 2.0))
  folder = tmp_path / FOLDER / "8" / "metrics"
  (path,) = [p for p in folder.iterdir() if checkpoint.LOSS in p.read_text()]
  path.write_text(json.dumps({checkpoint.LOSS: loss}))
  store = checkpoint.Checkpoints(tmp_path, 1, 1)
  assert store.best() == 3.0
  store.save(at(state, 9), PROGRESS, 2.5)
  store.close()
  assert not store.failure and kept(tmp_path) == ["9"]


@moves_arrays
def test_checksums_do_not_depend_on_the_memory():
  mesh = mesh_lib.make_mesh(schema.MeshConfig(data=1), 1, jax.devices()[:1])
  here = mesh_lib.replicated(mesh)
  there = here.with_memory_kind(mesh_lib.HOST)
  arrays = [np.arange(12.0).reshape(3, 4), np.ones((2, 3), np.int8)]
  put = lambda *places: list(map(jax.device_put, arrays, places))
  wanted = check_sums(put(here, here), mesh)
  assert all(wanted) and len({*wanted}) == 2
  for places in ((here, there), (there, here), (there, there)):
    assert check_sums(put(*places), mesh) == wanted
