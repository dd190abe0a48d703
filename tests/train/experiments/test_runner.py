"""A tiny table that is trained, stopped, resumed, timed and reported."""

import functools
import json
import math
import re

import jax
import pytest

from tests.train import conftest
from tests.train.experiments.fakes import DIVERGING, TINIEST, finished
from train.common.errors import UserError
from train.config import schema
from train.data import corpus
from train.experiments import __main__ as command
from train.experiments import (
  plan,
  report,
  results,
  runner,
  speed,
  sweep,
  tables,
  texts,
  training,
)
from train.parallel import mesh


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """Eight devices would take longer to compile for, and change nothing."""
  make = mesh.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    single = lambda config, batch, *_: make(config, batch, jax.devices()[:1])
    patch.setattr(mesh, "make_mesh", single)
    yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A folder with a tiny text."""
  folder = tmp_path_factory.mktemp("experiments")
  (folder / "speech.txt").write_text(conftest.speech(120), encoding="utf-8")
  return folder


@pytest.fixture(scope="module")
def ran(base, tmp_path_factory):
  """The table, run to its end after a stop in the first run."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(base / "cache"))
    patch.setitem(tables.TABLES, "quick", TINIEST)
    arguments = [
      "run",
      "quick",
      "--text",
      str(base / "speech.txt"),
      "--nice",
      "0",
    ]
    arguments += ["--work", str(base / "work"), "--results", str(base / "out")]
    asked = [0]
    train = training.train

    def stopping(runs, parts, out, stopped, other):
      def stop():
        asked[0] += 1
        return stopped() or asked[0] == 4

      return train(runs, parts, out, stop, other)

    patch.setattr(training, "train", stopping)
    first = command.main(arguments)
    left = {path.name for path in (base / "work").iterdir()}
    before = results.read(base / "out" / "quick.jsonl")
    second = command.main(arguments)
    steps, third = asked[0], command.main(arguments)
    assert asked[0] == steps  # nothing was run again
  return first, second, third, left, before


def test_a_stopped_table_is_resumed(base, ran):
  first, second, third, left, before = ran
  assert (first, second, third) == (130, 0, 0)
  assert len(left) == 2 and before == []  # the lock, and the unfinished run
  found = results.read(base / "out" / "quick.jsonl")
  assert len(found) == 5 and {path.name for path in base.glob("work/*")} == {
    "lock"
  }
  done = [record for record in found if record["status"] == "done"]
  assert len(done) == 4
  assert all(len(record["curve"]) == 10 for record in done)
  errors = [r["basis_error"] for r in done if r["entry"] == "galore"]
  assert len(errors) == 2 and 0 < max(errors) < 1e-4
  assert not any("basis_error" in r for r in done if r["entry"] == "adamw")


def test_all_methods_see_the_same_batches(base, ran, monkeypatch):
  """Before the first update, two methods of one seed have one loss."""
  found = results.read(base / "out" / "quick.jsonl")
  starts = {}
  for record in found:
    if record["status"] == "done":
      starts.setdefault(record["seed"], set()).add(record["curve"][0][1])
  assert {len(losses) for losses in starts.values()} == {1}
  assert starts[0] != starts[1]


def test_the_report_contains_the_records(base, ran, capsys):
  page = base / "page.md"
  marks = "<!-- {0}: begin -->\nold\n<!-- {0}: end -->\n"
  names = ("methods", "quick", "quick_grid", "other")
  page.write_text("\n".join(marks.format(name) for name in names))
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(tables.TABLES, "quick", TINIEST)
    arguments = ["report", "--page", str(page), "--results", str(base / "out")]
    assert command.main(arguments) == 0
  text = page.read_text()
  assert "Not measured yet: `python -m train.experiments run methods" in text
  assert text.count("old") == 1  # an unknown section stays
  assert "5 of about 5 runs are done" in text
  rows = re.findall(r"^\| (AdamW, full rank|GaLore, def.*?) \|", text, re.M)
  assert len(rows) == 2 + 3  # the table, and all points in the grid
  found = results.read(base / "out" / "quick.jsonl")
  pair = [
    math.exp(r["test_loss"])
    for r in found
    if r["entry"] == "adamw" and r["status"] == "done"
  ]
  assert len(pair) == 2 and f"{sum(pair) / 2:.2f} ± " in text
  assert list((base / "evidence").glob("quick-*.png"))


@pytest.mark.slow
def test_step_times_of_all_variants_are_in_the_table(base, ran, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(base / "cache"))
  monkeypatch.setitem(tables.TABLES, "quick", TINIEST)
  arguments = ["time", "quick", "--text", str(base / "speech.txt")]
  assert command.main([*arguments, "--results", str(base / "out")]) == 0
  found = json.loads((base / "out" / speed.FILE).read_text())
  times = found["tables"]["quick"]
  assert times["adamw"]["ratio"] == 1 and times["galore"]["cpu_seconds"] > 0
  known = runner.plan(TINIEST, 640, str(base / "speech.txt"), base / "out")
  rows = report.evidence(known, base / "out").splitlines()
  column = rows[2].split(" | ").index("step time / first row's")
  assert rows[4].split(" | ")[column] == "1.00"
  assert rows[5].split(" | ")[column] == f"{times['galore']['ratio']:.2f}"


def test_quick_ends_with_its_table(base, ran, monkeypatch, capsys):
  monkeypatch.setenv("XDG_CACHE_HOME", str(base / "cache"))
  monkeypatch.setitem(tables.TABLES, "quick", TINIEST)
  arguments = ["quick", "--text", str(base / "speech.txt"), "--nice", "0"]
  arguments += ["--work", str(base / "work"), "--results", str(base / "out")]
  assert command.main(arguments) == 0  # all runs are done
  output = capsys.readouterr().out
  assert "all 5 runs are done" in output and "| AdamW, full rank | " in output


def test_a_record_names_its_command(base, ran, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(base / "cache"))
  found = results.read(base / "out" / "quick.jsonl")[0]
  arguments = found["command"].split(" --set ")
  parts = texts.prepare(
    str(base / "speech.txt"), corpus.cache_folder(schema.DataConfig())
  )
  assert f"data.path={parts.train.name}" in arguments
  assert f"data.validation={parts.validation.name}" in arguments
  assert "train.steps=10" in arguments


def test_a_run_that_diverges_is_recorded(base, ran):
  found = results.read(base / "out" / "quick.jsonl")
  lost = [record for record in found if record["status"] == "diverged"]
  assert {record["learning_rate"] for record in lost} == {DIVERGING}
  assert [record["entry"] for record in lost] == ["galore"]
  assert "no finite gradient" in lost[0]["why"]
  text = str(base / "speech.txt")
  known = runner.plan(TINIEST, TINIEST.tokens, text, base / "out")
  assert known.chosen(tables.OURS) == (8e-3, 0.25)
  assert report.grid(known).count("diverged") == 1


def test_processes_on_one_table_make_different_runs(tmp_path):
  found, order = finished(tables.QUICK)
  now = plan.Plan(tables.QUICK, 1000, "speeches", {})

  def missing():
    known = results.read_all(tmp_path / "out")
    return [run for run in now.missing() if run.key not in known]

  claim = functools.partial(sweep.claim, now.missing(), missing, tmp_path)
  with claim() as (first,), claim() as (second,), claim() as third:
    assert first == order[0] and second != first
    assert not third and len(now.missing()) == 2
    for run in (first, second):
      results.append(tmp_path / "out" / "quick.jsonl", found.records[run.key])
  # A run that another process has finished since then is not made again.
  with claim() as late:
    assert not late
  assert not list(tmp_path.glob("*.lock"))


def test_runs_of_one_kind_are_claimed_together(tmp_path):
  now = plan.Plan(tables.QUICK, 1000, "speeches", {})
  missing = functools.partial(now.missing, ahead=True)
  together = sweep.Together(2, lambda run: run.variant.name)
  claim = functools.partial(sweep.claim, missing(), missing, tmp_path, together)
  with claim() as first, claim() as second, claim() as third:
    assert [run.variant.name for run in first] == ["adamw"] * 2
    assert [run.variant.name for run in second] == ["galore"] * 2
    assert not third and len({run.key for run in [*first, *second]}) == 4


def test_runs_side_by_side_are_refused_on_a_cpu(capsys):
  assert command.main(["run", "quick", "--lanes", "2", "--nice", "0"]) == 2
  assert "start the command once a core" in capsys.readouterr().err


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["run", "quick", "--budget", "-1"], "hours above 0"),
    (["run", "quick", "--lanes", "0"], "use 1 or more"),
    (["run", "quick", "--text", "nowhere.txt", "--nice", "0"], "nowhere.txt"),
    (["report", "--page", "nowhere.md"], "nowhere.md"),
  ],
)
def test_wrong_input_is_a_one_line_error(arguments, message, capsys):
  assert command.main(arguments) == 2
  assert message in capsys.readouterr().err


def test_a_damaged_file_of_records_is_named(tmp_path):
  path = tmp_path / "methods.jsonl"
  path.write_text('{"key": 1}\n{"key"', encoding="utf-8")
  with pytest.raises(UserError, match=re.escape(str(path))):
    results.read(path)
