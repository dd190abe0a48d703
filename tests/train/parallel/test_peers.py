"""Whether a lost process is noticed, and what the others say then."""

import itertools
import signal
import subprocess
import sys
import time

import jax
import pytest

from tests.train.parallel import test_multihost
from tests.train.run.test_interrupt import SETTINGS
from train.parallel import peers, witness


class Store(dict):
  """The store of process 0, in this process."""

  def __init__(self):
    self.down = False

  def key_value_set(self, name, value, allow_overwrite):
    assert allow_overwrite
    self._check()
    self[name] = value

  def key_value_dir_get(self, folder):
    self._check()
    return [pair for pair in self.items() if pair[0].startswith(folder)]

  def _check(self):
    if self.down:
      raise jax.errors.JaxRuntimeError("UNAVAILABLE")


@pytest.fixture
def three():
  """A store, and the watches of three processes that wait for 3 rounds."""
  store = Store()
  return store, [peers.Watch(store, i, 3, 3, lambda _: None) for i in range(3)]


def test_nobody_is_lost_while_all_give_signs(three):
  _, watches = three
  for _ in range(9):
    assert [watch.look() for watch in watches] == [None] * 3


def test_a_process_that_falls_silent_is_lost_to_all_others(three):
  _, (first, second, third) = three
  for watch in (first, second, third) * 2:
    watch.look()
  found = [(first.look(), third.look()) for _ in range(4)]
  # The third looks after the second, so it sees the last sign a round earlier.
  assert found == [(None, None), (None, None), (None, 1), (1, 1)]
  assert second.look() is None


def test_a_process_that_never_began_is_lost(three):
  _, (first, second, _) = three
  found = [(first.look(), second.look()) for _ in range(3)]
  assert found == [(None, None), (None, None), (2, 2)]


def test_a_process_that_has_left_is_not_lost(three):
  _, (first, second, third) = three
  for watch in (first, second, third):
    watch.look()
  third._write(peers.LEFT)
  for _ in range(9):
    assert first.look() is None and second.look() is None


def test_without_the_store_process_0_is_lost(three):
  store, (first, second, third) = three
  for watch in (first, second, third):
    watch.look()
  store.down = True
  assert [second.look() for _ in range(3)] == [None, None, 0]


def test_the_watch_ends_the_process_once(monkeypatch):
  monkeypatch.setattr(peers, "PERIOD", 0.01)
  lost = []
  watch = peers.Watch(Store(), 0, 2, 1, lost.append)
  watch._lost_after = 0.02
  watch.start()
  watch.wait_for_end()
  assert lost == [1]
  watch.stop()


def test_a_process_that_leaves_says_so(monkeypatch):
  monkeypatch.setattr(peers, "PERIOD", 0.01)
  store = Store()
  watch = peers.Watch(store, 1, 2, 30, lambda lost: None)
  watch.start()
  watch.leave()
  assert store == {"galore/alive/1": "left"}


def test_alone_there_is_nothing_to_watch(tmp_path):
  with peers.watched(tmp_path, 1):
    assert "peers" not in [t.name for t in peers.threading.enumerate()]


@pytest.mark.parametrize("word", [b"", b"done"])
def test_the_witness_speaks_only_for_a_process_that_could_not(word, tmp_path):
  for name in ("4", "12", "13.orbax-checkpoint-tmp"):
    (tmp_path / name).mkdir()
  done = subprocess.run(
    [sys.executable, witness.__file__, str(tmp_path), "it was killed"],
    input=word,
    capture_output=True,
  )
  line = (
    f"stopped: it was killed. Step 12 is saved in {tmp_path}; the same command"
    " in all processes continues from there\n"
  )
  assert done.stderr.decode() == ("" if word else line)


def test_the_last_words_say_that_nothing_is_saved(tmp_path):
  assert witness.last_words("it was killed", str(tmp_path / "none")) == (
    "stopped: it was killed. Nothing is saved yet; start all processes again"
  )


def wait_for(path, running):
  for _ in itertools.count():
    if path.exists():
      return
    assert all(p.poll() is None for p in running)
    time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_other_process_ends_soon_and_says_what_is_saved(
  victim, text_file, tmp_path
):
  settings = SETTINGS | {
    "data.path": text_file,
    "data.cache": tmp_path / "cache",
    "train.steps": 100_000,
    "run.eval_every": 100_000,
    "run.checkpoint_every": 100,
    "mesh.data": 0,
    "mesh.lost_after": 5,
  }
  flags = [x for k, v in settings.items() for x in ("--set", f"{k}={v}")]
  address = f"127.0.0.1:{test_multihost.free_port()}"
  out = tmp_path / "run"
  running = [test_multihost.start(i, address, out, flags) for i in (0, 1)]
  try:
    wait_for(out / "checkpoints" / "100", running)
    running[victim].send_signal(signal.SIGKILL)
    begin, survivor = time.monotonic(), running[1 - victim]
    _, error = survivor.communicate(timeout=60)
    assert time.monotonic() - begin < 30
  finally:
    for process in running:
      process.kill()
      process.wait()
  if victim == 1:
    assert survivor.returncode == 1
    assert "process 1 of 2 gave no sign of life for 5 s" in error
  else:
    assert "aborted by JAX because process 0 was lost" in error
  last = error.splitlines()[-1]
  assert last.startswith("stopped: process 1 of 2 ")
  assert f"00 is saved in {out / 'checkpoints'}; the same command in" in last
