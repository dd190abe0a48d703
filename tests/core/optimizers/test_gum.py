"""GUM: against NumPy, without bias, deterministic, and as small as promised."""

import collections
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from galore_optax import (
  GumState,
  Layered,
  Projection,
  Refresh,
  find_bases,
  gum,
  layerwise,
  state_bytes,
  state_shardings,
  sumo,
)
from tests.core import small as small_lib
from tests.marks import slow

GAP, RANK, RATE, DECAY, MU, ALPHA = 3, 3, 1e-2, 0.1, 0.9, 0.5
OPTIONS = {"rank": RANK, "update_proj_gap": GAP}
SVD = Refresh(finder="svd")


def numpy_polar(x):
  """U Vᵀ of the directions that are there, in float64."""
  u, s, vt = np.linalg.svd(np.float64(x), full_matrices=False)
  there = s > 1e-5 * np.max(s, axis=-1, keepdims=True)
  return (u * there[..., None, :]) @ vt


def gradients(shapes, steps, seed=0):
  """Gradients of full rank whose subspaces change."""
  rng = np.random.default_rng(seed)
  base = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  for _ in range(steps):
    yield {
      name: np.float32(x + 0.5 * rng.normal(size=x.shape))
      for name, x in base.items()
    }


def gum_state(state) -> GumState:
  is_ours = lambda x: isinstance(x, GumState)
  (found,) = filter(is_ours, jax.tree.leaves(state, is_leaf=is_ours))
  return found


def run(tx, grads, params):
  """Updates of one step after the other, and the last state."""
  state, update, found = tx.init(params), jax.jit(tx.update), []
  for grad in grads:
    updates, state = update(grad, state, params)
    found.append(updates)
  return found, state


class Gum:
  """One matrix under GUM in float64, on given bases and draws."""

  def __init__(self, share):
    self.share, self.moment, self.basis = share, 0.0, None

  def update(self, weight, grad, basis, held, begins):
    """The change of the weight."""
    if grad.shape[0] > grad.shape[1]:
      args = weight.T, grad.T, basis, held, begins
      return self.update(*args).T
    grad, basis, q = np.float64(grad), np.float64(basis), self.share
    if begins:
      self.moment = 0.0
    elif not held:
      self.moment = basis.T @ self.basis @ self.moment
    self.basis = basis
    low = basis.T @ grad
    entered = (grad - basis @ low) / q if held else low / (1 - q)
    self.moment = MU * self.moment + entered
    normal = numpy_polar(self.moment) * grad.shape[1] ** 0.5
    direction = normal if held else basis @ normal
    return -RATE * (ALPHA * direction + DECAY * weight)


@pytest.mark.parametrize(
  ("shape", "refresh"),
  [
    ((10, 16), "staggered"),
    ((16, 10), "synchronous"),
    slow((10, 16), "synchronous"),
    slow((16, 10), "staggered"),
  ],
)
def test_gum_follows_the_reference_over_four_periods(shape, refresh):
  shapes = {"a": (2, *shape), "b": shape, "c": (1, 2, *shape)}
  tx = gum(
    RATE, MU, weight_decay=DECAY, scale=ALPHA, sampled=2, refresh=refresh,
    seed=1, **OPTIONS
  )  # fmt: skip
  rng = np.random.default_rng(1)
  params = {k: rng.normal(size=s) for k, s in shapes.items()}
  flat = lambda tree: np.concatenate(
    [np.asarray(tree[k]).reshape(-1, *shape) for k in shapes]
  )
  ours = {k: jnp.asarray(x, jnp.float32) for k, x in params.items()}
  theirs, models = flat(params), [Gum(2 / 5) for _ in range(5)]
  state, update, draws = tx.init(ours), jax.jit(tx.update), []
  for step, grad in enumerate(gradients(shapes, 3 * GAP + 2)):
    updates, state = update(grad, state, ours)
    (held,) = gum_state(state).held.values()
    draws.append(frozenset(held.tolist()))
    bases = [next(iter(find_bases(state)[k].values())) for k in shapes]
    bases = np.concatenate([np.reshape(x, (-1, 10, RANK)) for x in bases])
    change = np.stack(
      [
        model.update(w, g, p, i in draws[-1], step % GAP == 0)
        for i, (model, w, g, p) in enumerate(
          zip(models, theirs, flat(grad), bases, strict=True)
        )
      ]
    )
    # Directions of rounding noise, which a rest has, end at .01 or below.
    error = np.abs(flat(updates) - change).max((1, 2))
    noise = [1e-2 * ALPHA * 4 * (i in draws[-1]) for i in range(5)]
    assert np.all(error < RATE * (1e-3 + np.asarray(noise))), error
    ours, theirs = optax.apply_updates(ours, updates), theirs + change
  periods = [set(draws[i : i + GAP]) for i in range(0, len(draws), GAP)]
  assert all(len(draw) == 1 for draw in periods)
  assert len(set.union(*periods)) > 1 and all(len(x) == 2 for x in draws)


@pytest.fixture(scope="module")
def estimates():
  """Draw to momenta at full size in a second period, of many seeds."""
  shapes = {"w": (5, 6, 9)}
  grads = list(gradients(shapes, GAP + 2))
  params = {"w": jnp.zeros(shapes["w"])}

  @jax.jit
  def after(seed):
    tx = gum(RATE, MU, sampled=2, refresh=SVD, seed=seed, **OPTIONS)
    state = tx.init(params)
    for grad in grads:
      _, state = tx.update(grad, state, params)
    found = gum_state(state)
    basis = found.galore.projector["w"]["left"]
    moment = optax.tree.get(found.galore, "trace").low["w"]
    low = jnp.einsum("lmr,lrn->lmn", basis, moment)
    return found.held["w"], low.at[found.held["w"]].set(found.momentum["w"])

  return grads, [after(seed) for seed in range(250)]


def test_the_mean_over_all_draws_is_the_whole_gradient_s_momentum(estimates):
  grads, found = estimates
  by_draw = {frozenset(held.tolist()): np.float64(x) for held, x in found}
  assert set(by_draw) == set(
    map(frozenset, itertools.combinations(range(5), 2))
  )
  mean = np.mean(list(by_draw.values()), axis=0)
  whole = MU * grads[GAP]["w"] + grads[GAP + 1]["w"]
  np.testing.assert_allclose(mean, whole, atol=1e-4)
  one = next(iter(by_draw.values()))
  assert np.linalg.norm(one - whole) > 0.5 * np.linalg.norm(whole)


def test_every_matrix_is_drawn_as_often_as_its_weight_says(estimates):
  _, found = estimates
  counts = collections.Counter(i for held, _ in found for i in held.tolist())
  std = (len(found) * 0.4 * 0.6) ** 0.5
  assert all(abs(counts[i] - 0.4 * len(found)) < 4 * std for i in range(5))


def test_a_held_matrix_moves_out_of_its_subspace_and_others_in_it():
  params = {"w": jnp.zeros((4, 8, 20))}
  tx = gum(RATE, sampled=1, **OPTIONS)
  (updates,), state = run(tx, gradients({"w": (4, 8, 20)}, 1), params)
  basis = find_bases(state)["w"]["left"]
  inside = jnp.einsum("lmr,lmn->lrn", basis, updates["w"])
  inside = jnp.linalg.norm(inside, axis=(1, 2))
  whole = jnp.linalg.norm(updates["w"], axis=(1, 2))
  (held,) = gum_state(state).held["w"].tolist()
  for i in range(4):
    wanted = 0 if i == held else whole[i]
    np.testing.assert_allclose(inside[i], wanted, atol=1e-2 * whole[i])


def test_learns_what_noise_hides_from_subspaces():
  """Noise of rank r decides every basis, and the signal is beside it."""
  rng = np.random.default_rng(0)
  signal = jnp.asarray(rng.normal(size=(4, 8, 16)), jnp.float32)
  signal = signal.at[:, :2].set(0)
  noise = np.zeros((60, 4, 8, 16))
  noise[:, :, :2] = 300 * rng.normal(size=(60, 4, 2, 16))
  left = {}
  for make, more in ((sumo, {}), (gum, {"sampled": 2})):
    tx = make(0.12, MU, rank=2, update_proj_gap=5, **more)
    params = {"w": jnp.zeros(signal.shape)}
    state, update = tx.init(params), jax.jit(tx.update)
    for extra in noise:
      grads = {"w": params["w"] - signal + jnp.float32(extra)}
      updates, state = update(grads, state, params)
      params = optax.apply_updates(params, updates)
    left[make] = jnp.linalg.norm((params["w"] - signal)[:, 2:])
  whole = jnp.linalg.norm(signal)
  assert left[sumo] > 0.95 * whole and left[gum] < 0.6 * whole, left


def test_layers_by_themselves_do_as_in_a_stack():
  grads = list(gradients({"w": (4, 8, 20)}, GAP + 1))
  params = {"w": jnp.zeros((4, 8, 20))}
  tx = gum(RATE, refresh=SVD, sampled=0.25, **OPTIONS)
  stacked, _ = run(tx, grads, params)
  alone, _ = run(
    tx, [{"w": list(g["w"])} for g in grads], {"w": list(params["w"])}
  )
  for one, other in zip(stacked, alone, strict=True):
    np.testing.assert_allclose(one["w"], jnp.stack(other["w"]), atol=1e-5)


@pytest.mark.parametrize(
  ("sampled", "number"), [(3, 3), (99, 7), (0.25, 2), (0.01, 1), (0.99, 7)]
)
def test_the_state_is_sumo_s_and_a_momentum_for_each_slot(sampled, number):
  params = {"a": jnp.zeros((6, 64, 96)), "b": [jnp.zeros((64, 96))] * 2}
  size = lambda f, **options: state_bytes(
    f(RATE, rank=16, **options).init(params)
  )
  slot = 4 * 64 * 96 + 4
  assert size(gum, sampled=sampled) - size(sumo) == number * slot
  coarse = {"state_dtype": "bfloat16", "basis_dtype": "int4"}
  small = size(gum, sampled=sampled, **coarse) - size(sumo, **coarse)
  assert small == number * (2 * 64 * 96 + 4)


def test_other_leaves_get_adamw_and_a_single_shape_stays_whole():
  shapes = {"bias": (16,), "embed": (8, 16), "odd": (8, 24), "w": (2, 8, 16)}
  params = {name: jnp.ones(shape) for name, shape in shapes.items()}
  tx = gum(RATE, MU, weight_decay=DECAY, **OPTIONS)
  with pytest.warns(UserWarning, match="keeps 1 matrices at full rank, 'odd'"):
    found, state = run(tx, list(gradients(shapes, 3)), params)
  adamw = optax.adamw(RATE, weight_decay=DECAY)
  wanted, _ = run(adamw, list(gradients(shapes, 3)), params)
  assert list(find_bases(state)) == ["w"]
  moment = 0.0
  for ours, other, grad in zip(
    found, wanted, gradients(shapes, 3), strict=True
  ):
    for name in ("bias", "embed"):
      np.testing.assert_allclose(ours[name], other[name], rtol=1e-5)
    moment = MU * moment + grad["odd"]
    whole = -RATE * (0.2 * 24**0.5 * numpy_polar(moment) + DECAY)
    np.testing.assert_allclose(ours["odd"], whole, atol=1e-4 * RATE)


class Attention(NamedTuple):
  """Fields that are not sorted by name."""

  query: Any
  key: Any
  out: Any


@pytest.mark.parametrize(
  "params",
  [
    Attention(*3 * [jnp.ones((8, 16))]),
    {"block": {"w": jnp.ones((8, 16))}, "block.1": {"w": jnp.ones((8, 16))}},
    [jnp.ones((8, 16 if i in (2, 10) else 17 + i)) for i in range(12)],
  ],
  ids=("fields", "dots", "numbers"),
)
@pytest.mark.filterwarnings("ignore:gum keeps")
def test_a_state_is_known_whatever_the_order_of_its_keys(params):
  tx = gum(RATE, **OPTIONS)
  for state in (tx.init(params), jax.eval_shape(tx.init, params)):
    _, after = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_a_gradient_of_low_rank_or_without_sense_moves_no_noise():
  rng = np.random.default_rng(0)
  thin = rng.normal(size=(3, 8, 2)) @ rng.normal(size=(3, 2, 16))
  thin[1, 0, 0] = np.nan
  params = {"w": jnp.ones((3, 8, 16))}
  tx = gum(RATE, sampled=2, **OPTIONS)
  found, state = run(tx, [{"w": jnp.asarray(thin, jnp.float32)}] * 2, params)
  held = gum_state(state).held["w"].tolist()
  for i in range(3):
    size = jnp.abs(found[-1]["w"][i]).max()
    assert size == 0 if i in held or i == 1 else size > RATE / 100


@pytest.mark.parametrize(
  "options",
  [
    {"basis_dtype": "int8", "state_dtype": "bfloat16"},
    slow({"proj_type": "reverse_std", "nesterov": True}),
    {"proj_type": "full", "refresh": "staggered", "scale": 0.5},
  ],
)
def test_goes_down_with_other_options(options):
  tx = gum(0.1, MU, **OPTIONS, **options)
  assert small_lib.left_of_the_way(tx, (3, 8, 24)) < 0.7


def test_with_a_schedule_of_its_numbers():
  shapes = {"w": (4, 8, 20)}
  params, grads = {"w": jnp.zeros((4, 8, 20))}, list(gradients(shapes, 5))
  make = optax.inject_hyperparams(gum)
  tx = make(optax.constant_schedule(RATE), sampled=2, seed=3, **OPTIONS)
  found, _ = run(tx, grads, params)
  wanted, _ = run(gum(RATE, sampled=2, seed=3, **OPTIONS), grads, params)
  np.testing.assert_allclose(found[-1]["w"], wanted[-1]["w"], atol=1e-6)


def test_a_saved_state_goes_on_as_if_it_had_not_been_saved(tmp_path):
  shapes = {"w": (4, 8, 20), "bias": (3,)}
  params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
  grads = list(gradients(shapes, 2 * GAP))
  tx = gum(RATE, sampled=2, **OPTIONS)
  found, _ = run(tx, grads, params)
  _, state = run(tx, grads[:2], params)
  ocp.save(tmp_path / "state", state)
  state = ocp.load(tmp_path / "state", jax.eval_shape(tx.init, params))
  update = jax.jit(tx.update)
  for grad in grads[2:]:
    updates, state = update(grad, state, params)
  np.testing.assert_array_equal(updates["w"], found[-1]["w"])


@pytest.mark.parametrize("kind", list(jax.sharding.AxisType)[:2])
def test_on_a_mesh_it_does_the_same(kind):
  mesh = jax.make_mesh((2, 2), ("layers", "model"), axis_types=(kind,) * 2)
  shapes = {"v": (2, 8, 16), "w": (2, 8, 16)}
  grads = list(gradients(shapes, GAP + 1))
  params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
  sharding = jax.NamedSharding(mesh, jax.P("layers", None, "model"))
  where = dict.fromkeys(shapes, sharding)
  tx = gum(RATE, refresh=SVD, sampled=2, **OPTIONS)
  wanted, _ = run(tx, grads, params)
  sharded = gum(RATE, refresh=SVD, sampled=2, param_shardings=where, **OPTIONS)
  with jax.set_mesh(mesh):
    params = jax.device_put(params, where)
    parts = state_shardings(sharded, params, where)
    slots = gum_state(parts).momentum["v"].spec
    assert slots == jax.P(None, None, "model")
    found, _ = run(sharded, [jax.device_put(g, where) for g in grads], params)
  for name in shapes:
    np.testing.assert_allclose(
      found[-1][name], wanted[-1][name], atol=1e-2 * RATE
    )


def test_what_is_refused():
  for wrong in (0, -1, 1.0, 0.0):
    with pytest.raises(ValueError, match="`sampled` must be"):
      gum(RATE, sampled=wrong)
  with pytest.raises(TypeError, match="`sampled` must be"):
    gum(RATE, sampled="half")
  with pytest.raises(ValueError, match="gum updates in the"):
    gum(RATE, refresh=Refresh(finder="random"))
  with pytest.raises(ValueError, match="got moments='keep'"):
    gum(RATE, refresh=Refresh(moments="keep"))
  with pytest.raises(ValueError, match="`refresh` must be one of"):
    gum(RATE, refresh="adaptive")
  with pytest.raises(ValueError, match="'w' in `rules` sets `update_proj_gap`"):
    gum(RATE, rules=[("w", Projection(update_proj_gap=3))])
  with pytest.raises(ValueError, match="`rank`"):
    gum(RATE, rank=0)
  # At full rank its last two axes would be taken for a matrix.
  tx = gum(RATE, rank=8, rules=[("o", Projection(rows=0, cols=(1, 2)))])
  with pytest.raises(ValueError, match=r"the matrix 'o' .* Give it the rule"):
    tx.init({"o": jnp.zeros((64, 4, 16))})


def test_layer_by_layer_there_is_nothing_to_draw_from():
  model = Layered(
    first=lambda params, batch: batch @ params["inner"],
    layer=lambda w, x: x + jnp.tanh(x @ w["a"] @ w["b"]),
    last=lambda params, x, batch: jnp.mean((x @ params["outer"]) ** 2),
  )
  layers = {"a": jnp.ones((3, 16, 16)), "b": jnp.ones((3, 16, 16))}
  params = {
    "inner": jnp.ones((8, 16)),
    "layers": layers,
    "outer": jnp.ones((16, 1)),
  }
  rules = [("inner|outer", None), ("layers|^[ab]$", Projection())]
  init, step = layerwise(gum(RATE, rules=rules, **OPTIONS), model)
  with pytest.raises(ValueError, match=r"(?s)`layerwise`.*or `sumo`"):
    step(params, init(params), jnp.ones((2, 8)))
