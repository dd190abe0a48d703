"""Figures, from made-up records."""

import numpy as np

from tests.train.experiments.fakes import METHODS, finished
from train.experiments import figures


def test_a_curve_is_the_mean_over_seeds_and_a_stretch():
  steps = range(10, 1001, 10)
  records = [
    {
      "tokens": 2_000_000,
      "steps": 1000,
      "curve": [[x, x / 100 + seed] for x in steps],
    }
    for seed in (0, 2)
  ]
  tokens, losses = figures._mean_curve(records)
  # A hundred points, two of which are averaged: the first ends at step 20.
  assert len(tokens) == 99 and tokens[0] == 0.04 and tokens[-1] == 2.0
  np.testing.assert_allclose(losses[[0, -1]], [1.15, 10.95])


def test_at_length_curves_and_step_times_are_drawn(tmp_path, monkeypatch):
  known, _ = finished(METHODS._replace(other="speeches"))
  names = [name for name, _ in figures.names(known)]
  assert [name.endswith("-curves.png") for name in names] == [False, True]
  drawn = []
  draw_costs = figures._draw_costs

  def recorded(plan, chosen, axis, cost, label):
    drawn.append((label, [cost(*pair) for pair in chosen]))
    draw_costs(plan, chosen, axis, cost, label)

  monkeypatch.setattr(figures, "_draw_costs", recorded)
  times = {variant.name: 1.0 + i for i, variant in enumerate(METHODS.variants)}
  figures.draw(known, tmp_path, times)
  assert sorted(x.name for x in tmp_path.iterdir()) == sorted(names)
  (_, sizes), (label, seconds) = drawn
  first = METHODS.variants[0].label
  assert label == f"step time / {first}'s"
  assert len(sizes) == len(seconds) and seconds == list(times.values())
