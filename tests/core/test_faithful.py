"""The faithful preset follows the papers' algorithm."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import Projection, Refresh, chain, galore, galore_adamw
from tests.core import reference

GAP = 5
STEPS = 4 * GAP + 3  # refreshes at 0, 5, 10, 15, 20


def gradients(shape, steps, seed=0):
  """Gradients whose singular vectors change slowly, as float32."""
  rng = np.random.default_rng(seed)
  short = min(shape)
  spectrum = 2.0 ** -np.arange(short)
  start = rng.normal(size=(shape[0], short)), rng.normal(size=(short, shape[1]))
  for _ in range(steps):
    start = tuple(x + 0.2 * rng.normal(size=x.shape) for x in start)
    u, v = np.linalg.qr(start[0])[0], np.linalg.qr(start[1].T)[0]
    yield np.float32((u * spectrum) @ v.T)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_follows_the_reference_over_five_refreshes(shape):
  rate, decay, alpha, rank = 1e-2, 0.1, 0.25, 4
  tx = galore_adamw(
    rate,
    weight_decay=decay,
    rank=rank,
    update_proj_gap=GAP,
    scale=alpha,
    faithful=True,
  )
  ours = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
  theirs = np.asarray(ours, np.float64)
  state = tx.init({"w": ours})
  update = jax.jit(tx.update)
  expected = reference.GaLoreAdamW(rank, GAP, alpha, rate, decay)
  for grad in gradients(shape, STEPS):
    updates, state = update({"w": grad}, state, {"w": ours})
    (basis,) = state.projector["w"].values()
    change = expected.update(theirs, grad, lambda _: np.asarray(basis))  # noqa: B023
    np.testing.assert_allclose(updates["w"], change, atol=1e-5 * rate)
    ours = optax.apply_updates({"w": ours}, updates)["w"]
    theirs = theirs + change
  assert expected.steps // GAP >= 4
  np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_square_matrices_are_projected_on_the_left():
  state = galore_adamw(1.0, rank=2, faithful=True).init({"w": jnp.ones((6, 6))})
  assert list(state.projector["w"]) == ["left"]


def test_refreshes_at_zero_and_every_gap_only():
  tx = galore(optax.sgd(1.0), rank=2, update_proj_gap=3, faithful=True)
  params = {"w": jnp.zeros((8, 12))}
  state, update, bases = tx.init(params), jax.jit(tx.update), []
  bases.append(state.projector["w"]["left"])
  for grad in gradients((8, 12), 8):
    _, state = update({"w": grad}, state, params)
    bases.append(state.projector["w"]["left"])
  changed = [
    step
    for step, (a, b) in enumerate(itertools.pairwise(bases))
    if not np.array_equal(a, b)
  ]
  assert changed == [0, 3, 6]


@pytest.mark.filterwarnings("ignore:galore projects none")
def test_projects_what_saves_nothing():
  params = {"w": jnp.ones((8, 8))}
  assert galore(optax.adam(1.0), rank=8, faithful=True).init(params).projector
  assert not galore(optax.adam(1.0), rank=8).init(params).projector


def test_is_one_switch():
  grads = list(gradients((8, 12), 7))
  results = []
  for options in (
    {"faithful": True},
    {"refresh": Refresh.paper()},
  ):
    tx = chain(galore(rank=2, update_proj_gap=3, **options), optax.adamw(1e-2))
    params = {"w": jnp.ones((8, 12))}
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in grads:
      updates, state = update({"w": grad}, state, params)
      params = optax.apply_updates(params, updates)
    results.append(params["w"])
  np.testing.assert_array_equal(*results)


def test_contradiction_is_refused():
  for field, wanted in (
    ({"moments": "reset"}, "moments='keep'"),
    ({"policy": "adaptive"}, "policy='synchronous'"),
    ({"finder": "random"}, "finder='svd'"),
    ({"null_tolerance": 0.1}, "null_tolerance=0.0"),
  ):
    with pytest.raises(ValueError, match=f"faithful=True.*{wanted}"):
      galore(optax.adam(1.0), faithful=True, refresh=Refresh(**field))


def test_sides_can_be_chosen_by_rule():
  params = {"q": jnp.ones((8, 8)), "k": jnp.ones((8, 8))}
  rules = [("q", Projection(proj_type="right"))]
  tx = galore(optax.adam(1.0), rank=2, rules=rules, faithful=True)
  sides = {path: list(b) for path, b in tx.init(params).projector.items()}
  assert sides == {"q": ["right"], "k": ["left"]}
