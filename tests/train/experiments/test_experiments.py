"""The runner of the papers' tables: order, search, resuming, report."""

import functools
import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from tests.train import conftest
from train.common.errors import UserError
from train.config import schema
from train.data import corpus, holdout
from train.experiments import __main__ as command
from train.experiments import (
  mechanism,
  plan,
  report,
  results,
  runner,
  speed,
  stability,
  sweep,
  tables,
  texts,
  theory,
  training,
)
from train.measure import gradients
from train.parallel import mesh
from train.run import metrics, run_dir

TOO_MUCH = 8e-3 * 1e40  # a learning rate
# With lines for which it is known which points a search takes.
METHODS = tables.METHODS._replace(
  rates=tables.Line(8e-3, 1e-3, 6.4e-2),
  multipliers=tables.Line(0.25, 1 / 64, 4.0),
)
TINIEST = tables.QUICK._replace(
  settings=(
    "model.vocab_size=300",
    "model.d_model=32",
    "model.d_ff=48",
    "model.n_layers=1",
    "model.n_heads=2",
    "data.length=16",
    "data.batch=4",
    "optimizer.rank=8",
    "optimizer.scale=1",
    "train.max_skips=2",
  ),
  rates=tables.Line(8e-3, 8e-3, TOO_MUCH, 1e40),
  tokens=640,
)


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """Eight devices compile longer, and change nothing here."""
  make = mesh.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    single = lambda config, batch: make(config, batch, jax.devices()[:1])
    patch.setattr(mesh, "make_mesh", single)
    yield


def point_of(run: plan.Run) -> plan.Point:
  return run.rate, run.multiplier


def fake(run: plan.Run, loss: float, **fields) -> plan.Record:
  """A record as a run leaves it; the test loss tells the opposite."""
  return {
    "key": run.key,
    "entry": run.entry.name,
    "status": "done",
    "validation_loss": loss,
    "test_loss": 10 - loss + 0.1 * run.seed,
    "seed": run.seed,
    "tokens": run.tokens,
    "steps": 10,
    "text": run.text,
    "bytes": {"optimizer": 2**20, "weights": 2**20},
    "cpu_seconds_a_step": 0.5,
    "curve": [[1, 5.0], [10, 4.0]],
    "validation_curve": [[0, 5.0], [10, 4.0]],
    "date": "2026-01-01",
    "machine": {"processor": "a chip", "cores": 2},
    "versions": {"jax": "1", "optax": "2"},
    **fields,
  }


def loss_of(run: plan.Run) -> float:
  """Least at rate 4e-3 and multiplier 0.5."""
  far = abs(math.log2(run.rate / 4e-3)) + abs(math.log2(run.multiplier / 0.5))
  return 4 + 0.1 * far


def finished(table: tables.Table) -> tuple[plan.Plan, list[plan.Run]]:
  """The whole table, run by run as the runner would, with made-up losses."""
  found, order = {}, []
  while runs := plan.Plan(table, 1000, "speeches", found).missing():
    order.append(runs[0])
    found[runs[0].key] = fake(runs[0], loss_of(runs[0]))
  return plan.Plan(table, 1000, "speeches", found), order


def test_every_entry_is_searched_alike_and_repeated_at_its_best():
  found, order = finished(METHODS)
  assert len(order) == found.total == found.done()
  for entry in tables.METHODS.entries:
    own = [run for run in order if run.entry == entry]
    searched = [point_of(run) for run in own if run.seed == 0]
    assert searched == [
      (8e-3, 0.25),
      (8e-3, 0.125),  # worse
      (8e-3, 0.5),  # better
      (8e-3, 1.0),  # worse: 0.5 it is
      (4e-3, 0.5),  # better
      (4e-3, 0.25),  # worse
      (4e-3, 1.0),  # worse
      (2e-3, 0.5),  # worse on all sides now
    ]
    assert found.chosen(entry) == (4e-3, 0.5) and found.complete(entry)
    repeated = [(*point_of(run), run.seed) for run in own[8:]]
    assert repeated == [(4e-3, 0.5, 1), (4e-3, 0.5, 2)]


def test_a_search_goes_on_from_the_best_that_is_there():
  """Points that a search from another start has left are not lost on it."""
  table = METHODS._replace(groups=((tables.OURS,),))
  known = plan.Plan(table, 1000, "speeches", {})
  for point in ((2e-3, 0.5), (1e-3, 0.5)):
    run = known.run(tables.OURS, point, seed=0)
    known.found[run.key] = fake(run, loss_of(run))
  tried, wanted = known.search(tables.OURS)
  assert set(tried) == {(2e-3, 0.5), (1e-3, 0.5)} and wanted == (2e-3, 0.25)


def test_a_search_turns_back_where_that_helps():
  """The best multiplier is another one at the best learning rate."""
  found = {}
  table = METHODS._replace(groups=((tables.OURS,),))
  while runs := plan.Plan(table, 1000, "speeches", found).missing():
    rate, multiplier = point_of(runs[0])
    far = abs(math.log2(rate * multiplier / 8e-3))
    loss = 4 + 0.1 * far + 0.3 * abs(math.log2(rate / 2e-3))
    found[runs[0].key] = fake(runs[0], loss)
  known = plan.Plan(table, 1000, "speeches", found)
  assert (2e-3, 1.0) in known.search(tables.OURS)[0]
  assert known.chosen(tables.OURS) == (2e-3, 4.0)


def test_a_search_ends_at_the_end_of_its_line_and_says_so():
  found, order = {}, []
  table = tables.QUICK._replace(multipliers=tables.Line(0.25, 0.125, 4.0))
  while runs := plan.Plan(table, 1000, "speeches", found).missing():
    order.append(runs[0])
    found[runs[0].key] = fake(runs[0], runs[0].multiplier)
  known = plan.Plan(table, 1000, "speeches", found)
  assert known.chosen(tables.OURS) == (4e-3, 0.125)
  assert min(run.multiplier for run in order) == 0.125
  assert "| 0.125\\* |" in report.table(known)


def test_close_points_are_told_apart_by_all_seeds():
  """The best of the first seed is not the best of all."""
  table = METHODS._replace(groups=((tables.OURS,),))
  found: dict = {}
  while runs := plan.Plan(table, 1000, "speeches", found).missing():
    run = runs[0]
    loss = loss_of(run)
    if point_of(run) == (8e-3, 0.5):
      loss = 4.005 if run.seed == 0 else 3.9
    found[run.key] = fake(run, loss)
    half = plan.Plan(table, 1000, "speeches", found)
    if half._unrepeated(tables.OURS):
      assert not half.complete(tables.OURS)  # nor is anything of it shown
  known = plan.Plan(table, 1000, "speeches", found)
  assert known.near(tables.OURS) == [(4e-3, 0.5), (8e-3, 0.5)]
  assert known.chosen(tables.OURS) == (8e-3, 0.5)
  assert [r["seed"] for r in known.seeds(tables.OURS)] == [0, 1, 2]
  # What is chosen has neighbours of its own.
  assert (1.6e-2, 0.5) in known.tried(tables.OURS)
  assert known.done() == known.total == len(found)
  assert "± 0.0" not in report.grid(known)
  assert report.grid(known).count("3 seeds") == 2


def test_what_has_all_seeds_stays_whatever_its_first_says():
  """As with a point that was the best until a better one was found."""
  known, _ = finished(METHODS._replace(groups=((tables.OURS,),)))
  far = (8e-3, 0.5)
  assert far not in known.near(tables.OURS)
  for seed in (0, 1, 2):
    run = known.run(tables.OURS, far, seed)
    known.found[run.key] = fake(run, 4.1 if seed == 0 else 3.9)
  assert known.near(tables.OURS)[0] == (4e-3, 0.5)
  assert known.chosen(tables.OURS) == far
  wanted = known.search(tables.OURS)[1]
  assert wanted == (1.6e-2, 0.5)  # and has neighbours of its own


def test_what_has_its_point_is_not_searched():
  entry = tables.OURS._replace(at=(4e-3, 0.5))
  table = METHODS._replace(groups=((entry,),))
  known, order = finished(table)
  assert [(*point_of(run), run.seed) for run in order] == [
    (4e-3, 0.5, seed) for seed in table.seeds
  ]
  assert known.total == known.done() == 3 and known.complete(entry)
  assert "not measured yet" in report.table(
    plan.Plan(table, 1000, "speeches", {})
  )


def test_the_telling_comparisons_come_first():
  _, order = finished(METHODS)
  done = 0
  for group in tables.METHODS.groups:
    part = order[done : done + 10 * len(group)]
    assert [run.entry for run in part[: len(group)]] == list(group)
    assert {run.entry for run in part} == set(group)
    assert {run.seed for run in part} == {0, 1, 2}
    done += len(part)


def test_what_is_not_tuned_does_not_stand_beside_what_is():
  found, order = finished(METHODS)
  last = [run for run in order if run.entry == tables.OURS and not run.seed][-1]
  del found.found[last.key]
  assert found.complete(tables.BASELINE) and not found.complete(tables.OURS)
  rows = report.table(found).splitlines()
  assert "search not done" in rows[3] and "%" not in rows[3].split("|")[3]
  assert "7 so far" in rows[3] and "search not done" not in rows[2]
  assert "best so far" in report.grid(found)
  own = [r for r in order if r.entry == tables.BASELINE and not r.seed]
  del found.found[own[-1].key]
  assert " % |" not in report.table(found)  # nothing to compare with


def test_a_row_of_one_seed_is_not_finished():
  whole, order = finished(METHODS)
  entry = METHODS.entries[0]
  assert whole.complete(entry) and entry.label in report.table(whole)
  last = next(r for r in reversed(order) if r.entry == entry and r.seed == 2)
  del whole.found[last.key]
  assert whole.searched(entry) and not whole.complete(entry)
  assert f"| {entry.label} | seeds not done |" in report.table(whole)


def test_the_seeds_that_nothing_was_searched_on_stand_apart():
  whole, _ = finished(METHODS)
  ours = METHODS.entries[1]
  for record in whole.seeds(ours):
    record["test_loss"] -= 0.1 * (record["seed"] + 1)
  row = report.table(whole).splitlines()[3]
  assert row.startswith(f"| {ours.label} | ")
  cells = row.split(" | ")
  assert cells[2].startswith("-17.9 ±") and cells[3].startswith("-22.0 ±")


@pytest.mark.parametrize("last, test", [(5, 4.0), (10, math.nan)])
def test_a_run_without_a_finite_loss_at_its_end_diverged(
  last, test, tmp_path, monkeypatch
):
  job = types.SimpleNamespace(
    out=tmp_path,
    config=types.SimpleNamespace(train=types.SimpleNamespace(steps=10)),
  )
  log = metrics.Log(tmp_path, 0)
  log.write(last, held_out_loss=4.0)
  log.close()
  state = types.SimpleNamespace(opt_state=(), params={}, skipped=0)
  outcome = types.SimpleNamespace(stopped=False, state=state)
  monkeypatch.setattr(training.loop, "train", lambda *_: outcome)
  monkeypatch.setattr(training, "_test_loss", lambda *_: test)
  found = training._finish(job, state, None, lambda: False)
  assert found["status"] == "diverged" and "validation_loss" not in found


def test_nothing_is_selected_on_the_reported_text():
  found, order = finished(tables.METHODS)
  before = found.chosen(tables.BASELINE)
  for run in order:  # the best there is on the reported text
    worst = -loss_of(run) if point_of(run) != before else 99.0
    found.found[run.key]["test_loss"] = worst
  assert found.chosen(tables.BASELINE) == before


def test_a_diverged_run_is_not_chosen_and_is_reported():
  found, _ = finished(tables.QUICK)
  entry = tables.BASELINE
  best = found.chosen(entry)
  run = found.run(entry, best, 0)
  found.found[run.key] = fake(run, 0.0, status="diverged") | {
    "validation_loss": None
  }
  assert found.chosen(entry) not in (None, best)
  assert "diverged" in report.grid(found)


@pytest.mark.parametrize("table", tables.TABLES.values(), ids=lambda t: t.name)
def test_every_entry_is_a_run_that_the_script_takes(table, tmp_path):
  parts = texts.Parts(*(tmp_path / name for name in "abc"))
  found = plan.Plan(table, 256_000, "speeches", {})
  keys = set()
  for entry in table.entries:
    run = found.run(entry, (8e-3, 0.25), 0)
    config = training.config_of(run, parts)
    assert config.optimizer.name == entry.optimizer
    assert (config.optimizer.learning_rate, config.optimizer.matrix_lr) == (
      8e-3,
      0.25,
    )
    gap, steps = config.optimizer.update_proj_gap, config.train.steps
    bases = -(-steps // gap)
    if entry.name in ("ldadam", "every_step"):
      assert bases == steps
    elif entry.gaps < 10:
      assert bases == entry.gaps
    else:
      assert entry.gaps <= bases <= 1.3 * entry.gaps
    # No restart is so late that its cycle would be cut.
    assert config.optimizer.reset_every * entry.gaps >= 2 * steps
    keys.add(run.key)
  assert len(keys) == len(table.entries)
  names = [entry.name for entry in table.entries]
  assert len(set(names)) == len(names)


def test_the_model_is_of_the_size_it_is_said_to_be():
  run = plan.Plan(tables.METHODS, 10**6, "speeches", {}).missing()[0]
  model = training.config_of(run, texts.Parts(*[None] * 3)).model  # type: ignore
  d, ff = model.d_model, model.d_ff
  assert 2e6 <= model.n_layers * (4 * d * d + 3 * d * ff) <= 10e6 and d >= 192


def test_the_parts_of_a_text_share_no_document(tmp_path):
  path = tmp_path / "text.txt"
  text = conftest.speech(80)
  path.write_text(f"{text}\n\n{conftest.speech(60)}", encoding="utf-8")
  parts = texts.prepare(str(path), tmp_path / "cache")
  kept = [
    {
      holdout.digest(json.loads(line)["text"])
      for line in part.read_text(encoding="utf-8").splitlines()
    }
    for part in parts
  ]
  assert all(kept) and len(set.union(*kept)) == 80
  assert sum(map(len, kept)) == 80
  assert texts.prepare(str(path), tmp_path / "cache") == parts


def test_a_text_that_is_not_there(tmp_path):
  with pytest.raises(UserError, match="reviews"):
    texts.prepare("nothing", tmp_path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A tiny text, and a table that was stopped in its first run."""
  base = tmp_path_factory.mktemp("experiments")
  (base / "speech.txt").write_text(conftest.speech(120), encoding="utf-8")
  return base


@pytest.fixture(scope="module")
def ran(place, tmp_path_factory):
  """The table, run to its end after a stop in the first run."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    patch.setitem(tables.TABLES, "quick", TINIEST)
    words = ["run", "quick", "--text", str(place / "speech.txt"), "--nice", "0"]
    words += ["--work", str(place / "work"), "--results", str(place / "out")]
    asked = [0]

    class Stopping(training.Clock):
      def __call__(self):
        asked[0] += 1
        return super().__call__() or asked[0] == 4

    patch.setattr(training, "Clock", Stopping)
    first = command.main(words)
    left = {path.name for path in (place / "work").iterdir()}
    before = results.read(place / "out" / "quick.jsonl")
    second = command.main(words)
    steps, third = asked[0], command.main(words)
    assert asked[0] == steps  # nothing was run again
  return first, second, third, left, before


def test_a_stopped_table_goes_on_where_it_was(place, ran):
  first, second, third, left, before = ran
  assert (first, second, third) == (130, 0, 0)
  assert len(left) == 2 and before == []  # the lock, and the run under way
  found = results.read(place / "out" / "quick.jsonl")
  assert len(found) == 6 and {path.name for path in place.glob("work/*")} == {
    "lock"
  }
  done = [record for record in found if record["status"] == "done"]
  assert len(done) == 4
  assert all(len(record["curve"]) == 10 for record in done)
  errors = [r["basis_error"] for r in done if r["entry"] == "galore"]
  assert len(errors) == 2 and 0 < max(errors) < 1e-4
  assert not any("basis_error" in r for r in done if r["entry"] == "adamw")


def test_all_methods_see_the_same_batches(place, ran, monkeypatch):
  """Before the first update, two methods of one seed have one loss."""
  found = results.read(place / "out" / "quick.jsonl")
  starts = {}
  for record in found:
    if record["status"] == "done":
      starts.setdefault(record["seed"], set()).add(record["curve"][0][1])
  assert {len(losses) for losses in starts.values()} == {1}
  assert starts[0] != starts[1]


def test_the_report_says_what_was_found(place, ran, capsys):
  page = place / "page.md"
  marks = "<!-- {0}: begin -->\nold\n<!-- {0}: end -->\n"
  names = ("methods", "quick", "quick_grid", "other")
  page.write_text("\n".join(marks.format(name) for name in names))
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(tables.TABLES, "quick", TINIEST)
    words = ["report", "--page", str(page), "--results", str(place / "out")]
    assert command.main(words) == 0
  text = page.read_text()
  assert "Not measured yet: `python -m train.experiments run methods" in text
  assert text.count("old") == 1  # what is not ours stays
  assert "6 of about 6 runs are there" in text
  rows = re.findall(r"^\| (AdamW, full rank|GaLore, our.*?) \|", text, re.M)
  assert len(rows) == 2 + 4  # the table, and two rates of each in the grid
  found = results.read(place / "out" / "quick.jsonl")
  pair = [
    math.exp(r["test_loss"])
    for r in found
    if r["entry"] == "adamw" and r["status"] == "done"
  ]
  assert len(pair) == 2 and f"{sum(pair) / 2:.2f} ± " in text
  assert list((place / "evidence").glob("quick-*.png"))


def test_a_jump_of_the_loss_is_found_and_a_worn_basis():
  losses = [(step, 5 - 0.01 * step) for step in range(1, 101)]
  losses[5] = (6, 9.0)  # while it warms up
  losses[69] = (70, 7.3)
  found = stability.look(losses, ())
  assert found["jump"] == [70, pytest.approx(7.3 - 4.405, abs=1e-3)]
  assert "basis_error" not in found and "jump" not in stability.look([], ())
  tx = galore_optax.galore(optax.adam(1e-3), rank=4)
  state = tx.init({"w": jnp.zeros((8, 12))})
  assert stability.look(losses, state)["basis_error"] < 1e-6
  worn = jax.tree.map(lambda x: 1.5 * x if x.shape == (8, 4) else x, state)
  assert stability.look(losses, worn)["basis_error"] == pytest.approx(1.25)


def test_the_course_of_a_run_is_told_against_the_first_row(tmp_path):
  table = tables.LONG._replace(
    groups=(tuple(e._replace(gaps=2) for e in tables.LONG.entries[:2]),),
    seeds=(0,),
  )
  whole = plan.Plan(table, 1000, "speeches", {})
  base, ours = (whole.run(e, e.at, 0) for e in table.entries)
  flat = [[0, 5.0], [1, 4.0], [2, 3.0], [3, 3.0]]
  bent = [[0, 5.0], [1, 3.9], [2, 3.2], [3, 3.5]]
  more = {"jump": [2, 0.25], "basis_error": 3e-7}
  whole.found[base.key] = fake(base, 3.0, validation_curve=flat)
  whole.found[ours.key] = fake(ours, 3.5, validation_curve=bent, **more)
  first, second = stability.rows(whole)
  assert first == [
    *("AdamW, full rank", "0", "", "", "0 of 3", ""),
    *("+0.0 %", "+0.0 %", "+0.0 %", ""),
  ]
  assert second == [
    *("GaLore, 60 gaps", "0", "0.25 nats", "2", "1 of 3", "0.300 nats"),
    *("-9.5 %", "+22.1 %", "+64.9 %", "3e-07"),
  ]
  section = report.section(whole, tmp_path)
  assert f"| {' | '.join(stability.HEAD)} |" in section
  assert f"| {' | '.join(second)} |" in section


def test_steps_are_timed_side_by_side_for_the_table(place, ran, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
  monkeypatch.setitem(tables.TABLES, "quick", TINIEST)
  words = ["time", "quick", "--text", str(place / "speech.txt")]
  assert command.main([*words, "--results", str(place / "out")]) == 0
  found = json.loads((place / "out" / speed.FILE).read_text())
  times = found["tables"]["quick"]
  assert times["adamw"]["ratio"] == 1 and times["galore"]["cpu_seconds"] > 0
  whole = runner.plan(TINIEST, 640, str(place / "speech.txt"), place / "out")
  rows = report.section(whole, place / "out").splitlines()
  column = rows[2].split(" | ").index("step, of the first row's")
  assert rows[4].split(" | ")[column] == "1.00"
  assert rows[5].split(" | ")[column] == f"{times['galore']['ratio']:.2f}"


def test_quick_ends_with_its_table(place, ran, monkeypatch, capsys):
  monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
  monkeypatch.setitem(tables.TABLES, "quick", TINIEST)
  words = ["quick", "--text", str(place / "speech.txt"), "--nice", "0"]
  words += ["--work", str(place / "work"), "--results", str(place / "out")]
  assert command.main(words) == 0  # all of it is there
  said = capsys.readouterr().out
  assert "all 6 runs are done" in said and "| AdamW, full rank | " in said


def test_the_score_is_that_of_the_training_script(place, ran, monkeypatch):
  """The validation loss belongs to the config that the record names."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
  found = results.read(place / "out" / "quick.jsonl")[0]
  words = found["command"].split(" --set ")
  parts = texts.prepare(
    str(place / "speech.txt"), corpus.cache_folder(schema.DataConfig())
  )
  assert f"data.path={parts.train.name}" in words
  assert f"data.validation={parts.validation.name}" in words
  assert "train.steps=10" in words


def test_a_run_that_diverges_is_recorded(place, ran):
  found = results.read(place / "out" / "quick.jsonl")
  lost = [record for record in found if record["status"] == "diverged"]
  assert {record["learning_rate"] for record in lost} == {TOO_MUCH}
  assert {record["entry"] for record in lost} == {"adamw", "galore"}
  assert "no finite gradient" in lost[0]["why"]
  text = str(place / "speech.txt")
  known = runner.plan(TINIEST, TINIEST.tokens, text, place / "out")
  assert known.chosen(tables.OURS) == (8e-3, 0.25)
  assert report.grid(known).count("diverged") == 2


def test_what_is_left_of_another_run_is_started_over(place, tmp_path):
  run = plan.Plan(TINIEST, 640, "x", {}).missing()[0]
  out = tmp_path / run.key
  out.mkdir()
  (out / run_dir.CONFIG).write_text("{ torn", encoding="utf-8")
  parts = texts.Parts(*(tmp_path / f"{n}.txt" for n in "abc"))
  with pytest.raises(UserError, match=r"data\.path"):  # there is no text
    training.train(run, parts, tmp_path, lambda: False)
  assert json.loads((out / run_dir.CONFIG).read_text())["train.seed"] == 0


@pytest.mark.parametrize("count", [1, 4])
def test_stable_rank_falls_as_the_theory_says(count):
  layer = theory.draw(6, 8, count, seed=1)
  found = theory.descend(layer, np.array([0, 1, 20, 10**6]))
  rate = 1 / np.linalg.eigvalsh(layer.operator())[-1]
  w, ranks = np.zeros((6, 8)), []
  for _ in range(21):  # the same by gradient descent itself
    g = layer.gradient(w)
    ranks.append(theory.stable_rank(g))
    w = w + rate * g
  seen = [ranks[0], ranks[1], ranks[20]]
  np.testing.assert_allclose(found["stable_rank"][:3], seen, rtol=1e-6)
  pairs = zip(found["stable_rank"], found["bound"], strict=True)
  assert all(rank <= bound * (1 + 1e-9) for rank, bound in pairs)
  assert found["stable_rank"][-1] == pytest.approx(found["limit"][0])
  assert found["limit"][0] < 0.7 * seen[0]


def test_looks_at_gradients_are_shown(tmp_path, monkeypatch):
  shapes = {"attn/q/kernel": (2, 8, 8), "mlp/up/kernel": (2, 8, 12)}
  draw = np.random.default_rng(0)
  left = draw.standard_normal((2, 8, 1))
  made = {
    f"{stage}/layers/{path}": left * np.ones((2, 1, shape[2]))
    if stage == "late.new"
    else draw.standard_normal(shape)
    for stage in mechanism.STAGES
    for path, shape in shapes.items()
  }
  monkeypatch.setattr(gradients, "record", lambda *_: made)
  monkeypatch.setattr(mechanism, "CASES", {"one": 1})
  kept = mechanism.run(tmp_path)
  assert kept["gradients"]["late.new"]["mlp/up"]["stable_rank"] == 1
  page = tmp_path / "page.md"
  page.write_text("<!-- mechanism: begin -->\n<!-- mechanism: end -->\n")
  report.write(tmp_path, page)
  assert "| 150 | 1.0 (1.0, 1.0) | 100% |" in page.read_text()
  assert (tmp_path / "evidence" / "spectra.png").stat().st_size > 1000
  assert (tmp_path / "evidence" / "theory.png").stat().st_size > 1000


def test_a_run_whose_checkpoints_are_damaged_starts_over(tmp_path, monkeypatch):
  run = plan.Plan(TINIEST, 640, "x", {}).missing()[0]
  config = training.config_of(run, texts.Parts(*"abc"))
  seen = []

  def prepare(_, out, *__):
    seen.append((out / run_dir.FOLDER).exists())
    if seen[-1]:
      raise UserError("no checkpoint can be read")
    return "job", "state"

  monkeypatch.setattr(training.jobs, "prepare", prepare)
  (tmp_path / run_dir.FOLDER / "5").mkdir(parents=True)
  assert training._prepare(config, tmp_path, None, None) == ("job", "state")
  assert seen == [True, False]
  monkeypatch.setattr(training.jobs, "prepare", lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):  # anything else is not hidden
    training._prepare(config, tmp_path, None, None)


def test_runners_at_one_table_take_different_runs(tmp_path):
  found, order = finished(tables.QUICK)
  now = plan.Plan(tables.QUICK, 1000, "speeches", {})

  def missing():
    known = results.read_all(tmp_path / "out")
    return [run for run in now.missing() if run.key not in known]

  claim = functools.partial(sweep.claim, now.missing(), missing, tmp_path)
  with claim() as first, claim() as second, claim() as third:
    assert first == order[0] and second is not None and second != first
    assert third is None and len(now.missing()) == 2
    for run in (first, second):
      results.append(tmp_path / "out" / "quick.jsonl", found.found[run.key])
  # What another has finished since the plan was made is not run again.
  with claim() as late:
    assert late is None
  assert not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize(
  "words, said",
  [
    (["run", "quick", "--budget", "-1"], "hours above 0"),
    (["run", "quick", "--text", "nowhere.txt", "--nice", "0"], "nowhere.txt"),
    (["report", "--page", "nowhere.md"], "nowhere.md"),
  ],
)
def test_wrong_input_is_said_in_a_sentence(words, said, capsys):
  assert command.main(words) == 2
  assert said in capsys.readouterr().err


def test_a_torn_line_is_named(tmp_path):
  path = tmp_path / "methods.jsonl"
  path.write_text('{"key": 1}\n{"key"', encoding="utf-8")
  with pytest.raises(UserError, match=re.escape(str(path))):
    results.read(path)
