"""Fira and APOLLO: against NumPy, their limits, their refusals."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  Refresh,
  adamw_8bit,
  apollo_adamw,
  apollo_mini_adamw,
  find_bases,
  galore,
  state_bytes,
)
from tests.core import small
from tests.core.options import gathered
from tests.core.residual import reference
from tests.core.residual.gradients import SIZES, gradients
from tests.marks import slow

GAP, RANK, RATE, DECAY = 4, 3, 1e-2, 0.1
STEPS = 3 * GAP + 3  # refreshes at 0, 4, 8, 12
SHAPES = [(10, 16), (16, 10), (12, 12), (2, 3, 8, 12)]


def fira(inner, **options):
  options = {"rank": RANK, "update_proj_gap": GAP, **options}
  return galore(inner, **gathered({"residual": "fira", **options}))


def adamw(rate=RATE):
  return optax.adamw(rate, weight_decay=DECAY)


@functools.cache
def trajectory(shape):
  """Updates, bases and norms of Fira, and of its reference."""
  tx = fira(adamw(), faithful=True)
  params = np.random.default_rng(1).normal(size=shape)
  ours, theirs = (
    jnp.asarray(params, jnp.float32),
    params.reshape(-1, *shape[-2:]),
  )
  models = [reference.Fira(RANK, GAP, 0.25, RATE, DECAY) for _ in theirs]
  state, update, rows = tx.init({"w": ours}), jax.jit(tx.update), []
  for grad in gradients(shape):
    updates, state = update({"w": grad}, state, {"w": ours})
    (basis,) = state.projector["w"].values()
    basis = np.asarray(basis).reshape(-1, *basis.shape[-2:])
    grad = grad.reshape(theirs.shape)
    change = np.stack(
      [
        model.update(w, g, lambda _, p=p: p)
        for model, w, g, p in zip(models, theirs, grad, basis, strict=True)
      ]
    )
    rows.append(
      (
        np.asarray(updates["w"]).reshape(theirs.shape),
        change,
        np.asarray(state.recovery["w"]).reshape(-1),
        np.array([model.norm for model in models]),
      )
    )
    ours, theirs = ours + updates["w"], theirs + change
  return rows, models


@pytest.mark.parametrize("shape", SHAPES)
def test_fira_follows_the_reference_over_four_refreshes(shape):
  rows, models = trajectory(shape)
  for found, wanted, norm, wanted_norm in rows:
    np.testing.assert_allclose(found, wanted, atol=1e-4 * RATE)
    np.testing.assert_allclose(norm, wanted_norm, rtol=1e-4)
  for model in models:
    assert any(model.limited) and not all(model.limited[1:])


@pytest.mark.parametrize(
  ("sign", "inner"),
  [
    (1, optax.scale_by_adam()),
    (-RATE, optax.adam(RATE)),
    slow(-RATE, optax.inject_hyperparams(optax.adam)(learning_rate=RATE)),
    (-RATE, optax.partition({"a": optax.adam(RATE)}, "a")),
    slow(-RATE, optax.apply_if_finite(optax.adam(RATE), 2)),
  ],
)
def test_learning_rate_and_sign_are_left_out_of_the_scaling(sign, inner):
  """Whatever says them, the update and the kept norm are Adam's."""
  params = {"w": jnp.zeros((8, 12))}
  results = []
  for tx in (fira(optax.scale_by_adam()), fira(inner)):
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in gradients((8, 12), SIZES[:3]):
      updates, state = update({"w": grad}, state, params)
    results.append((updates["w"], state.recovery["w"]))
  (wanted, norm), (found, found_norm) = results
  np.testing.assert_allclose(found, sign * wanted, rtol=1e-4, atol=1e-7)
  np.testing.assert_allclose(found_norm, norm, rtol=1e-5)


def run(tx, grads, params):
  """Updates and states of one step after the other."""
  state, update, found = tx.init(params), jax.jit(tx.update), []
  for grad in grads:
    updates, state = update(grad, state, params)
    found.append((updates, state))
  return found


@pytest.mark.parametrize(
  "inner",
  [
    optax.lion(RATE),
    slow(optax.sgd(RATE, 0.9, nesterov=True)),
    slow(optax.radam(RATE)),
    optax.adafactor(
      RATE, multiply_by_parameter_scale=False, min_dim_size_to_factor=2
    ),
    slow(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE))),
    optax.chain(optax.adam(RATE), optax.clip_by_block_rms(0.1)),
    adamw_8bit(RATE, min_size=0),
  ],
)
def test_other_optimizers_go_down_with_their_residual(inner):
  """Of which the part outside of the subspace has the gradient's direction."""
  params = {"w": jnp.zeros((8, 12))}
  (grad,) = gradients((8, 12), [1])
  tx = fira(inner, faithful=True)
  ((updates, state),) = run(tx, [{"w": grad}], params)
  p = np.asarray(state.projector["w"]["left"], np.float64)
  outside = lambda x: np.asarray(x) - p @ (p.T @ np.asarray(x))
  rest, wanted = outside(updates["w"]), outside(grad)
  cosine = np.sum(rest * wanted, 0) / np.linalg.norm(rest, axis=0)
  np.testing.assert_allclose(cosine / np.linalg.norm(wanted, axis=0), -1, 1e-3)


def test_warm_up_from_zero_does_not_hold_the_residual_back():
  schedule = optax.linear_schedule(0.0, RATE, 3)
  tx, control = fira(optax.adam(schedule)), fira(optax.adam(RATE))
  grads = [{"w": g} for g in gradients((8, 12), [1.0] * 4)]
  params = {"w": jnp.zeros((8, 12))}
  found, wanted = run(tx, grads, params), run(control, grads, params)
  assert not found[0][0]["w"].any() and found[0][1].recovery["w"] == 0
  np.testing.assert_allclose(found[3][0]["w"], wanted[3][0]["w"], rtol=0.1)


@pytest.mark.parametrize("proj_type", ["std", "right", "full"])
def test_bad_gradients_neither_spread_nor_stay(proj_type):
  grads = [jnp.asarray(g) for g in gradients((8, 12), [1.0] * 5)]
  grads[0] = jnp.zeros_like(grads[0])
  grads[2] = grads[2].at[3, 4].set(jnp.nan)
  grads[3] = jnp.zeros_like(grads[3])
  tx = fira(optax.adam(RATE), proj_type=proj_type)
  params = {"w": jnp.zeros((8, 12))}
  found = run(tx, [{"w": g} for g in grads], params)
  assert all(np.isfinite(u["w"]).all() for u, _ in found)
  norms = [float(s.recovery["w"]) for _, s in found]
  assert norms[0] == 0 < norms[1]
  # Nothing of a bad gradient counts, so nothing is put beside the momentum.
  assert norms[1] == norms[2] == norms[3]
  size = jnp.linalg.norm(found[1][0]["w"])
  assert jnp.linalg.norm(found[2][0]["w"]) < 1.5 * size
  assert jnp.linalg.norm(found[4][0]["w"]) > 0.1 * size


def test_ends_at_the_inner_optimizer_where_nothing_is_left_out():
  """A basis of full rank spans all: with α = 1 there is no residual."""
  grads = [{"w": g} for g in gradients((8, 12), [1.0] * 6)]
  params = {"w": jnp.zeros((8, 12))}
  options = {"rank": 8, "scale": 1.0, "faithful": True}
  found = run(fira(optax.adam(RATE), **options), grads, params)
  plain = galore(optax.adam(RATE), update_proj_gap=GAP, **options)
  wanted = run(plain, grads, params)
  for (update, _), (other, _) in zip(found, wanted, strict=True):
    np.testing.assert_allclose(update["w"], other["w"], atol=1e-4 * RATE)


def test_one_scale_a_matrix_where_both_sides_are_projected():
  (grad,) = gradients((8, 12), [1])
  tx = fira(optax.scale_by_sign(), proj_type="full", faithful=True)
  params = {"w": jnp.zeros((8, 12))}
  ((updates, state),) = run(tx, [{"w": grad}], params)
  bases = state.projector["w"]
  p, q = (np.asarray(bases[side], np.float64) for side in ("left", "right"))
  low = p.T @ grad @ q
  phi = RANK / np.linalg.norm(low)
  wanted = 0.25 * p @ np.sign(low) @ q.T
  wanted += phi * (grad - 0.25 * p @ low @ q.T)
  np.testing.assert_allclose(updates["w"], wanted, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"basis_dtype": "int4"}])
def test_costs_one_number_a_matrix(options):
  params = {"w": jnp.zeros((2, 3, 8, 12)), "v": jnp.zeros((8, 12))}
  params["bias"] = jnp.zeros(12)
  tx = lambda **more: galore(optax.adam(RATE), rank=2, **options, **more)
  state, plain = tx(residual="fira").init(params), tx().init(params)
  assert state_bytes(state) - state_bytes(plain) == 4 * (2 * 3 + 1)
  assert plain.recovery is None


def test_stacked_matrices_are_each_by_themselves():
  params = {"w": jnp.zeros((3, 8, 12)), "v": jnp.zeros((8, 12))}
  tx = fira(optax.adam(RATE), refresh="synchronous")
  grads = [{"w": g} for g in gradients((3, 8, 12), SIZES[:5])]
  stack = [u["w"] for u, _ in run(tx, grads, {"w": params["w"]})]
  for i in range(3):
    single = run(tx, [{"w": g["w"][i]} for g in grads], {"w": params["v"]})
    for updates, (alone, _) in zip(stack, single, strict=True):
      np.testing.assert_allclose(updates[i], alone["w"], atol=1e-4 * RATE)


def test_layer_by_layer_equals_the_usual_step():
  tx = fira(optax.adam(RATE), rules=small.RULES)
  state, other = small.train_both_ways(tx, GAP + 1, atol=2e-4)
  norms = state.layers.recovery["layers"]
  assert norms.shape == (3,)
  np.testing.assert_allclose(norms, other.recovery["layers"], rtol=1e-2)


@pytest.mark.parametrize(
  ("inner", "options", "message"),
  [
    (optax.adam(1.0), {"residual": "fire"}, r"Did you mean 'fira'"),
    (
      optax.adam(1.0),
      {"accumulation_steps": 2},
      r"whole gradient of a step.*accumulation_steps=2.*optax\.MultiSteps",
    ),
    (
      optax.MultiSteps(optax.adam(1.0), 2).gradient_transformation(),
      {},
      r"`optax\.MultiSteps` around",
    ),
    (
      optax.chain(optax.scale(-1.0), optax.apply_every(2)),
      {},
      r"`optax\.apply_every` does not see",
    ),
    (optax.rmsprop(1.0, momentum=0.9), {}, "'w' without its learning rate"),
    (
      optax.chain(optax.adam(lambda _: 1.0), optax.ema(0.9)),
      {},
      r"(?s)'w' without its learning rate.*scale_by_learning_rate",
    ),
  ],
)
def test_what_does_not_go_together(inner, options, message):
  with pytest.raises(ValueError, match=message):
    fira(inner, **options).init({"w": jnp.zeros((8, 12))})


APOLLO = {"apollo": apollo_adamw, "apollo_mini": apollo_mini_adamw}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(APOLLO))
def test_apollo_follows_the_reference_over_four_projections(name, shape):
  mini = name == "apollo_mini"
  alpha, options = (128.0, {}) if mini else (4.0, {"rank": RANK, "scale": 4.0})
  tx = APOLLO[name](RATE, weight_decay=DECAY, update_proj_gap=GAP, **options)
  params = np.random.default_rng(1).normal(size=shape)
  ours, theirs = (
    jnp.asarray(params, jnp.float32),
    params.reshape(-1, *shape[-2:]),
  )
  models = [reference.Apollo(alpha, RATE, DECAY, tensor=mini) for _ in theirs]
  state, update, drawn = tx.init({"w": ours}), jax.jit(tx.update), []
  for grad in gradients(shape):
    updates, state = update({"w": grad}, state, {"w": ours})
    (basis,) = find_bases(state)["w"].values()
    drawn.append(
      np.asarray(basis, np.float64).reshape(-1, *basis.shape[-2:])[0]
    )
    change = np.stack(
      [
        model.update(w, g, drawn[-1])
        for model, w, g in zip(
          models, theirs, grad.reshape(theirs.shape), strict=True
        )
      ]
    )
    np.testing.assert_allclose(
      np.asarray(updates["w"]).reshape(theirs.shape), change, atol=2e-4 * RATE
    )
    ours, theirs = ours + updates["w"], theirs + change
  norms = np.asarray(state.recovery["w"]).reshape(-1)
  np.testing.assert_allclose(norms, [x.norm for x in models], rtol=1e-4)
  assert all(any(x.limited) and not all(x.limited[1:]) for x in models)
  same = [np.array_equal(a, b) for a, b in itertools.pairwise(drawn)]
  assert [i + 1 for i, x in enumerate(same) if not x] == [4, 8, 12]


def test_a_random_projection_is_normal_and_each_leaf_has_its_own():
  params = {"v": jnp.zeros((300, 400)), "w": jnp.zeros((300, 400))}
  tx = lambda seed: apollo_adamw(1.0, rank=64, seed=seed)
  v, w = (x["left"] for x in find_bases(tx(0).init(params)).values())
  assert abs(jnp.mean(v)) < 0.01 and abs(64 * jnp.var(v) - 1) < 0.05
  np.testing.assert_allclose(v.T @ v * 64 / 300, np.eye(64), atol=0.5)
  assert abs(jnp.vdot(v, w)) < 0.05 * jnp.vdot(v, v)
  other = find_bases(tx(1).init(params))["v"]["left"]
  assert abs(jnp.vdot(v, other)) < 0.05 * jnp.vdot(v, v)


def test_apollo_keeps_moments_a_seed_and_a_norm():
  params = {"w": jnp.zeros((2, 3, 8, 12)), "v": jnp.zeros((12, 8))}
  moments = 2 * 4 * RANK * (6 * 12 + 12)
  rest = 4 * (1 + 1)  # the steps of GaLore and Adam
  state = apollo_adamw(RATE, rank=RANK).init(params)
  assert state_bytes(state) == moments + rest + 4 * (2 + 6 + 1)
  state = apollo_mini_adamw(RATE).init(params)
  assert state_bytes(state) == moments // RANK + rest + 4 * (2 + 6 + 1)


def test_apollo_counts_no_basis_that_it_does_not_keep():
  params = {"w": jnp.zeros((96, 96))}
  kept = state_bytes(apollo_adamw(RATE, rank=80).init(params))
  assert kept < 1.05 * 2 * 80 * 96 * 4  # GaLore leaves it at full rank


def test_apollo_on_leading_directions_keeps_a_basis():
  """The paper's variant with an SVD: scales are those of the subspace."""
  (grad,) = gradients((8, 12), [1])
  tx = galore(
    optax.scale_by_sign(), rank=RANK, scale=1.0, residual="apollo",
    refresh=Refresh(finder="svd"),
  )  # fmt: skip
  ((updates, state),) = run(tx, [{"w": grad}], {"w": jnp.zeros((8, 12))})
  low = np.asarray(state.projector["w"]["left"]).T @ grad
  phi = RANK**0.5 / np.linalg.norm(low, axis=0)
  np.testing.assert_allclose(updates["w"], grad * phi, rtol=1e-3)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"residual": None}, r"only measures gradients.*got residual=None"),
    ({"residual": "fira"}, r"only measures gradients.*got residual='fira'"),
    ({"policy": "adaptive"}, r"no subspace that could settle"),
    ({"moments": "reset"}, r"keeps the moments"),
    ({"params_mode": "project"}, r"does not project weights"),
    ({"basis_dtype": "int4"}, r"stores no basis.*'int4'"),
    ({"accumulation_steps": 2}, r"whole gradient of a step"),
    ({"faithful": True}, r"means Refresh\(.*, got finder='random'"),
    ({"proj_type": "full"}, r"'w' is projected on both.*'apollo_mini'"),
  ],
)
def test_what_random_projections_do_not_go_with(options, message):
  options = {"residual": "apollo", "finder": "random", **options}
  with pytest.raises(ValueError, match=message):
    fira(optax.adam(1.0), **options).init({"w": jnp.zeros((8, 12))})
