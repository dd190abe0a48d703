"""Many runs that come to harm at random: none ends with other numbers."""

import collections
import random
import shutil
import signal

import pytest

from tests.train.run.small_run import assert_same_run, drive, steps_of
from train import pretrain
from train.run.run_dir import FOLDER

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures("one_device", "undrawn"),
]

KILLS, FLIPS = 30, 50


def test_kills_at_random_moments(flags, whole, tmp_path, capsys):
  """With a checkpoint at every step, many fall into a save."""
  chosen, seen = random.Random(0), collections.Counter()
  for trial in range(KILLS):
    out = tmp_path / str(trial)
    moment = f"{chosen.randint(1, 11)}:{chosen.uniform(0, 0.3)}"
    often = [*flags, "--set", "run.checkpoint_every=1"]
    done = drive("killed-soon-after", moment, out, often)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    seen["killed" if done.returncode else "finished before"] += 1
    left = [p.name for p in (out / FOLDER).iterdir() if not p.name.isdigit()]
    seen["in a save"] += bool(left)
    assert pretrain.main(["--out", str(out), *often]) == 0
    assert_same_run(out, whole)
    assert steps_of(out)[-1] == 12
    shutil.rmtree(out)
  with capsys.disabled():
    print(dict(seen))
  assert seen["killed"] > KILLS / 2


def test_flipped_bits_in_a_checkpoint(flags, whole, tmp_path, capsys):
  """Each is noticed, or changes nothing."""
  chosen, seen = random.Random(0), collections.Counter()
  for trial in range(FLIPS):
    out = tmp_path / str(trial)
    shutil.copytree(whole, out)
    folder = out / FOLDER / "12"
    files = sorted(p for p in folder.rglob("*") if p.stat().st_size)
    files = [p for p in files if p.is_file()]
    # Half of them in any file, half where most of the bytes are.
    sizes = [p.stat().st_size if trial % 2 else 1 for p in files]
    (path,) = chosen.choices(files, sizes)
    content = bytearray(path.read_bytes())
    bit = chosen.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    capsys.readouterr()
    assert pretrain.main(["--out", str(out), *flags]) == 0
    noticed = "checkpoints/12 is damaged" in capsys.readouterr().out
    seen["noticed" if noticed else "without effect"] += 1
    assert_same_run(out, whole)
    shutil.rmtree(out)
  with capsys.disabled():
    print(dict(seen))
  assert seen["noticed"] > FLIPS / 2
