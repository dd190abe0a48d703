"""The normalized residual: against NumPy, its limits, its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  Refresh,
  adamw_8bit,
  chain,
  find_bases,
  galore,
  galore_adamw_8bit,
  q_galore_adamw_8bit,
  state_bytes,
)
from tests.core import small
from tests.core.residual import reference
from tests.core.residual.gradients import SIZES, gradients
from tests.marks import slow

GAP, RANK, RATE, DECAY = 4, 3, 1e-2, 0.1
SHAPES = [(10, 16), (16, 10), (12, 12), (2, 3, 8, 12)]
METHODS = ("normalized", "factored")


def normalized(inner, **options):
  defaults = {"residual": "normalized", "rank": RANK, "update_proj_gap": GAP}
  return galore(inner, **{**defaults, **options})


def adamw(rate=RATE):
  return optax.adamw(rate, weight_decay=DECAY)


def follow(tx, shape, models, grads=None, tolerance=1e-4):
  """Compares each update with that of the models, on the same bases."""
  params = np.random.default_rng(1).normal(size=shape)
  ours = jnp.asarray(params, jnp.float32)
  theirs = params.reshape(-1, *shape[-2:])
  state, update = tx.init({"w": ours}), jax.jit(tx.update)
  for grad in grads or gradients(shape):
    updates, state = update({"w": grad}, state, {"w": ours})
    bases = {
      side: np.asarray(x, np.float64).reshape(-1, *x.shape[-2:])
      for side, x in find_bases(state)["w"].items()
    }
    change = np.stack(
      [
        model.update(w, g, {side: x[i] for side, x in bases.items()})
        for i, (model, w, g) in enumerate(
          zip(models, theirs, grad.reshape(theirs.shape), strict=True)
        )
      ]
    )
    np.testing.assert_allclose(
      np.asarray(updates["w"]).reshape(theirs.shape),
      change,
      atol=tolerance * RATE,
    )
    ours, theirs = ours + updates["w"], theirs + change
  return state


# Moments that stay as they are make the reference a short one: Adam's.
KEPT = {"refresh": Refresh(moments="keep", null_tolerance=0.0)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_follows_the_reference_over_four_refreshes(shape, method):
  count = int(np.prod(shape[:-2]))
  models = [
    reference.Normalized(0.25, RATE, DECAY, method == "factored")
    for _ in range(count)
  ]
  tx = normalized(adamw(), residual=method, **KEPT)
  follow(tx, shape, models)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
  ("options", "tolerance"),
  [
    ({"proj_type": "full"}, 2e-4),
    slow({"proj_type": "reverse_std"}, 2e-4),
    slow({"basis_dtype": "int4"}, 2e-4),
    ({"basis_dtype": "int8", "proj_type": "right"}, 2e-4),
    slow({"basis_dtype": "bfloat16"}, 2e-4),
    ({"basis_dtype": "int4", "proj_type": "full"}, 2e-4),
  ],
)
def test_follows_the_reference_on_other_bases(options, tolerance, method):
  """Also where they are not orthonormal, because they have few bits."""
  model = reference.Normalized(0.25, RATE, DECAY, method == "factored")
  tx = normalized(adamw(), residual=method, **KEPT, **options)
  grads = list(gradients((10, 16), SIZES[:6]))
  follow(tx, (10, 16), [model], grads, tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_factor_decay_and_scale_are_those_given(method):
  model = reference.Normalized(
    2.0, RATE, DECAY, method == "factored", factor=0.3, memory=0.5
  )
  options = {"residual_factor": 0.3, "residual_decay": 0.5, "scale": 2.0}
  tx = normalized(adamw(), residual=method, **options, **KEPT)
  follow(tx, (10, 16), [model])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("growth", [1.0, 1.01, 1.3, float("inf")])
def test_the_norm_grows_no_faster_than_allowed(growth, method):
  """Some steps reach the limit, and some do not."""
  model = reference.Normalized(
    0.25, RATE, DECAY, method == "factored", growth=growth
  )
  tx = normalized(adamw(), residual=method, residual_growth=growth, **KEPT)
  state = follow(tx, (10, 16), [model])
  assert any(model.limited) == np.isfinite(growth)
  assert not all(model.limited)
  norm = state.recovery["w"].norm
  if np.isfinite(growth):
    np.testing.assert_allclose(norm, model.norm, rtol=1e-4)
  else:
    assert norm is None  # nor does the state have one


def test_growth_can_be_a_schedule():
  """Infinity is then one value of it."""
  make = optax.inject_hyperparams(
    lambda growth: normalized(optax.adam(RATE), residual_growth=growth)
  )
  params = {"w": jnp.zeros((8, 12))}
  grads = [{"w": g} for g in gradients((8, 12), SIZES[:6])]
  for growth in (1.0, float("inf")):
    tx = normalized(optax.adam(RATE), residual_growth=growth)
    found = run(make(lambda _, growth=growth: growth), grads, params)
    for (a, _), (b, _) in zip(found, run(tx, grads, params), strict=True):
      np.testing.assert_allclose(a["w"], b["w"], atol=1e-4 * RATE)


def test_factor_and_decay_can_be_schedules():
  """Through `inject_hyperparams`; with a factor of 0 nothing is added."""
  make = optax.inject_hyperparams(
    lambda rate, factor, decay: normalized(
      optax.adam(rate), residual_factor=factor, residual_decay=decay
    )
  )
  tx = make(RATE, optax.linear_schedule(0.0, 1.0, 1), 0.95)
  params = {"w": jnp.zeros((8, 12))}
  grads = [{"w": g} for g in gradients((8, 12), [1.0] * 2)]
  (first, state), (second, _) = run(tx, grads, params)
  assert state.hyperparams["factor"] == 0.0
  plain = run(normalized(optax.adam(RATE), residual=None), grads, params)
  whole = run(normalized(optax.adam(RATE)), grads, params)
  np.testing.assert_allclose(first["w"], plain[0][0]["w"], atol=1e-4 * RATE)
  np.testing.assert_allclose(second["w"], whole[1][0]["w"], atol=1e-4 * RATE)


def run(tx, grads, params):
  """Updates and states of one step after the other."""
  state, update, found = tx.init(params), jax.jit(tx.update), []
  for grad in grads:
    updates, state = update(grad, state, params)
    found.append((updates, state))
  return found


@pytest.mark.parametrize(
  ("sign", "tx"),
  [
    (1, normalized(optax.scale_by_adam())),
    slow(-RATE, normalized(optax.inject_hyperparams(optax.adam)(RATE))),
    (-RATE, chain(normalized(None), optax.adam(RATE))),
    (-RATE, normalized(optax.partition({"a": optax.adam(RATE)}, "a"))),
  ],
)
def test_learning_rate_and_sign_multiply_the_residual(sign, tx):
  params = {"w": jnp.zeros((8, 12))}
  grads = [{"w": g} for g in gradients((8, 12), SIZES[:3])]
  wanted = run(normalized(optax.adam(RATE)), grads, params)[-1][0]["w"]
  found = run(tx, grads, params)[-1][0]["w"]
  np.testing.assert_allclose(found, sign / -RATE * wanted, 1e-4, 1e-7)


@pytest.mark.parametrize(
  "inner",
  [
    optax.lion(RATE),
    slow(optax.sgd(RATE, 0.9, nesterov=True)),
    slow(
      optax.adafactor(
        RATE, multiply_by_parameter_scale=False, min_dim_size_to_factor=2
      )
    ),
    optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE)),
    adamw_8bit(RATE, min_size=0),
  ],
)
@pytest.mark.parametrize("method", METHODS)
def test_any_inner_optimizer(inner, method):
  """Outside of the subspace the update is the residual, whatever is inside."""
  params = {"w": jnp.zeros((10, 16))}
  (grad,) = gradients((10, 16), [1])
  tx = normalized(inner, residual=method)
  ((updates, state),) = run(tx, [{"w": grad}], params)
  model = reference.Normalized(0.25, RATE, 0.0, method == "factored")
  basis = {k: np.float64(x) for k, x in find_bases(state)["w"].items()}
  wanted = model.update(0.0, grad, basis)
  outside = lambda x: x - basis["left"] @ (basis["left"].T @ x)
  np.testing.assert_allclose(
    outside(np.float64(updates["w"])), outside(wanted), atol=1e-4 * RATE
  )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("proj_type", ["std", "right", "full"])
@pytest.mark.parametrize("growth", [None, 1.5])
def test_bad_gradients_neither_spread_nor_stay(growth, proj_type, method):
  grads = [jnp.asarray(g) for g in gradients((8, 12), [1.0] * 6)]
  grads[0] = jnp.zeros_like(grads[0])
  grads[2] = grads[2].at[3, 4].set(jnp.nan)
  grads[3] = grads[3].at[3, 4].set(3e38)  # whose square is infinite
  options = {"proj_type": proj_type, "residual_growth": growth}
  tx = normalized(optax.adam(RATE), residual=method, **options)
  params = {"w": jnp.zeros((8, 12))}
  found = run(tx, [{"w": g} for g in grads], params)
  assert all(np.isfinite(u["w"]).all() for u, _ in found)
  assert not found[0][0]["w"].any()
  kept = [jax.tree.leaves(s.recovery["w"]) for _, s in found]
  for before, bad, worse in zip(*kept[1:4], strict=True):
    np.testing.assert_array_equal(before, bad)
    np.testing.assert_array_equal(before, worse)
  size = lambda i: jnp.linalg.norm(found[i][0]["w"])
  assert 0.1 * size(1) < size(5) < 3 * size(1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
  ("rank", "state_dtype"),
  [
    (3, "bfloat16"),
    (7, None),
    (8, None),
    slow(3, None),
    slow(7, "bfloat16"),
    slow(8, "bfloat16"),
  ],
)
def test_rounding_noise_is_no_residual(state_dtype, rank, method):
  """A basis that spans the gradient leaves nothing to be scaled up."""
  rng = np.random.default_rng(0)
  grads = [
    {"w": np.float32(rng.normal(size=(8, 2)) @ rng.normal(size=(2, 12)))}
    for _ in range(5)
  ]
  options = {"rank": rank, "update_proj_gap": 1, "faithful": True}
  options["state_dtype"] = state_dtype
  params = {"w": jnp.zeros((8, 12))}
  make = lambda method: normalized(
    optax.adam(RATE), **options, residual=method, residual_factor=None
  )
  found = run(make(method), grads, params)
  wanted = run(make(None), grads, params)
  for (update, _), (other, _) in zip(found, wanted, strict=True):
    np.testing.assert_allclose(update["w"], other["w"], atol=1e-5 * RATE)


def test_state_grows_by_a_vector_a_matrix():
  params = {"w": jnp.zeros((2, 3, 8, 12)), "v": jnp.zeros((12, 8))}
  params["bias"] = jnp.zeros(12)
  make = lambda method: galore(optax.adam(RATE), rank=2, residual=method)
  size = lambda method: state_bytes(make(method).init(params))
  weights = 2 * 3 + 1
  assert size("normalized") - size(None) == 4 * weights * (12 + 1)
  assert size("factored") - size("normalized") == 4 * weights * 8
  limited = galore(
    optax.adam(RATE), rank=2, residual="normalized", residual_growth=1.01
  )
  assert state_bytes(limited.init(params)) - size("normalized") == 4 * weights


def test_the_column_form_takes_no_product_more():
  params = {"w": jnp.zeros((8, 12)), "v": jnp.zeros((12, 8))}

  def products(method):
    tx = galore(optax.adam(RATE), rank=2, residual=method)
    state = tx.init(params)
    lowered = jax.jit(tx.update).lower(params, state, params)
    return lowered.as_text().count("dot_general")

  plain = products(None)
  assert products("normalized") == plain
  assert products("factored") == plain + len(params)


@pytest.mark.parametrize("method", METHODS)
def test_stacked_matrices_are_each_by_themselves(method):
  params = {"w": jnp.zeros((3, 8, 12)), "v": jnp.zeros((8, 12))}
  tx = normalized(optax.adam(RATE), refresh="synchronous", residual=method)
  grads = [{"w": g} for g in gradients((3, 8, 12), SIZES[:5])]
  stack = [u["w"] for u, _ in run(tx, grads, {"w": params["w"]})]
  for i in range(3):
    single = run(tx, [{"w": g["w"][i]} for g in grads], {"w": params["v"]})
    for updates, (alone, _) in zip(stack, single, strict=True):
      np.testing.assert_allclose(updates[i], alone["w"], atol=1e-4 * RATE)


def test_layer_by_layer_equals_the_usual_step():
  tx = normalized(optax.adam(RATE), rules=small.RULES, residual_growth=1.01)
  state, other = small.train_both_ways(tx, GAP + 1, atol=2e-4)
  found = state.layers.recovery["layers"]
  assert found.columns.shape == (3, 16)
  np.testing.assert_allclose(
    found.columns, other.recovery["layers"].columns, rtol=1e-2
  )


def test_bfloat16_weights_get_float32_s_update():
  params = {"w": jnp.zeros((16, 24), jnp.bfloat16)}
  grads = [{"w": g} for g in gradients((16, 24), SIZES[:5])]
  tx = normalized(optax.adam(RATE))
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  wanted = run(tx, grads, wide)
  halves = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), grads)
  for (update, state), (other, _) in zip(
    run(tx, halves, params), wanted, strict=True
  ):
    assert update["w"].dtype == jnp.bfloat16
    assert state.recovery["w"].columns.dtype == jnp.float32
    error = jnp.linalg.norm(update["w"].astype(jnp.float32) - other["w"])
    assert error < 0.03 * jnp.linalg.norm(other["w"])


@pytest.mark.parametrize(
  ("recipe", "method"),
  [
    (galore_adamw_8bit, "factored"),
    (q_galore_adamw_8bit, "normalized"),
    slow(galore_adamw_8bit, "normalized"),
    slow(q_galore_adamw_8bit, "factored"),
  ],
)
def test_in_eight_bits(recipe, method):
  """It follows the residual of the recipe in float32.

  Where the residual is small, that of bases in 4 bits is another one: it has
  what their rounding leaves of the leading directions.
  """
  params = {"w": jnp.zeros((32, 48))}
  rng = np.random.default_rng(0)
  mean = rng.normal(size=(32, 48))
  grads = [
    {"w": np.float32(mean + 0.3 * rng.normal(size=mean.shape))}
    for _ in range(6)
  ]
  options = {"rank": 8, "update_proj_gap": GAP, "residual": method}
  rough = run(recipe(RATE, min_size=0, **options), grads, params)
  exact = run(normalized(optax.adam(RATE), **options), grads, params)
  for (update, _), (other, _) in zip(rough, exact, strict=True):
    cosine = jnp.vdot(update["w"], other["w"]) / (
      jnp.linalg.norm(update["w"]) * jnp.linalg.norm(other["w"])
    )
    assert cosine > 0.97


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"residual": "normalised"}, r"Did you mean 'normalized'"),
    ({"residual_factor": -1.0}, r"`residual_factor` must be 0 or more"),
    ({"residual_decay": 1.0}, r"at least 0 and below 1, got 1\.0"),
    ({"residual_decay": "0.9"}, r"`residual_decay` must be a number"),
    ({"residual_growth": 0.9}, r"`residual_growth` must be 1 or more.*0\.9"),
    ({"residual_growth": float("nan")}, r"`residual_growth` must be"),
    ({"residual": "fira", "residual_growth": 2.0}, r"is for residual='norm"),
    (
      {"residual": "fira", "residual_factor": 2.0},
      r"`residual_factor` is for residual='normalized'.*got residual='fira'",
    ),
    ({"residual": None, "residual_decay": 0.9}, r"got residual=None"),
    ({"accumulation_steps": 2}, r"whole gradient of a step"),
    ({"refresh": Refresh(finder="random")}, r"only measures gradients"),
  ],
)
def test_what_does_not_go_together(options, message):
  with pytest.raises((TypeError, ValueError), match=message):
    normalized(optax.adam(1.0), **options)


def test_an_inner_optimizer_that_hides_its_rate_is_refused():
  hidden = optax.rmsprop(1.0, momentum=0.9)
  with pytest.raises(ValueError, match="'w' without its learning rate"):
    normalized(hidden).init({"w": jnp.zeros((8, 12))})
