"""The transformation: spellings, inner optimizers, and what it never does."""

import functools
import re
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  Projection,
  Refresh,
  chain,
  describe,
  galore,
  galore_adamw,
  galore_sgd,
  state_bytes,
)
from galore_optax.subspace import moments as moments_lib
from galore_optax.subspace import projection
from galore_optax.tree import paths, plan
from tests.marks import slow, with_slow

RATE = optax.linear_schedule(1e-2, 1e-3, 20)
SHAPES = {
  "layers": (3, 16, 24),
  "w": (24, 16),
  "embed": (40, 16),
  "bias": (16,),
}


def normal(shapes, seed):
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray(rng.normal(size=shape), jnp.float32)
    for name, shape in sorted(shapes.items())
  }


def run(tx, params, steps, seed=1):
  """Parameters, updates and state after `steps` steps on random gradients."""
  state, update = tx.init(params), jax.jit(tx.update)
  updates = None
  for step in range(steps):
    grads = normal({k: x.shape for k, x in params.items()}, seed + step)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params, updates, state


SPELLINGS = {
  "chain": lambda: chain(
    optax.clip_by_global_norm(1e9),
    galore(rank=4),
    optax.adamw(RATE, weight_decay=0.1),
  ),
  "wrapper": lambda: galore(optax.adamw(RATE, weight_decay=0.1), rank=4),
  "optax.chain": lambda: optax.chain(
    galore(optax.scale_by_adam(), rank=4),
    optax.add_decayed_weights(0.1),
    optax.scale_by_learning_rate(RATE),
  ),
  "alias": lambda: galore_adamw(RATE, weight_decay=0.1, rank=4),
  "marker": lambda: galore(rank=4)(optax.adamw(RATE, weight_decay=0.1)),
  "split chain": lambda: chain(
    galore(rank=4),
    optax.scale_by_adam(),
    optax.add_decayed_weights(0.1),
    optax.scale_by_learning_rate(RATE),
  ),
}


@pytest.fixture(scope="module")
def by_spelling():
  params = normal(SHAPES, 0)
  return {name: run(make(), params, 4) for name, make in SPELLINGS.items()}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_are_one_optimizer(by_spelling, name):
  params, _, state = by_spelling[name]
  expected, _, expected_state = by_spelling["alias"]
  assert state_bytes(state) == state_bytes(expected_state)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), params, expected
  )


def test_literal_optax_chain_trains_and_warns_at_init_only():
  tx = optax.chain(galore(rank=4), optax.adam(1e-2))
  params = normal(SHAPES, 0)
  with pytest.warns(UserWarning, match=r"full-size.*galore_optax\.chain"):
    state = tx.init(params)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    grads = jax.tree.map(lambda x: x, params)  # of 0.5 * |x|^2
    updates, state = jax.jit(tx.update)(grads, state, params)
    jax.eval_shape(optax.chain(galore(optax.adam(1.0), rank=4)).init, params)
    chain(galore(rank=4), optax.adam(1e-2)).init(params)
  after = optax.apply_updates(params, updates)
  assert all(
    jnp.sum(after[name] ** 2) < jnp.sum(params[name] ** 2) for name in params
  )
  # The moments are full-size, as the warning says.
  assert state_bytes(state) > state_bytes(optax.adam(1e-2).init(params))


def test_chain_without_a_marker_is_optax_chain():
  parts = optax.scale(2.0), optax.scale_by_adam()
  params = normal(SHAPES, 0)
  ours, _, _ = run(chain(*parts), params, 2)
  theirs, _, _ = run(optax.chain(*parts), params, 2)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_marker_with_nothing_after_it_filters():
  params = normal({"w": (16, 24)}, 0)
  with pytest.warns(UserWarning, match="only filters gradients"):
    _, updates, state = run(chain(galore(rank=4, scale=1.0)), params, 1)
  basis = state[0].projector["w"]["left"]
  grad = normal({"w": (16, 24)}, 1)["w"]
  np.testing.assert_allclose(updates["w"], basis @ (basis.T @ grad), atol=1e-5)


INNERS = {
  "adamw": optax.adamw(RATE, weight_decay=0.1),
  "adamw, mask tree": optax.adamw(
    RATE,
    weight_decay=0.1,
    mask={"layers": True, "w": False, "embed": False, "bias": True},
  ),
  "adamw, mask function": optax.adamw(
    RATE,
    weight_decay=0.1,
    mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
  ),
  "lion": optax.lion(RATE, weight_decay=0.1),
  "inject": optax.inject_hyperparams(optax.adamw)(
    learning_rate=RATE, weight_decay=0.1
  ),
  "clip + nadamw": optax.chain(
    optax.clip_by_global_norm(0.5), optax.nadamw(1e-2, weight_decay=0.1)
  ),
  "multi steps": optax.MultiSteps(
    optax.adamw(1e-2, weight_decay=0.1), 2
  ).gradient_transformation(),
  "partition": optax.partition(
    {"a": optax.adamw(1e-2, weight_decay=0.1), "b": optax.sgd(0.1)},
    {"layers": "a", "w": "a", "embed": "b", "bias": "b"},
  ),
}


@pytest.mark.parametrize(
  "name", with_slow(INNERS, "adamw, mask tree", "partition")
)
def test_decoupled_decay_acts_on_the_full_weights(name):
  """The update is that of weights 0 plus what the inner adds for weights."""
  inner, params = optax.with_extra_args_support(INNERS[name]), normal(SHAPES, 0)
  tx = galore(inner, rank=4, scale=0.5)
  zeros = jax.tree.map(jnp.zeros_like, params)
  state, plain = tx.init(params), inner.init(params)
  update, plain_update = jax.jit(tx.update), jax.jit(inner.update)
  for step in range(3):
    grads = normal(SHAPES, step)
    with_weights, new_state = update(grads, state, params)
    without, _ = update(grads, state, zeros)
    full, new_plain = plain_update(grads, plain, params)
    full_without, _ = plain_update(grads, plain, zeros)
    state, plain = new_state, new_plain
    for leaf in params:
      np.testing.assert_allclose(
        with_weights[leaf] - without[leaf],
        full[leaf] - full_without[leaf],
        atol=1e-6,
      )


def test_full_rank_leaves_are_the_inner_optimizers():
  params = normal(SHAPES, 0)
  ours, _, _ = run(
    galore(optax.adamw(RATE, weight_decay=0.1), rank=4), params, 4
  )
  theirs, _, _ = run(optax.adamw(RATE, weight_decay=0.1), params, 4)
  for leaf in ("embed", "bias"):
    np.testing.assert_allclose(ours[leaf], theirs[leaf], atol=1e-7)


def test_project_mode_hands_over_projected_weights():
  params = normal({"w": (16, 24)}, 0)
  inner = optax.chain(optax.scale(0.0), optax.add_decayed_weights(1.0))
  tx = galore(inner, rank=4, scale=1.0, params_mode="project")
  _, updates, state = run(tx, params, 1)
  basis = state.projector["w"]["left"]
  np.testing.assert_allclose(
    updates["w"], basis @ (basis.T @ params["w"]), atol=1e-5
  )


def test_stacked_layers_are_separate_matrices():
  stacked = normal({"w": (3, 16, 24)}, 0)
  unstacked = {f"w{i}": stacked["w"][i] for i in range(3)}
  refresh = Refresh(policy="synchronous", finder="svd")
  one = galore(optax.adamw(1e-2), rank=4, update_proj_gap=2, refresh=refresh)
  state, states = one.init(stacked), one.init(unstacked)
  for step in range(4):
    grads = normal({"w": (3, 16, 24)}, step)
    u, state = jax.jit(one.update)(grads, state, stacked)
    each = {f"w{i}": grads["w"][i] for i in range(3)}
    v, states = jax.jit(one.update)(each, states, unstacked)
    for i in range(3):
      np.testing.assert_allclose(u["w"][i], v[f"w{i}"], atol=1e-7)


def test_full_rank_identity_is_the_identity():
  params = normal({"w": (16, 24), "v": (24, 16)}, 0)
  for finder in ("subspace", "svd"):
    tx = galore(
      optax.identity(),
      rank=16,
      scale=1.0,
      proj_type="std",
      refresh=Refresh(finder=finder),
      rules=[(".", Projection())],
    )
    _, updates, _ = run(tx, params, 3)
    grads = normal({"w": (16, 24), "v": (24, 16)}, 3)
    for leaf in params:
      np.testing.assert_allclose(updates[leaf], grads[leaf], atol=2e-5)


def test_update_is_linear_in_scale():
  params = normal({"w": (16, 24)}, 0)
  one, two = (
    run(galore(optax.adam(1e-2), rank=4, scale=s), params, 1)[1]["w"]
    for s in (0.25, 1.0)
  )
  np.testing.assert_allclose(4 * one, two, rtol=1e-5)


def capture_share(tx, grad, steps=20):
  """Share of the update's energy in the gradient's own column space."""
  params = {"w": jnp.zeros_like(grad)}
  state, update = tx.init(params), jax.jit(tx.update)
  for _ in range(steps):
    updates, state = update({"w": grad}, state)
  u, s, _ = np.linalg.svd(np.asarray(grad))
  own = u[:, s > 1e-4 * s[0]]
  update = np.asarray(updates["w"])
  return np.sum((own.T @ update) ** 2) / np.sum(update**2)


@pytest.mark.parametrize("true_rank", [1, slow(4)])
def test_null_directions_are_not_blown_up(true_rank):
  rng = np.random.default_rng(0)
  grad = jnp.ones((100, 100))
  if true_rank > 1:
    grad = rng.normal(size=(100, true_rank)) @ rng.normal(size=(true_rank, 100))
  grad = jnp.asarray(grad, jnp.float32)
  adam = optax.scale_by_adam()
  assert capture_share(galore(adam, rank=16), grad) > 0.9999
  # What the paper's algorithm does there, for comparison.
  assert capture_share(galore(adam, rank=16, faithful=True), grad) < 0.5


BAD = {
  "zero": lambda g: 0 * g,
  "nan entry": lambda g: g.at[0].set(jnp.nan),
  "inf entry": lambda g: g.at[-1].set(jnp.inf),
  "all nan": lambda g: jnp.nan * g,
  "rank one": lambda g: jnp.ones_like(g),
}


@pytest.mark.parametrize("refresh", ["staggered", "synchronous"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("when", [0, 1, 2])
def test_bad_gradients_neither_poison_nor_freeze(bad, when, refresh):
  tx = galore_adamw(1e-2, rank=4, update_proj_gap=2, refresh=refresh)
  shapes = {"w": (16, 24), "stack": (2, 16, 24), "bias": (16,)}
  params, lasting = normal(shapes, 0), normal(shapes, 1)
  lasting = {k: x[..., :1] * jnp.ones_like(x) for k, x in lasting.items()}
  state, update = tx.init(params), _UPDATES[refresh]
  for step in range(6):
    noise = normal(shapes, 10 + step)
    grads = jax.tree.map(lambda x, y: x + 0.1 * y, lasting, noise)
    if step == when:
      grads = jax.tree.map(BAD[bad], grads)
    updates, state = update(grads, state, params)
    for x in jax.tree.leaves((updates, state)):
      assert np.isfinite(x).all(), f"step {step}"
  for basis in jax.tree.leaves(state.projector):
    gram = np.einsum("...mr,...ms->...rs", basis, basis)
    np.testing.assert_allclose(
      gram, np.broadcast_to(np.eye(4), gram.shape), atol=1e-5
    )
  for path, bases in state.projector.items():
    # The subspace follows the gradients again.
    low = np.einsum("...mr,...mn->...rn", bases["left"], grads[path])
    assert np.sum(low**2) > 0.9 * np.sum(np.square(grads[path]))
  assert all(jnp.linalg.norm(x) > 0 for x in jax.tree.leaves(updates))


_UPDATES = {
  refresh: jax.jit(
    galore_adamw(1e-2, rank=4, update_proj_gap=2, refresh=refresh).update
  )
  for refresh in ("staggered", "synchronous")
}


def refreshed(refresh, gap, steps, layers=5):
  """The steps at which each matrix's basis changes."""
  tx = galore(optax.sgd(1.0), rank=2, update_proj_gap=gap, refresh=refresh)
  shapes = {"stack": (layers - 1, 8, 12), "w": (8, 12)}
  params = normal(shapes, 0)
  state, update = tx.init(params), jax.jit(tx.update)
  bases = lambda s: np.concatenate(
    [s.projector["stack"]["left"], s.projector["w"]["left"][None]]
  )
  changes = [[] for _ in range(layers)]
  for step in range(steps):
    old = bases(state)
    _, state = update(normal(shapes, step), state, params)
    for i in np.flatnonzero(np.any(old != bases(state), axis=(1, 2))):
      changes[i].append(step)
  return changes


def test_synchronous_refresh_comes_for_all_at_once():
  assert refreshed("synchronous", 4, 10) == [[0, 4, 8]] * 5


def test_staggered_refresh_comes_for_one_at_a_time():
  changes = refreshed("staggered", 10, 22)
  assert changes == [[0, *range(2 * i or 10, 22, 10)] for i in range(5)]


def test_staggered_refresh_with_more_matrices_than_steps():
  changes = refreshed("staggered", 2, 7)
  assert all(steps[0] == 0 for steps in changes)
  for i, steps in enumerate(changes):
    assert {step % 2 for step in steps if step} == {i * 2 // 5}


def two_steps(tx):
  """The gradients of two steps, and the states after them."""
  params = normal({"w": (16, 24)}, 0)
  state, update = tx.init(params), jax.jit(tx.update)
  grads = [normal({"w": (16, 24)}, i)["w"] for i in range(2)]
  states = []
  for grad in grads:
    _, state = update({"w": grad}, state, params)
    states.append(state)
  return grads, states


@pytest.mark.parametrize("moments", ["rotate", "keep", "reset"])
def test_moments_at_a_refresh(moments):
  refresh = Refresh(moments=moments)
  tx = galore_sgd(1.0, 0.5, rank=4, update_proj_gap=1, refresh=refresh)
  grads, (first, second) = two_steps(tx)
  old, new = (s.projector["w"]["left"] for s in (first, second))
  before = optax.tree.get(first, "trace").low["w"]
  after = optax.tree.get(second, "trace").low["w"]
  carried = {
    "rotate": new.T @ old @ before,
    "keep": before,
    "reset": 0 * before,
  }[moments]
  np.testing.assert_allclose(after, new.T @ grads[1] + 0.5 * carried, atol=1e-4)


FAMILIES = {
  "adam": (optax.adam(1.0), {"mu": 1, "nu": 2}),
  "adan": (optax.adan(1.0), {"m": 1, "v": 1, "g": 1, "n": 2}),
  "sm3": (optax.sm3(1.0), {"nu": 1}),
  "ademamix": (optax.contrib.ademamix(1.0), {"m1": 1, "m2": 1, "nu": 2}),
  "simplified": (
    optax.contrib.simplified_ademamix(1.0),
    {"m": 1, "n": 2},
  ),
  "adadelta": (optax.adadelta(1.0), {"e_g": 2, "e_x": 2}),
  "optimistic": (
    optax.optimistic_gradient_descent(1.0),
    {"previous_gradient": 1},
  ),
  "every": (optax.apply_every(3), {"grad_acc": 1}),
  "steps": (
    optax.MultiSteps(optax.adam(1.0), 4).gradient_transformation(),
    {"mu": 1, "nu": 2, "acc_grads": 1},
  ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_moments_are_known_by_their_state_and_name(name):
  """Adan's v is linear in the gradient, and so is SM3's nu."""
  inner, wanted = FAMILIES[name]
  state = galore(inner, rank=2).init({"w": jnp.ones((8, 12))})
  found = moments_lib.find_moments(state.inner_state)
  degrees = {
    name.rpartition(".")[2]: degree for name, (degree, _) in found.items()
  }
  assert degrees == wanted


@pytest.mark.parametrize("moments", ["rotate", "keep", "reset"])
def test_gradients_that_are_added_up_go_to_the_new_basis(moments):
  """They are not moments: they are summed for a step still to come."""
  inner = optax.MultiSteps(optax.sgd(1.0), 4).gradient_transformation()
  refresh = Refresh(moments=moments)
  tx = galore(inner, rank=4, update_proj_gap=1, refresh=refresh, scale=1.0)
  grads, (first, second) = two_steps(tx)
  old, new = (s.projector["w"]["left"] for s in (first, second))
  sums = [optax.tree.get(s, "acc_grads").low["w"] for s in (first, second)]
  carried = new.T @ old @ sums[0]
  wanted = (carried + new.T @ grads[1]) / 2  # MultiSteps keeps the mean
  np.testing.assert_allclose(sums[1], wanted, atol=1e-4)


def test_what_waits_for_a_later_step_is_as_without_galore():
  """At full rank, where nothing is lost, with another basis every step."""
  inner, params = (
    optax.chain(optax.trace(0.9), optax.apply_every(2)),
    {"w": jnp.zeros((4, 9))},
  )
  tx = galore(
    inner, rank=4, update_proj_gap=1, scale=1.0, rules=[("w", Projection())]
  )
  state, plain, update = tx.init(params), inner.init(params), jax.jit(tx.update)
  for i in range(4):
    grads = normal({"w": (4, 9)}, i)
    found, state = update(grads, state, params)
    wanted, plain = inner.update(grads, plain, params)
    np.testing.assert_allclose(found["w"], wanted["w"], atol=1e-4)


class Velocity(NamedTuple):
  """A state whose field is no second moment, though Adafactor has one so."""

  v: Any


def test_a_name_that_one_state_has_is_not_looked_for_in_others():
  inner = optax.GradientTransformation(
    lambda params: Velocity(optax.tree.zeros_like(params)),
    lambda updates, state, params=None: (updates, state),
  )
  state = galore(inner, rank=2).init({"w": jnp.ones((8, 12))})
  assert moments_lib.find_moments(state.inner_state) == {}


@pytest.mark.parametrize(("decays", "wanted"), [((0.1, 0), 0.1), ((0, 0.1), 0)])
def test_an_optimizer_that_goes_by_axes_decays_what_it_optimizes(
  decays, wanted
):
  """A kernel of three axes that is read as a matrix is Muon's, not Adam's."""
  params = {"k": jnp.ones((8, 2, 6))}
  inner = optax.contrib.muon(
    1.0, weight_decay=decays[0], adam_weight_decay=decays[1]
  )
  rules = [("k", Projection(rows=0, cols=(1, 2)))]
  tx = galore(inner, rank=2, rules=rules)
  zeros = optax.tree.zeros_like(params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  np.testing.assert_allclose(updates["k"], jnp.full((8, 2, 6), -wanted))


def test_phases_do_not_depend_on_how_the_state_is_sorted():
  params = [jnp.ones((8, 12))] * 12
  state = galore(optax.sgd(1.0), rank=2).init(params)
  leaves = paths.leaves_by_path(params)
  numbered = plan.Plan((), Projection(update_proj_gap=12, scale=1.0))
  sequences = [
    list(
      numbered.sites_from_bases(
        leaves, projection.basis_shapes(found.projector)
      )
    )
    for found in (state, jax.tree.map(lambda x: x, state))
  ]
  assert sequences[0] == sequences[1] == sorted(leaves)


def test_a_projection_too_large_for_float16_counts_as_zero():
  params = {"w": jnp.zeros((64, 96))}
  tx = galore(optax.sgd(1e-3, 0.9), rank=4, state_dtype="float16")
  grads = {"w": jnp.full((64, 96), 1e4)}
  updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


def test_describe_adds_up():
  params = normal(SHAPES, 0)
  for tx in (
    SPELLINGS["chain"](),
    optax.adamw(1e-3),
    optax.inject_hyperparams(galore_adamw, static_args="rank")(
      learning_rate=1e-3, rank=4
    ),
  ):
    table = describe(tx, params)
    assert table.total_bytes == state_bytes(tx.init(params))
    counters = table.total_bytes - sum(row.state_bytes for row in table.rows)
    assert 0 < counters < 64
    text = str(table)
    assert all(name in text for name in SHAPES)
  rows = {row.path: row for row in describe(SPELLINGS["alias"](), params).rows}
  assert rows["layers"].rank == 4
  assert rows["layers"].state_bytes == 3 * 4 * (16 * 4 + 2 * 4 * 24)
  assert rows["layers"].matrix == "3 x (16, 24)"
  assert rows["w"].side == "right"
  assert rows["embed"].rank is None


def test_donated_states_are_updated_in_place():
  """Neither moments nor bases are copied to get past a refresh's branches."""
  shapes = {"single": (64, 96), "stack": (3, 64, 96), "tall": (96, 64)}
  params = normal(shapes, 0)
  tx = galore_adamw(1e-2, rank=8)

  def step(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return state, optax.apply_updates(params, updates)

  given = (params, tx.init(params), params)
  program = jax.jit(step, donate_argnums=(1, 2)).lower(*given).compile()
  entry = program.as_text().split("\nENTRY")[1]
  copied = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", entry)
  shapes = {",".join(map(str, x.shape)) for x in jax.tree.leaves(given)}
  assert "8,96" in shapes and not shapes & set(copied)


def test_updates_do_not_pile_up():
  """A leaf's update is added before the next leaf's is lifted."""
  params = normal({f"w{i}": (64, 96) for i in range(12)}, 0)
  tx = galore(optax.adam(1e-2), rank=8)

  @functools.partial(jax.jit, donate_argnums=(1, 2))
  def step(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return state, optax.apply_updates(params, updates)

  given = (params, tx.init(params), params)
  temporaries = step.lower(*given).compile().memory_analysis()
  matrix = 4 * 64 * 96
  assert temporaries.temp_size_in_bytes < 4 * matrix  # all are 12


def test_refreshes_of_their_own_are_those_that_are_shared():
  """Also where a wide and a tall leaf, and stacks, share one."""
  shapes = {"wide": (8, 24), "tall": (24, 8), "stack": (3, 8, 16)}
  params = normal(shapes, 0)
  found = []
  for share in (True, False):
    tx = galore(
      optax.adam(1e-2), rank=2, update_proj_gap=3, refresh=Refresh(share=share)
    )
    update, state = jax.jit(tx.update), tx.init(params)
    for step in range(5):
      updates, state = update(normal(shapes, step), state, params)
    found.append(updates)
  for path in shapes:
    np.testing.assert_allclose(found[0][path], found[1][path], atol=1e-6)
