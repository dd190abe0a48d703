"""The search, its records, the tables made of them, and the command."""

import json

import numpy as np
import pytest

from train.architectures import (
  __main__ as command,
)
from train.architectures import (
  catalog,
  gradients,
  loop,
  report,
  search,
  tables,
  times,
)
from train.experiments.plan import Plan

CNN = catalog.ENTRIES["cnn"]


@pytest.fixture
def fake_runs(monkeypatch):
  """Runs that take no time: the best rate is 0.01, that of GaLore better."""

  def run(entry, config, rates, seed, say=None):
    loss = 1 + abs(np.log10(rates.rate / 0.01))
    loss += abs(np.log2(rates.multiplier / 0.5)) + seed / 100
    loss -= 0.5 * (rates.method == "galore")
    size = 100 if rates.method == "galore" else 400
    record = {
      "status": "done",
      "validation_loss": loss,
      "test_loss": loss,
      "test_error": loss / 100,
      "curve": [[1, 2.0], [2, loss]],
      "bytes": {"optimizer": size, "weights": 10},
    }
    return loop.Run(record, None, None)

  monkeypatch.setattr(loop, "run", run)
  monkeypatch.setattr(search.program_cache, "enable", lambda: None)


def searched(folder):
  lines = []
  work = folder / "work"
  assert search.work_through([CNN], folder, work, say=lines.append) == 0
  return lines


def test_search_and_report(fake_runs, tmp_path, monkeypatch):
  lines = searched(tmp_path)
  plan = search.plan(CNN, tmp_path)
  for variant in (tables.ADAMW, tables.GALORE):
    assert plan.complete(variant)
    assert plan.chosen(variant) == (0.01, 0.5)
  assert not searched(tmp_path)  # nothing is made twice
  assert len(lines) == plan.done() == plan.total
  (tmp_path / times.FILE).write_text(
    json.dumps({"architectures": {"cnn": {"galore": {"ratio": 1.5}}}})
  )
  monkeypatch.setattr(catalog, "ENTRIES", {"cnn": CNN})
  page = tmp_path / "page.md"
  page.write_text(
    "<!-- architectures: begin -->\n<!-- architectures: end -->\n"
  )
  report.write(tmp_path, page)
  _, _, adamw, galore, one_matrix, factors = (
    line.split(" | ")
    for line in page.read_text().splitlines()
    if line.startswith("|")
  )
  assert adamw[2] == "1.01 ± 0.01 % wrong"
  assert galore[4:6] == ["-0.5000 ± 0.0082", "better"]
  assert galore[6:11] == ["3", "0", "25%", "29%", "1.50"]
  assert one_matrix[1] == tables.ONE_MATRIX.label
  assert factors[1] == tables.TUCKER.label
  assert (tmp_path / report.FIGURE).stat().st_size > 1000


def test_bytes_of_gradients():
  whole = gradients.size(CNN, "adamw")
  # Kernels of 144 x 32 and 288 x 64, whose gradients are given at a quarter.
  saved = 4 * (144 * (32 - 8) + 288 * (64 - 16))
  for method in ("galore", "galore_plain", "galore_one_matrix"):
    assert gradients.size(CNN, method) == whole - saved
  assert gradients.size(CNN, "galore_tucker") == whole


@pytest.mark.parametrize(
  ("values", "verdict"),
  [([1.0, 1.1, 1.2], "yes"), ([1.5, 1.6, 1.7], "no"), ([0.5, 0.6], "better")],
)
def test_the_verdict(values, verdict):
  base = [1.0, 1.1, 1.2]
  assert report._difference(values, base, tables.GALORE)[1] == verdict


def test_what_is_not_measured_says_so(tmp_path):
  plan = Plan(tables.table(CNN), 1, "digits", {})
  text = report.table({CNN: plan}, tmp_path)
  assert text.count("not measured yet") == 4


def test_a_stopped_search_says_so(fake_runs, tmp_path):
  lines = []
  work = tmp_path / "work"
  status = search.work_through([CNN], tmp_path, work, 0.0, lines.append)
  assert status == search.STOPPED
  assert lines == ["stopped; the same command continues"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["cnn", "--set", "widht=3"], "no field 'widht'"),
    (["cnn", "--set", "steps=many"], "not of type int"),
    (["cnn", "--set", "steps=0"], "must be above 0"),
    (["cnn", "--rate", "-1"], "--rate is -1.0"),
    (["search", "rnn"], "no architecture 'rnn'"),
  ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
  assert command.main(arguments) == 2
  assert message in capsys.readouterr().err


def test_a_missing_library_is_named():
  entry = CNN._replace(package="no_such_package", library="Nolib")
  with pytest.raises(Exception, match=r"Nolib, which is not installed: pip"):
    entry.module()


@pytest.mark.slow
def test_the_commands_train_and_time(tmp_path, capsys, monkeypatch):
  tiny = ["--set", "channels=8", "--set", "batch=4", "--set", "steps=3"]
  out = tmp_path / "samples.png"
  assert command.main(["diffusion", *tiny, "--out", str(out)]) == 0
  assert "test_loss" in capsys.readouterr().out
  assert out.stat().st_size > 1000
  config = CNN.module().Config(channels=8, batch=4, gap=2)
  monkeypatch.setattr(CNN.module(), "Config", lambda: config)
  times.measure([CNN], tmp_path, rounds=2)
  assert times.load(tmp_path)["cnn"]["galore"]["ratio"] > 0
