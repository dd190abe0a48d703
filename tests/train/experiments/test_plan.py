"""The sequence of runs, the search and the choice of a point."""

import math

from tests.train.experiments.fakes import (
  METHODS,
  fake,
  finished,
  loss_of,
  point_of,
)
from train.experiments import (
  plan,
  report,
  tables,
)


def test_every_variant_is_searched_alike_and_repeated_at_its_best():
  found, order = finished(METHODS)
  assert len(order) == found.total == found.done()
  for variant in METHODS.variants:
    own = [run for run in order if run.variant == variant]
    searched = [point_of(run) for run in own if run.seed == 0]
    assert searched == [
      (8e-3, 0.25),
      (8e-3, 0.125),  # worse
      (8e-3, 0.5),  # better
      (8e-3, 1.0),  # worse, so 0.5 is kept
      (4e-3, 0.5),  # better
      (4e-3, 0.25),  # worse
      (4e-3, 1.0),  # worse
      (2e-3, 0.5),  # worse on all sides now
    ]
    assert found.chosen(variant) == (4e-3, 0.5) and found.complete(variant)
    repeated = [(*point_of(run), run.seed) for run in own[8:]]
    assert repeated == [(4e-3, 0.5, 1), (4e-3, 0.5, 2)]


def test_a_search_continues_from_the_best_known_point():
  """It uses the points of a search that had another start."""
  table = METHODS._replace(groups=((tables.OURS,),))
  known = plan.Plan(table, 1000, "speeches", {})
  for point in ((2e-3, 0.5), (1e-3, 0.5)):
    run = known.run(tables.OURS, point, seed=0)
    known.records[run.key] = fake(run, loss_of(run))
  tried, wanted = known.search(tables.OURS)
  assert set(tried) == {(2e-3, 0.5), (1e-3, 0.5)} and wanted[0] == (
    2e-3,
    0.25,
  )


def test_a_search_tries_multipliers_again_at_a_better_rate():
  """The best multiplier depends on the learning rate."""
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


def test_a_search_ends_at_the_edge_of_its_range_and_says_so():
  found, order = {}, []
  table = tables.QUICK._replace(
    multipliers=tables.SearchRange(0.25, 0.125, 4.0)
  )
  while runs := plan.Plan(table, 1000, "speeches", found).missing():
    order.append(runs[0])
    found[runs[0].key] = fake(runs[0], runs[0].multiplier)
  known = plan.Plan(table, 1000, "speeches", found)
  assert known.chosen(tables.OURS) == (4e-3, 0.125)
  assert min(run.multiplier for run in order) == 0.125
  assert "| 0.125\\* |" in report.table(known)


def test_all_seeds_decide_between_close_points():
  """The best point of the first seed is not the best of all seeds."""
  table = METHODS._replace(groups=((tables.OURS,),))
  found: dict = {}
  while runs := plan.Plan(table, 1000, "speeches", found).missing():
    run = runs[0]
    loss = loss_of(run)
    if point_of(run) == (8e-3, 0.5):
      loss = 4.005 if run.seed == 0 else 3.9
    found[run.key] = fake(run, loss)
    half = plan.Plan(table, 1000, "speeches", found)
    if half._missing_seeds(tables.OURS):
      assert not half.complete(tables.OURS)  # the table shows no perplexity
  known = plan.Plan(table, 1000, "speeches", found)
  assert known.contenders(tables.OURS) == [(4e-3, 0.5), (8e-3, 0.5)]
  assert known.chosen(tables.OURS) == (8e-3, 0.5)
  assert [r["seed"] for r in known.chosen_records(tables.OURS)] == [0, 1, 2]
  # The neighbors of the chosen point are tried, too.
  assert (1.6e-2, 0.5) in known.tried(tables.OURS)
  assert known.done() == known.total == len(found)
  assert "± 0.0" not in report.grid(known)
  assert report.grid(known).count("3 seeds") == 2


def test_a_point_with_all_seeds_remains_a_contender():
  """Even if its first seed alone is far from the best."""
  known, _ = finished(METHODS._replace(groups=((tables.OURS,),)))
  far = (8e-3, 0.5)
  assert far not in known.contenders(tables.OURS)
  for seed in (0, 1, 2):
    run = known.run(tables.OURS, far, seed)
    known.records[run.key] = fake(run, 4.1 if seed == 0 else 3.9)
  assert known.contenders(tables.OURS)[0] == (4e-3, 0.5)
  assert known.chosen(tables.OURS) == far
  wanted = known.search(tables.OURS)[1]
  assert wanted == [(1.6e-2, 0.5)]  # a neighbor of the chosen point


def test_a_fixed_point_is_not_searched():
  variant = tables.OURS._replace(at=(4e-3, 0.5))
  table = METHODS._replace(groups=((variant,),))
  known, order = finished(table)
  assert [(*point_of(run), run.seed) for run in order] == [
    (4e-3, 0.5, seed) for seed in table.seeds
  ]
  assert known.total == known.done() == 3 and known.complete(variant)
  assert "not measured yet" in report.table(
    plan.Plan(table, 1000, "speeches", {})
  )


def test_groups_are_finished_one_after_the_other():
  _, order = finished(METHODS)
  done = 0
  for group in METHODS.groups:
    part = order[done : done + 10 * len(group)]
    assert [run.variant for run in part[: len(group)]] == list(group)
    assert {run.variant for run in part} == set(group)
    assert {run.seed for run in part} == {0, 1, 2}
    done += len(part)


def test_nothing_is_selected_by_the_test_text():
  found, order = finished(tables.METHODS._replace(groups=METHODS.groups))
  before = found.chosen(tables.BASELINE)
  for run in order:  # every other point has a better test loss
    worst = -loss_of(run) if point_of(run) != before else 99.0
    found.records[run.key]["test_loss"] = worst
  assert found.chosen(tables.BASELINE) == before


def test_a_diverged_run_is_not_chosen_and_is_reported():
  found, _ = finished(tables.QUICK)
  variant = tables.BASELINE
  best = found.chosen(variant)
  run = found.run(variant, best, 0)
  found.records[run.key] = fake(run, 0.0, status="diverged") | {
    "validation_loss": None
  }
  assert found.chosen(variant) not in (None, best)
  assert "diverged" in report.grid(found)
