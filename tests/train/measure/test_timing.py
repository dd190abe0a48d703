"""Timing of functions in alternation."""

from train.measure import timing


def test_interleaving_keeps_to_its_budget():
  calls = []
  runs = {name: lambda name=name: calls.append(name) for name in "ab"}
  times = timing.interleave(runs, timing.Budget(most=3, least=1, limit=1e9))
  assert calls == ["a", "b"] * 4  # the first of each is not timed
  assert [len(x) for x in times.values()] == [3, 3]
  assert not timing.Budget(most=9, least=2, limit=1.0).asks([0.6, 0.6])
  assert timing.Budget(most=9, least=2, limit=1.0).asks([2.0])
