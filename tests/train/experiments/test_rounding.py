"""What rounding does to Adam's moments."""

from train.experiments import rounding


def test_only_random_rounding_lets_the_second_moment_decay():
  found = {
    name: rounding.follow("constant", name, steps=3000, numbers=256)
    for name in ("to the nearest", "at random")
  }
  assert abs(found["at random"].mean) < 0.01
  assert found["at random"].error < 0.01
  assert found["to the nearest"].mean < -0.5
  assert found["to the nearest"].error > 0.4
  table = rounding.render(list(found.values()))
  assert "| constant | at random | 1.000 |" in table
