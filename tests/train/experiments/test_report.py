"""The tables of the page, from made-up records."""

import numpy as np

from tests.train.experiments.fakes import METHODS, finished
from train.experiments import (
  mechanism,
  report,
  tables,
)
from train.measure import gradients


def test_an_unfinished_search_shows_no_perplexity():
  found, order = finished(METHODS)
  last = [run for run in order if run.variant == tables.OURS and not run.seed][
    -1
  ]
  del found.records[last.key]
  assert found.complete(tables.BASELINE) and not found.complete(tables.OURS)
  rows = report.table(found).splitlines()
  assert "search not done" in rows[3] and "%" not in rows[3].split("|")[3]
  assert "7 so far" in rows[3] and "search not done" not in rows[2]
  assert "best so far" in report.grid(found)
  own = [r for r in order if r.variant == tables.BASELINE and not r.seed]
  del found.records[own[-1].key]
  assert " % |" not in report.table(found)  # there is no complete first row


def test_a_row_without_all_seeds_is_not_finished():
  known, order = finished(METHODS)
  variant = METHODS.variants[0]
  assert known.complete(variant) and variant.label in report.table(known)
  last = next(
    r for r in reversed(order) if r.variant == variant and r.seed == 2
  )
  del known.records[last.key]
  assert known.searched(variant) and not known.complete(variant)
  assert f"| {variant.label} | seeds not done |" in report.table(known)


def test_seeds_without_the_search_are_compared_separately():
  known, _ = finished(METHODS)
  ours = METHODS.variants[1]
  for record in known.chosen_records(ours):
    record["test_loss"] -= 0.1 * (record["seed"] + 1)
  row = report.table(known).splitlines()[3]
  assert row.startswith(f"| {ours.label} | ")
  cells = row.split(" | ")
  assert cells[2].startswith("-17.9 ±") and cells[3].startswith("-22.0 ±")


def test_another_text_has_a_column():
  known, _ = finished(METHODS._replace(other="speeches"))
  for record in known.records.values():
    record["other_loss"] = 2.0
  lines = report.table(known).splitlines()
  column = lines[0].split(" | ").index("on speeches")
  assert lines[2].split(" | ")[column] == f"{np.exp(2):.2f} ± 0"


def test_spectra_of_gradients_are_shown(tmp_path, monkeypatch):
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
  measured = mechanism.run(tmp_path)
  assert measured["gradients"]["late.new"]["mlp/up"]["stable_rank"] == 1
  page = tmp_path / "page.md"
  page.write_text("<!-- mechanism: begin -->\n<!-- mechanism: end -->\n")
  report.write(tmp_path, [page])
  assert "| 150 | 1.0 (1.0, 1.0) | 100% |" in page.read_text()
  assert (tmp_path / "evidence" / "spectra.png").stat().st_size > 1000
  assert (tmp_path / "evidence" / "theory.png").stat().st_size > 1000
