"""Figures of made-up runs."""

import json
import math

import numpy as np
import pytest
from matplotlib import pyplot as plt

from train import plot
from train.common.errors import UserError
from train.config import presets, schema
from train.run import history


def make_run(
  out,
  *settings,
  optimizer="galore",
  subspace=True,
  seconds=True,
  watched=("attn.q.0",),
):
  out.mkdir(parents=True)
  made = schema.override(presets.make("sotu_small", optimizer), settings)
  (out / "config.json").write_text(json.dumps(schema.flatten(made)))
  records = []
  for step in range(0, 101, 5):
    loss = 3 + 4 * math.exp(-step / 20)
    time = {"seconds": 36.0 * step} if seconds else {}
    records.append(
      {"step": step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0,
       "tokens_per_second": 100.0, **time}
    )  # fmt: skip
    if step % 50 == 0:
      perplexity = {"held_out_perplexity": math.exp(loss)}
      records.append({"step": step, "held_out_loss": loss, **perplexity})
    if subspace and step % 20 == 0:
      for k, matrix in enumerate(watched):
        key, low = f"subspace/{matrix}/", 0.1 * k
        watch = {key + "energy": 0.8 - low, key + "stable_rank": 3.0}
        if step % 40 == 0:
          watch |= {
            key + "energy_before": 0.6 - low,
            key + "overlap": 0.5 - low,
          }
        records.append({"step": step, **watch})
  lines = "".join(json.dumps(record) + "\n" for record in records)
  (out / "metrics.jsonl").write_text(lines)
  return out


@pytest.fixture
def figures(monkeypatch):
  """The figures that are drawn; they stay open for the test."""
  drawn, close = [], plt.close
  monkeypatch.setattr(plt, "close", drawn.append)
  yield drawn
  for figure in drawn:
    close(figure)


def panels(figure):
  return {axes.get_ylabel(): axes for axes in figure.axes}


def test_one_run_goes_into_its_folder(tmp_path, figures, capsys):
  out = make_run(tmp_path / "a")
  assert plot.main([str(out)]) == 0
  assert capsys.readouterr().out.strip() == str(out / "run.png")
  assert (out / "run.png").read_bytes().startswith(b"\x89PNG")
  (figure,) = figures
  assert figure.get_suptitle() == "sotu_small, galore"
  drawn = panels(figure)
  energy = drawn["captured share of gradient energy"].lines
  # Refreshes only: with the new basis, and with the old.
  assert [list(line.get_xdata()) for line in energy] == [[0, 40, 80]] * 2
  assert energy[0].get_ydata()[0] == 0.8 and energy[1].get_ydata()[0] == 0.6
  rank = drawn["stable rank of the gradient"].lines[0]
  assert list(rank.get_xdata()) == [0, 20, 40, 60, 80, 100]


def test_several_runs_share_panels_and_name_their_differences(
  tmp_path, figures
):
  first = make_run(tmp_path / "a")
  second = make_run(tmp_path / "b", "optimizer.rank=16", "run.log_every=7")
  third = make_run(tmp_path / "c", optimizer="adamw", subspace=False)
  path = tmp_path / "all.svg"
  arguments = [str(first), str(second), str(third), "--out", str(path)]
  assert plot.main([*arguments, "--x", "tokens"]) == 0
  assert path.read_text().lstrip().startswith("<?xml")
  (figure,) = figures
  texts = [text.get_text() for text in figure.legends[0].get_texts()]
  # The learning rates differ too, but follow from the methods.
  assert texts == ["galore, rank 48", "galore, rank 16", "adamw"]
  drawn = panels(figure)
  assert len(drawn["learning rate"].lines) == 3
  assert drawn["learning rate"].lines[0].get_xdata()[-1] == 100 * 16 * 128
  assert len(drawn["overlap of new and old basis"].lines) == 2


def test_hours_are_those_of_training(tmp_path, figures):
  out = make_run(tmp_path / "a")
  assert plot.main([str(out), "--x", "hours"]) == 0
  evaluations = panels(figures[0])["held-out perplexity (log)"].lines[0]
  np.testing.assert_allclose(evaluations.get_xdata(), [0, 0.5, 1.0])


def test_runs_with_equal_configs_are_labeled_by_folder(tmp_path):
  found = [history.load(make_run(tmp_path / name)) for name in ("a", "b")]
  assert history.labels(found) == ["a", "b"]


def test_a_long_value_is_cut_and_a_path_is_its_file(tmp_path):
  paths = ["/data/news/speeches.jsonl", "/data/" + 40 * "x" + ".txt"]
  found = [
    history.load(make_run(tmp_path / str(n), f"data.path={path}"))
    for n, path in enumerate(paths)
  ]
  first, second = history.labels(found)
  assert first == "path speeches.jsonl"
  assert second == "path " + 23 * "x" + "…"


def test_matrices_of_several_runs_differ_in_tint_dashes_and_marker(
  tmp_path, figures
):
  names = ("attn.q.0", "mlp.up.1", "mlp.down.2")
  folders = [
    make_run(tmp_path / n, f"optimizer.rank={r}", watched=names)
    for n, r in (("a", 48), ("b", 16))
  ]
  out = tmp_path / "both.png"
  assert plot.main([*map(str, folders), "--out", str(out)]) == 0
  panel = panels(figures[0])["captured share of gradient energy"]
  styles = [
    (tuple(line.get_color()), line.get_linestyle(), line.get_marker())
    for line in panel.lines
  ]
  assert len(styles) == len({color for color, *_ in styles}) == 6
  assert [x[1:] for x in styles[:3]] == [x[1:] for x in styles[3:]]
  names_shown = [text.get_text() for text in panel.get_legend().get_texts()]
  assert names_shown == sorted(names)


def test_runs_that_differ_only_in_run_fields_are_labeled_by_them(tmp_path):
  found = [
    history.load(make_run(tmp_path / str(n), f"run.log_every={n}"))
    for n in (5, 6)
  ]
  assert history.labels(found) == ["log_every 5", "log_every 6"]


def test_smoothing_has_no_lag_and_keeps_constants():
  line = np.linspace(5.0, 1.0, 200)
  np.testing.assert_allclose(plot.smooth(line), line)
  noise = np.random.default_rng(0).normal(size=400)
  assert plot.smooth(noise)[50:-50].std() < 0.5
  np.testing.assert_allclose(plot.smooth(np.array([2.0])), [2.0])


def test_wrong_input_is_one_line_and_status_2(tmp_path, capsys):
  good = make_run(tmp_path / "good", seconds=False)
  empty = make_run(tmp_path / "empty")
  (empty / "metrics.jsonl").write_text("")
  torn = make_run(tmp_path / "torn")
  (torn / "metrics.jsonl").write_text("{nonsense\n")
  for arguments, message in (
    ([tmp_path], "not the folder of a run"),
    ([good, tmp_path / "none"], "none is not the folder of a run"),
    ([empty], "holds no training step"),
    ([torn], "holds no training step"),  # after a note, see below
    ([good, "--x", "hours"], "has no times"),
    ([good, "--out", tmp_path / "no" / "a.png"], "cannot be written"),
    ([good, "--out", tmp_path / "a.foo"], "'foo' is not supported"),
  ):
    assert plot.main([str(word) for word in arguments]) == 2
    printed, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error, error
    assert ("is damaged in line 1" in printed) == (arguments == [torn])


def test_a_missing_run_is_a_user_error(tmp_path):
  with pytest.raises(UserError):
    history.load(tmp_path)
