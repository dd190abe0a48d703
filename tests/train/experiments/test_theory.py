"""The setting of GaLore's theory."""

import numpy as np
import pytest

from train.experiments import (
  theory,
)


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
  expected = [ranks[0], ranks[1], ranks[20]]
  np.testing.assert_allclose(found["stable_rank"][:3], expected, rtol=1e-6)
  pairs = zip(found["stable_rank"], found["bound"], strict=True)
  assert all(rank <= bound * (1 + 1e-9) for rank, bound in pairs)
  assert found["stable_rank"][-1] == pytest.approx(found["limit"][0])
  assert found["limit"][0] < 0.7 * expected[0]
