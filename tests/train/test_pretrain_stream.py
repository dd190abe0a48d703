import gzip
import json

import pytest

from tests.train.conftest import speech
from train import pretrain
from train.common.errors import UserError
from train.data import prefetch
from train.run import metrics

pytestmark = pytest.mark.usefixtures("one_device", "undrawn")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
  """A tiny run on compressed shards that are streamed."""
  root = tmp_path_factory.mktemp("shards")
  for shard in range(3):
    texts = speech(40, shard).split("\n\n")
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    path = root / f"part-{shard}.json.gz"
    path.write_bytes(gzip.compress(lines.encode()))
  settings = {
    "data.path": root, "data.stream": "true", 
    "data.cache": tmp_path_factory.mktemp("cache"),
    "data.length": 16, "data.batch": 8, "data.shuffle_buffer": 15,
    "data.rows": "padded", "data.eval_rows": 8,
    "model.vocab_size": 300, "model.d_model": 32, "model.d_ff": 48,
    "model.n_layers": 2, "optimizer.rank": 4, "train.steps": 8,
    "run.eval_every": 4, "run.checkpoint_every": 4, "run.log_every": 1,
    "run.sample_tokens": 0, "run.watch": "none",
  }  # fmt: skip
  return [x for k, v in settings.items() for x in ("--set", f"{k}={v}")]


def losses(out):
  records = metrics.read(out / "metrics.jsonl")
  return [r["loss"] for r in records if "loss" in r]


@pytest.mark.slow
def test_a_streamed_run_that_fails_goes_on_to_the_same_numbers(
  flags, tmp_path, monkeypatch, capsys
):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  assert pretrain.main(["--out", str(whole), *flags]) == 0
  printed = capsys.readouterr().out
  assert "streamed" in printed and "waiting for data" in printed
  take = prefetch.Loader.__next__
  taken = []

  def fail(self):
    taken.append(1)
    if len(taken) == 7:
      raise UserError("shard 2 of 3 cannot be read: the line is down")
    return take(self)

  monkeypatch.setattr(prefetch.Loader, "__next__", fail)
  assert pretrain.main(["--out", str(cut), *flags]) == 2
  assert "the line is down" in capsys.readouterr().err
  assert len(losses(cut)) < 8
  monkeypatch.setattr(prefetch.Loader, "__next__", take)
  assert pretrain.main(["--out", str(cut), *flags]) == 0
  assert "continuing from the checkpoint of step 4" in capsys.readouterr().out
  assert losses(cut) == losses(whole)
  assert len(set(losses(cut))) == 8
