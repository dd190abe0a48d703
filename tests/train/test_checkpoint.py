import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.train.conftest import make_trainer
from train import checkpoint, config, metrics, presets
from train.errors import UserError

BASE = presets.make("sotu_small", "galore")


def test_a_state_comes_back_bit_for_bit_and_trains_on(trainer, rows, tmp_path):
  state = trainer.init()
  with jax.set_mesh(trainer.mesh):
    for _ in range(4):
      state, _ = trainer.train_step(state, trainer.put(rows))
    store = checkpoint.Checkpoints(tmp_path, keep=2)
    store.save(state)
    # The step consumes the state while it is being written.
    state, values = trainer.train_step(state, trainer.put(rows))
    store.close()
    again = checkpoint.Checkpoints(tmp_path, keep=2)
    assert again.latest == 4
    restored = again.restore(trainer.placed)
    assert int(restored.step) == 4
    repeated, same = trainer.train_step(restored, trainer.put(rows))
    again.close()
  assert float(values["loss"]) == float(same["loss"])
  jax.tree.map(np.testing.assert_array_equal, state, repeated)


def test_a_state_moves_to_another_mesh(trainer, tmp_path):
  if jax.device_count() < 8:
    pytest.skip(f"needs 8 devices, found {jax.device_count()}")
  state = trainer.init()
  store = checkpoint.Checkpoints(tmp_path, keep=1)
  store.save(state)
  store.close()
  other = make_trainer("galore", 8, fsdp=2, tensor=2)
  store = checkpoint.Checkpoints(tmp_path, keep=1)
  restored = store.restore(other.placed)
  store.close()
  jax.tree.map(np.testing.assert_array_equal, state, restored)
  kernel = restored.params["layers"]["mlp"]["up"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 16, 24)


def test_only_the_newest_are_kept(trainer, tmp_path):
  store = checkpoint.Checkpoints(tmp_path, keep=2)
  state = trainer.init()
  for index in range(4):
    store.save(state._replace(step=state.step + index))
  store.close()
  kept = {p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()}
  assert kept == {"2", "3"}


def test_a_damaged_checkpoint_is_named(trainer, tmp_path):
  store = checkpoint.Checkpoints(tmp_path, keep=2)
  store.save(trainer.init())
  store.close()
  other = make_trainer("sgd", devices=1)
  store = checkpoint.Checkpoints(tmp_path, keep=2)
  with pytest.raises(UserError, match=r"checkpoints/0 cannot be restored"):
    store.restore(other.placed)
  store.close()


def test_a_folder_of_another_run_is_refused(tmp_path):
  out = tmp_path / "run"
  checkpoint.check_run(out, BASE, overwrite=False)
  assert not out.exists()
  checkpoint.claim_run(out, BASE, overwrite=False)
  checkpoint.check_run(out, BASE, overwrite=False)
  other = config.override(BASE, ["optimizer.rank=8", "train.seed=5"])
  with pytest.raises(UserError) as raised:
    checkpoint.check_run(out, other, overwrite=False)
  for word in (str(out), "optimizer.rank: 48 there, 8 now", "train.seed: 0",
               "--overwrite", "--out"):  # fmt: skip
    assert word in str(raised.value)
  checkpoint.check_run(out, other, overwrite=True)


def test_what_changes_no_number_may_change(tmp_path):
  checkpoint.claim_run(tmp_path, BASE, overwrite=False)
  free = config.override(BASE, ["run.keep=7", "mesh.fsdp=2"])
  checkpoint.check_run(tmp_path, free, overwrite=False)


def test_overwriting_deletes_the_run_and_nothing_else(tmp_path):
  checkpoint.claim_run(tmp_path, BASE, overwrite=False)
  (tmp_path / "metrics.jsonl").write_text("{}\n")
  (tmp_path / checkpoint.FOLDER / "9").mkdir(parents=True)
  (tmp_path / "notes.md").write_text("mine")
  other = dataclasses.replace(BASE, train=config.TrainConfig(steps=5))
  checkpoint.claim_run(tmp_path, other, overwrite=True)
  assert {p.name for p in tmp_path.iterdir()} == {"config.json", "notes.md"}
  saved = json.loads((tmp_path / "config.json").read_text())
  assert saved["train.steps"] == 5


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
  (tmp_path / "thesis.tex").write_text("words")
  for overwrite in (False, True):
    with pytest.raises(UserError, match="not empty"):
      checkpoint.check_run(tmp_path, BASE, overwrite)
  with pytest.raises(UserError, match="is a file"):
    checkpoint.check_run(tmp_path / "thesis.tex", BASE, False)


def test_a_broken_config_is_named(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(UserError, match=r"config.json cannot be read"):
    checkpoint.check_run(tmp_path, BASE, overwrite=False)


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


@pytest.mark.parametrize(
  "seconds, text",
  [(61, "1:01"), (3723, "1:02:03"), (0.4, "0:00"), (float("nan"), "-")],
)
def test_durations(seconds, text):
  assert metrics.duration(seconds) == text
