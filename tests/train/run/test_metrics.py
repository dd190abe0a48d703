"""Log, sinks, evaluation figures and the progress bar."""

import builtins
import importlib.util
import io
import json
import math
import struct
import sys
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from train.common.errors import UserError
from train.config import schema
from train.run import loop, metrics, progress, sinks


class Memory:
  """A sink that keeps what it is given."""

  def __init__(self):
    self.received, self.closed = [], False

  def write(self, step, values):
    self.received.append((step, values))

  def close(self):
    self.closed = True


def test_what_is_not_known_is_left_out_everywhere(tmp_path):
  sink = Memory()
  log = metrics.Log(tmp_path, 0, [sink])
  log.write(1, loss=2.5, tokens_per_second=math.nan)
  log.close()
  text = (tmp_path / "metrics.jsonl").read_text()
  assert json.loads(text) == {"step": 1, "loss": 2.5}
  assert sink.received == [(1, {"loss": 2.5})] and sink.closed


def test_a_resumed_log_forgets_what_happens_again(tmp_path):
  log = metrics.Log(tmp_path, 0)
  for step in (10, 20, 30):
    log.write(step, loss=1.0)
  log.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 40, "lo')  # torn by a kill
  log = metrics.Log(tmp_path, 20)
  log.write(25, loss=2.0)
  log.close()
  records = metrics.read(tmp_path / "metrics.jsonl")
  assert [r["step"] for r in records] == [10, 20, 25]


@pytest.mark.parametrize(
  "damage",
  [
    b"\0" * 40 + b"\n",
    b'{"step": 3, "lo\n',
    b'{"step": 3, "note": "\xff"}\n',
    b'{"loss": 1.0}\n',
    b"[3]\n",
    b'{"step": "3"}\n',
  ],
  ids=["zeros", "torn", "not UTF-8", "no step", "no object", "step of text"],
)
def test_a_damaged_log_is_cut_at_its_last_sound_record(
  damage, tmp_path, capsys
):
  path = tmp_path / "metrics.jsonl"
  sound = b'{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n'
  path.write_bytes(sound + damage + b'{"step": 4, "loss": 1.0}\n')
  log = metrics.Log(tmp_path, 10)
  assert "is damaged in line 3" in capsys.readouterr().out
  log.write(11, loss=2.0)
  log.close()
  assert [r["step"] for r in metrics.read(path)] == [1, 2, 11]
  assert capsys.readouterr().out == ""


def test_evaluation_weighs_tokens_and_knows_the_papers_count():
  # The second batch is filled up: 10 tokens of loss 5, after 90 of loss 3.
  found = metrics.held_out([270.0, 50.0], [90, 10], text_bytes=400)
  assert found["held_out_loss"] == pytest.approx(3.2)
  assert found["held_out_perplexity"] == pytest.approx(math.exp(3.2))
  # Theirs: start at one batch, add the mean loss of each, divide.
  batches, total = 1, 0.0
  for mean in (3.0, 5.0):
    total += mean
    batches += 1
  papers = found["held_out_perplexity_papers"]
  assert papers == pytest.approx(math.exp(total / batches))
  bits = found["held_out_bits_per_byte"]
  assert bits == pytest.approx(320 / math.log(2) / 400)
  text = metrics.held_out_text(found)
  assert f"perplexity {math.exp(3.2):.2f}" in text
  assert "papers" not in text and "1.154 bits/byte" in text
  # It says little for two batches, and is shown for many.
  many = metrics.held_out([30.0] * 64, [10] * 64, text_bytes=400)
  assert many["held_out_batches"] == metrics.MIN_BATCHES
  shown = f"papers' count {math.exp(3 * 64 / 65):.2f}"
  assert shown in metrics.held_out_text(many)


def test_compiling_with_a_step_is_no_time_of_training(capsys):
  loss = {"loss": 1.0, "grad_norm": 1.0}

  class Feed:
    waited = 0.0

    def __next__(self):
      return jnp.ones(4)

  def slow_to_trace(state, rows):
    time.sleep(0.5)
    return state + rows.sum(), {"loss": rows.mean()}

  job: Any = types.SimpleNamespace(
    train=schema.TrainConfig(), run=schema.RunConfig(),
    feed=Feed(), seconds=0.0,
    rates=[1.0, 1.0],
    put=lambda rows: rows, forward_flops=1.0,
    log=types.SimpleNamespace(write=lambda *args, **values: None),
    watcher=None,
  )  # fmt: skip
  watch, compiled = loop.Reporter(job, 0, 0), jax.jit(slow_to_trace)
  state = jnp.zeros(())
  for step in (1, 2):
    state, _ = watch.step(compiled, step, state)
    counts = {"skips_in_row": 0, "skipped": 0, "tokens": 100}
    watch.record(step, jax.tree.map(jnp.asarray, counts | loss))
  assert watch.seconds() < 0.4 and watch.speed.rate > 100 / 0.4
  assert watch.wait_share() == 0
  output = capsys.readouterr().out
  assert "with step 1" in output and "with step 2" not in output


def test_a_hopeless_loss_has_a_perplexity_still():
  found = metrics.held_out([1e5], [10], text_bytes=10)
  assert math.isfinite(found["held_out_perplexity"])


def test_throughput_leaves_out_pauses():
  speed = metrics.Throughput(window=2)
  speed.update(100, now=0.0)
  assert math.isnan(speed.rate)
  speed.update(100, now=1.0)
  assert speed.rate == 100
  speed.pause()
  speed.update(100, now=500.0)
  speed.update(100, now=500.5)
  assert speed.rate == 200


def test_sinks_that_cannot_be_are_told_before_anything_starts(monkeypatch):
  assert sinks.parse_names("") == []
  with pytest.raises(UserError, match=r"'mlflow' is unknown.*tensorboard"):
    sinks.parse_names("mlflow")
  found = importlib.util.find_spec
  hide = lambda name: None if name == "tensorboardX" else found(name)
  monkeypatch.setattr(importlib.util, "find_spec", hide)
  with pytest.raises(UserError, match=r"tensorboardX.*\.\[tensorb"):
    sinks.parse_names("tensorboard")


def scalars(path):
  """(tag, step, value) of the scalars in an event file."""
  event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")
  data, at, found = path.read_bytes(), 0, []
  while at < len(data):
    (size,) = struct.unpack("<Q", data[at : at + 8])
    event = event_pb2.Event()
    event.ParseFromString(data[at + 12 : at + 12 + size])
    at += 16 + size
    values = event.summary.value
    found += [(v.tag, event.step, v.simple_value) for v in values]
  return found


def test_tensorboard_gets_the_same_numbers(tmp_path):
  pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
  others = sinks.open_sinks("tensorboard", tmp_path, {"optimizer.rank": 4}, 0)
  log = metrics.Log(tmp_path, 0, others)
  log.write(3, loss=1.5, **{"subspace/attn.q.0/energy": 0.25})
  log.close()
  (path,) = (tmp_path / "tensorboard").iterdir()
  found = scalars(path)
  assert ("loss", 3, 1.5) in found
  assert ("subspace/attn.q.0/energy", 3, 0.25) in found


def test_wandb_goes_on_under_one_id(tmp_path, monkeypatch):
  calls = []

  class Run:
    def log(self, values, step):
      calls.append((values, step))

    def finish(self):
      calls.append("finish")

  class Wandb:
    Error = RuntimeError
    Settings = dict

    @staticmethod
    def init(**options):
      calls.append(options)
      return Run()

  monkeypatch.setitem(sys.modules, "wandb", Wandb)
  for resumed in (0, 20):
    sink = sinks.Wandb(tmp_path, {"optimizer.rank": 4}, resumed)
    sink.write(21, {"loss": 1.0})
    sink.close()
  first, *_, again, numbers, end = calls
  assert first["id"] == again["id"] and first["resume"] == "allow"
  assert first["config"] == {"optimizer.rank": 4}
  assert numbers == ({"loss": 1.0}, 21) and end == "finish"
  sinks.Wandb(tmp_path, {}, 0)
  assert calls[-1]["id"] != first["id"]


FULL = {
  "loss": "3.214", "lr": "8.0e-03", "norm": "0.52", "tokens/s": "12.3k",
  "MFU": "41%", "left": "3d04h",
}  # fmt: skip


@pytest.mark.parametrize("room", [30, 45, 60, 80, 200])
def test_what_is_needed_most_stays_in_a_narrow_terminal(room):
  text = progress.fit(FULL, room)
  assert len(text) + progress.BAR <= room
  assert "loss 3.214" in text
  assert ("norm" in text) == (room >= 80)
  assert "left 3d04h" in text


def test_without_a_terminal_there_are_plain_lines(capsys):
  bar = progress.Progress(0, 20, line_every=10)
  for step in range(1, 21):
    bar.update(step, 2.0, 1e-3, 1000.0, 500, norm=0.5, mfu=0.25)
  bar.close()
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 2
  assert lines[0] == (
    "step 10/20  loss 2.000 lr 1.0e-03 norm 0.50 tokens/s 1000 MFU 25%"
    " left 0:05"
  )


def test_on_a_terminal_there_is_a_bar_that_fits(monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  screen = Terminal()
  monkeypatch.setattr(sys, "stderr", screen)
  monkeypatch.setattr(progress, "_columns", lambda: 80)
  monkeypatch.setattr(
    builtins, "print", lambda *_, **__: pytest.fail("a line beside the bar")
  )
  bar = progress.Progress(0, 15_000, line_every=10)
  bar._bar.dynamic_ncols, bar._bar.ncols = None, 80
  bar._bar.mininterval = 0
  for step in range(1, 4):
    bar.update(step, 2.0, 1e-3, 1e5, 500, norm=0.5, mfu=0.25)
  bar.close()
  last = screen.getvalue().split("\r")[-1].rstrip()
  assert "loss 2.000" in last and "3/15000" in last and "left" in last
  assert "|" in last and len(last) <= 80


def test_refreshes_saved_are_counted_against_a_fixed_gap():
  counts = {"a": jnp.array([3, 5]), "b": jnp.array([2])}
  found = metrics.refreshes_text(counts, steps=40, gap=10)
  assert found == (
    "refreshes  10 of the 15 that a fixed gap of 10 makes (33% saved)"
  )
  assert metrics.refreshes_text({}, steps=40, gap=10) == ""
