"""When matrices are refreshed under the adaptive policy, against a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import Adaptive, Refresh, galore, q_galore_adamw_8bit
from galore_optax.subspace import adaptive

GAP = 4


def model(rule, gap, index, count, similar, steps):
  """The steps at which a matrix is refreshed.

  Args:
    rule: The rule.
    gap: First gap.
    index: Number of the matrix.
    count: Number of matrices.
    similar: From the number of a refresh to its similarity, None if the
      gradient was zero.
    steps: Number of steps.
  """
  found, similarities, due, wait = [], [0.0] * rule.window, 0, gap
  for step in range(steps):
    if step != due:
      continue
    found.append(step)
    if step == 0:
      due = index * gap // count or gap
      continue
    value = similar(len(found) - 1)
    if value is not None:
      similarities = [*similarities[1:], value]
      settled = np.mean(similarities) >= rule.threshold
      if len(found) > rule.window and settled:
        wait = min(int(wait * rule.growth), int(rule.limit * gap))
    due = step + wait
  return found


@functools.partial(jax.jit, static_argnames=("rule", "steps"))
def simulate(rule, gap, index, count, similar, valid, steps):
  """Whether one matrix is refreshed, step by step."""
  number = adaptive.Number(index, count)

  def step(state, now):
    due = state.due(now)[0]
    flat = jax.tree.map(lambda x: x[0], state)
    i = flat.refreshes
    new = flat.refreshed(rule, now, number, gap, similar[i], valid[i])
    new = jax.tree.map(lambda x: x[None], new)
    return jax.tree.map(lambda x, y: jnp.where(due, x, y), new, state), due

  return jax.lax.scan(step, adaptive.start((1,), rule), jnp.arange(steps))


PATTERNS = {
  "stable": lambda i: 1.0,
  "never": lambda i: 0.1,
  "from the tenth on": lambda i: 0.9 if i >= 10 else 0.0,
  "alternating": lambda i: 0.3 + 0.4 * (i % 2),
  "a gradient of zero": lambda i: None,
  "sometimes zero": lambda i: None if i % 3 == 0 else 0.8,
}
RULES = [
  Adaptive(),
  Adaptive(window=3, growth=3.0, limit=5.0, threshold=0.55),
  Adaptive(window=1, growth=1.5, limit=4.0),
  Adaptive(growth=1.0),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_sequence_of_refreshes(rule):
  for name, similar in PATTERNS.items():
    values = [similar(i) for i in range(60)]
    valid = jnp.asarray([x is not None for x in values])
    numbers = jnp.asarray([1.0 if x is None else x for x in values])
    for index, count in ((0, 1), (2, 3), (7, 9)):
      _, due = simulate(rule, 5, index, count, numbers, valid, 200)
      wanted = model(rule, 5, index, count, similar, 200)
      assert np.flatnonzero(due).tolist() == wanted, (name, index)


def test_published_schedule():
  """A stable matrix in 20,000 steps: 11 refreshes instead of 100."""
  found = model(Adaptive(limit=1e9), 200, 0, 1, PATTERNS["stable"], 20_000)
  assert found[:7] == [0, 200, 400, 600, 800, 1000, 1400]
  assert len(found) == 11
  capped = model(Adaptive(), 200, 0, 1, PATTERNS["stable"], 20_000)
  assert np.diff(capped).max() == 16 * 200


def test_gaps_stay_in_the_range_of_counters():
  rule = Adaptive(window=1, growth=100.0, limit=1e6)
  ones = jnp.ones(60), jnp.ones(60, bool)
  for gap, index, count in ((10**9, 30, 40), (4, 0, 1), (10**9, 0, 1)):
    state, due = simulate(rule, gap, index, count, *ones, 40)
    assert state.due_at[0] > 0 and state.gap[0] > 0
    assert np.all(np.flatnonzero(due)[1:] >= min(gap, 2**29) * index // count)


SHAPES = {"stable": (2, 8, 12), "wild": (32, 40), "zero": (8, 12)}


def gradients(step):
  """One leaf whose subspace stays, one whose jumps, and one of zeros."""
  key = jax.random.key(0)
  low = jax.random.normal(key, (2, 8, 2)) @ jax.random.normal(key, (2, 2, 12))
  now = jax.random.fold_in(key, step)
  wild = jax.random.normal(now, (32, 2)) @ jax.random.normal(now, (2, 40))
  noise = 1e-3 * jax.random.normal(now, (2, 8, 12))
  return {"stable": low + noise, "wild": wild, "zero": jnp.zeros((8, 12))}


RULE = Adaptive(window=2, limit=4.0)
REFRESH = Refresh(adaptive=RULE)


def tx(finder, **options):
  refresh = Refresh(policy="adaptive", finder=finder, adaptive=RULE)
  settings = {"rank": 2, "update_proj_gap": GAP, "refresh": refresh}
  return galore(optax.sgd(1.0), **settings, **options)


def counts(state):
  """Refreshes so far: two stable matrices, a wild and a zero one."""
  return jnp.concatenate(
    [state.schedule[name].refreshes.reshape(-1) for name in SHAPES]
  )


@functools.cache
def stepper(finder="subspace", basis_dtype="float32"):
  optimizer = tx(finder, basis_dtype=basis_dtype)

  def step(state, now):
    grads = gradients(now)
    _, state = optimizer.update(grads, state)
    return state, counts(state)

  params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
  run = lambda state, steps: jax.lax.scan(step, state, steps)
  return optimizer.init(params), jax.jit(run)


def refresh_steps(found):
  """Per matrix the steps at which its count rises, and that by one."""
  rises = np.diff(np.concatenate([np.zeros((1, 4), int), found]), axis=0)
  assert set(np.unique(rises)) <= {0, 1}
  return [np.flatnonzero(column).tolist() for column in rises.T], rises


@pytest.mark.parametrize(
  ("finder", "basis_dtype"), [("subspace", "float32"), ("svd", "int4")]
)
def test_leaves_are_refreshed_as_the_model_says(finder, basis_dtype):
  start, run = stepper(finder, basis_dtype)
  _, found = run(start, jnp.arange(100))
  steps, rises = refresh_steps(found)
  kinds = ["stable", "stable", "never", "a gradient of zero"]
  for i, kind in enumerate(kinds):
    assert steps[i] == model(RULE, GAP, i, 4, PATTERNS[kind], 100), kind
  # As many matrices as steps of the gap: one at a time, after the first.
  assert rises[0].sum() == 4
  assert rises[1:].sum(1).max() == 1


def test_a_saved_state_goes_on_as_it_would_have():
  start, run = stepper()
  _, whole = run(start, jnp.arange(100))
  middle, first = run(start, jnp.arange(50))
  saved = jax.tree.map(np.array, middle)
  _, rest = run(saved, jnp.arange(50, 100))
  np.testing.assert_array_equal(np.concatenate([first, rest]), whole)


def test_a_gap_of_the_users_is_that_of_the_rule():
  """Traced gaps, as by `inject_hyperparams`, and the paper's preset."""
  make = optax.inject_hyperparams(q_galore_adamw_8bit)
  optimizer = make(1e-2, rank=2, update_proj_gap=GAP, refresh=REFRESH)
  params = {"wild": jnp.zeros((32, 40))}
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  found = []
  for now in range(14):
    grads = {"wild": gradients(now)["wild"]}
    _, state = update(grads, state, params)
    found.append(int(state.inner_state.schedule["wild"].refreshes[()]))
  assert np.flatnonzero(np.diff([0, *found])).tolist() == [0, 4, 8, 12]


def test_fewer_refreshes_on_a_training():
  """And hardly a worse loss, on a regression whose gradient is low-rank."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(64, 24)), jnp.float32)
  target = jnp.asarray(
    rng.normal(size=(24, 3)) @ rng.normal(size=(3, 32)), jnp.float32
  )

  def train(optimizer):
    loss = lambda w: jnp.mean((jnp.tanh(x @ w) - jnp.tanh(x @ target)) ** 2)

    def step(carry, _):
      w, state = carry
      value, grad = jax.value_and_grad(loss)(w)
      updates, new = optimizer.update(grad, state, w)
      changed = jnp.any(
        new.projector["param"]["left"] != state.projector["param"]["left"]
      )
      return (w + updates, new), (value, changed)

    w = jnp.zeros((24, 32))
    carry = (w, optimizer.init(w))
    return jax.jit(lambda c: jax.lax.scan(step, c, length=120))(carry)

  settings = {"rank": 4, "update_proj_gap": 5}
  _, (losses, changed) = train(galore(optax.adam(0.05), **settings))
  (_, state), (ours, ours_changed) = train(
    galore(optax.adam(0.05), refresh="adaptive", **settings)
  )
  assert changed.sum() == 24
  assert ours_changed.sum() == state.schedule["param"].refreshes < 15
  assert losses[-1] < 0.3 * losses[0]
  assert ours[-1] < 1.3 * losses[-1]


@pytest.mark.parametrize(
  ("options", "error", "message"),
  [
    ({"threshold": 0}, ValueError, r"`threshold` must be positive, got 0"),
    ({"window": -1}, ValueError, r"`window` must be positive, got -1"),
    ({"growth": 0.5}, ValueError, r"`growth` must be at least 1, got 0\.5"),
    ({"limit": 0}, ValueError, r"`limit` must be at least 1, got 0"),
    ({"limit": "2"}, TypeError, r"`limit` must be a number, got '2'"),
    ({"window": 2.5}, TypeError, r"`window` must be an int, got 2\.5"),
    ({"measure": "cos"}, ValueError, r"`measure`.*Did you mean 'cosine'"),
  ],
)
def test_errors(options, error, message):
  with pytest.raises(error, match=message):
    Adaptive(**options)


@pytest.mark.parametrize(
  ("options", "error", "message"),
  [
    ({"adaptive": Adaptive()}, ValueError, r'for policy="adaptive", got'),
    ({"adaptive": 0.4, "policy": "adaptive"}, TypeError, r"got 0\.4"),
    ({"adaptive": Adaptive(measure="cosine"), "policy": "adaptive"},
     ValueError, r'finder="svd".*measure="overlap"'),
  ],
)  # fmt: skip
def test_errors_of_galore(options, error, message):
  with pytest.raises(error, match=message):
    galore(optax.adam(1.0), refresh=Refresh(**options))
