"""Bad input: one clear error that names what was found and what would work."""

import jax
import jax.numpy as jnp
import optax
import pytest

from galore_optax import (
  Projection,
  Refresh,
  apollo_adamw,
  apollo_mini_adamw,
  apply_updates,
  chain,
  dequantize_params,
  galore,
  galore_adamw,
  gum,
  ldadam,
  quantize_params,
  state_shardings,
  sumo,
)

PARAMS = {"w": jnp.ones((16, 24)), "bias": jnp.ones(24)}


@pytest.mark.parametrize(
  ("options", "error", "message"),
  [
    ({"rank": 0}, ValueError, r"`rank` must be positive.*got 0"),
    ({"rank": -3}, ValueError, r"`rank` must be positive.*got -3"),
    ({"rank": 1.5}, ValueError, r"at most 1\.0 if it is a fraction.*got 1\.5"),
    ({"rank": "128"}, TypeError, r"`rank` must be.*got '128'"),
    ({"rank": True}, TypeError, r"`rank` must be.*got True"),
    ({"rank": None}, TypeError, r"`rank` must be given"),
    ({"update_proj_gap": 0}, ValueError, r"`update_proj_gap` must be positive"),
    ({"update_proj_gap": -5}, ValueError, r"positive, got -5"),
    ({"update_proj_gap": "200"}, TypeError, r"must be a number, got '200'"),
    ({"scale": "1"}, TypeError, r"`scale` must be a number"),
    ({"scale": lambda t: t}, TypeError, r"inject_hyperparams"),
    ({"basis_dtype": "int32"}, TypeError, r"`basis_dtype`.*got 'int32'"),
    ({"basis_dtype": "int2"}, TypeError, r"or 'int4', or 'int8', got 'int2'"),
    ({"state_dtype": "bf16"}, TypeError, r"`state_dtype`.*got 'bf16'"),
    ({"proj_type": "sdt"}, ValueError, r"one of 'std'.*Did you mean 'std'"),
    ({"refresh": "lazy"}, ValueError, r"`refresh` must be one of"),
    ({"refresh": 2}, TypeError, r"`refresh` must be a galore_optax.Refresh"),
    ({"params_mode": "none"}, ValueError, r"`params_mode` must be one of"),
    ({"rules": "attn"}, TypeError, r"`rules` must be pairs"),
    ({"rules": ["attn"]}, TypeError, r"`rules` must be pairs.*got 'attn'"),
    ({"rules": [("attn", 64)]}, TypeError, r"'attn'.*Projection or None.*64"),
    ({"rules": [("(", None)]}, ValueError, r"not a regular expression"),
  ],
)
def test_arguments(options, error, message):
  with pytest.raises(error, match=message):
    galore(optax.adam(1.0), **options)


@pytest.mark.parametrize(
  ("fields", "error", "message"),
  [
    ({"policy": "lazy"}, ValueError, r"`policy` must be one of"),
    ({"finder": "eigh"}, ValueError, r"`finder` must be one of"),
    ({"iterations": 0}, ValueError, r"`iterations` must be positive, got 0"),
    ({"iterations": 1.5}, ValueError, r"`iterations` must be a whole number"),
    ({"moments": "rotated"}, ValueError, r"Did you mean 'rotate'"),
    ({"null_tolerance": -1}, ValueError, r"`null_tolerance` must be 0 or more"),
    ({"null_tolerance": "x"}, TypeError, r"`null_tolerance` must be a number"),
    ({"random_from": "late"}, TypeError, r"`random_from` must be a number"),
    ({"share": 1}, TypeError, r"`share` must be True or False, got 1"),
    ({"adaptive": 0.4}, TypeError, r"`adaptive` must be a galore_optax.Adapt"),
    ({"finder": "random", "policy": "adaptive"}, ValueError, r"could settle"),
    ({"finder": "random", "moments": "reset"}, ValueError, r"got moments='res"),
    ({"finder": "random", "random_from": 9}, ValueError, r"finder='random' do"),
  ],
)
def test_a_refresh_checks_its_own_fields(fields, error, message):
  with pytest.raises(error, match=message):
    Refresh(**fields)


def test_sixteen_bits_at_least():
  for name in ("basis_dtype", "state_dtype"):
    with pytest.raises(TypeError, match=f"`{name}` must be a floating-point"):
      galore(optax.adam(1e-3), rank=4, **{name: "float8_e4m3fn"})


@pytest.mark.parametrize(
  "make", [galore_adamw, apollo_adamw, apollo_mini_adamw, ldadam, sumo, gum]
)
def test_an_epsilon_that_is_zero_in_the_dtype_of_the_moments(make):
  with pytest.raises(ValueError, match=r"`eps`=1e-08 is 0 in.*'float16'"):
    make(1e-3, rank=4, state_dtype=jnp.float16)
  for options in (
    {"eps": 1e-6, "state_dtype": "float16"},
    {"state_dtype": "bfloat16"},
  ):
    make(1e-3, rank=4, **options)
    # As where a step makes its optimizer itself.
    init = lambda params, extra=options: make(1e-3, rank=4, **extra).init(
      params
    )
    jax.eval_shape(init, {"a": jnp.ones((16, 24)), "b": jnp.ones((16, 24))})


def test_codes_of_bases_may_be_dtypes():
  for code in ("int8", jnp.int8, jnp.dtype("int8")):
    tx = galore(optax.sgd(1.0), rank=4, basis_dtype=code)
    basis = tx.init(PARAMS).projector["w"]["left"]
    assert basis.kind == "int8"


@pytest.mark.filterwarnings("ignore:More matrices than")
def test_staggered_gaps_that_overflow():
  params = {"w": jax.ShapeDtypeStruct((300, 16, 24), jnp.float32)}
  make = lambda **options: galore(optax.sgd(1.0), rank=4, **options).init
  most = (2**31 - 1) // 300
  with pytest.raises(ValueError, match=f"'w'.*300 matrices.*at most {most}"):
    jax.eval_shape(make(update_proj_gap=most + 1), params)
  jax.eval_shape(make(update_proj_gap=most), params)
  options = {"update_proj_gap": 10**9, "refresh": "synchronous"}
  jax.eval_shape(make(**options), params)


def test_projection_checks_its_own_values():
  with pytest.raises(ValueError, match=r"`rank` must be positive.*got -1"):
    Projection(rank=-1)
  with pytest.raises(ValueError, match="`update_proj_gap` must be positive"):
    Projection(update_proj_gap=0)


def test_inner_must_be_a_transformation():
  with pytest.raises(TypeError, match=r"`inner` must be.*galore\(rank=128\)"):
    galore(128)


def test_two_markers():
  with pytest.raises(ValueError, match=r"got 2, at the positions \[0, 2\]"):
    chain(galore(), optax.scale(1.0), galore())


@pytest.mark.parametrize(
  ("params", "options", "error", "message"),
  [
    (PARAMS, {"rules": [("attention", None)]}, ValueError,
     r"'attention' in `rules` matches no leaf.*'bias', 'w'"),
    (PARAMS, {"rules": [("wv", None)]}, ValueError, r"Did you mean 'w'"),
    (PARAMS, {"rules": [("bias", Projection())]}, ValueError,
     r"'bias'.*shape \(24,\)"),
    (PARAMS, {"rules": [("w", Projection(rows=2))]}, ValueError,
     r"'w'.*`rows`.*got 2"),
    (PARAMS, {"rules": [("w", Projection(rows=1))]}, ValueError,
     r"'w'.*different axes"),
    ({"steps": jnp.ones((16, 24), int)}, {}, TypeError, r"'steps' is int32"),
    ({"fft": jnp.ones((16, 24), complex)}, {"rules": [("f", Projection())]},
     TypeError, r"'fft' is complex64.*rule None"),
  ],
)  # fmt: skip
def test_leaves(params, options, error, message):
  with pytest.raises(error, match=message):
    galore(optax.adam(1.0), rank=4, **options).init(params)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_complex_leaves_without_a_rule_are_optimized_at_full_rank(dtype):
  params = {"fft": jnp.ones((16, 24), complex), "w": jnp.ones((16, 24))}
  tx = galore(optax.adam(0.1), rank=4, state_dtype=dtype)
  control = optax.adam(0.1)
  grads = {"fft": (1 + 2j) * params["fft"], "w": params["w"]}
  ours, _ = tx.update(grads, tx.init(params), params)
  theirs, _ = control.update(grads, control.init(params), params)
  assert jnp.allclose(ours["fft"], theirs["fft"])


def _scaled_by_loss(tx):
  """An optimizer that takes its extra argument out of a dict."""

  def update(updates, state, params=None, **extra_args):
    updates, state = tx.update(updates, state, params)
    return optax.tree.scale(extra_args["loss"], updates), state

  return optax.GradientTransformationExtraArgs(tx.init, update)


@pytest.mark.parametrize(
  "inner",
  [
    optax.lamb(1e-3),
    optax.lars(1e-3),
    optax.adafactor(1e-3),
    optax.chain(optax.add_decayed_weights(0.1), optax.adam(1e-3)),
    optax.adaptive_grad_clip(0.1),
    # Their updates need the loss, which `init` does not know.
    optax.contrib.momo(),
    optax.chain(optax.contrib.momo_adam(), optax.contrib.reduce_on_plateau()),
    _scaled_by_loss(optax.lamb(1e-3)),
  ],
)
def test_coupled_optimizers_are_refused_with_the_working_spelling(inner):
  with pytest.raises(ValueError, match=r"scale_by_adam\(\), rank=128") as error:
    galore(inner, rank=4).init(PARAMS)
  assert "'w'" in str(error.value)
  assert 'params_mode="project"' in str(error.value)
  galore(inner, rank=4, params_mode="project").init(PARAMS)


@pytest.mark.parametrize(
  "inner",
  [
    optax.contrib.schedule_free_sgd(1e-3),
    optax.contrib.prodigy(),
    optax.contrib.dog(),
    optax.contrib.madgrad(1e-3),
  ],
)
def test_optimizers_that_store_initial_weights_are_refused(inner):
  with pytest.raises(ValueError, match=r"scale_by_adam\(\), rank=128"):
    galore(inner, rank=4).init(PARAMS)
  tx = galore(inner, rank=4, params_mode="project")
  with pytest.raises(ValueError, match="keeps where the weights began"):
    tx.init(PARAMS)


@pytest.mark.filterwarnings("ignore:galore projects none")
@pytest.mark.parametrize("mode", ["split", "project"])
@pytest.mark.parametrize(
  ("inner", "name"),
  [
    (optax.contrib.sophia(1e-3), "obj_fn"),
    (
      optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True),
      "grad_fn",
    ),
  ],
)
def test_functions_of_the_whole_parameters_are_refused(inner, name, mode):
  with pytest.raises(
    ValueError, match=rf"needs `{name}`.*\n.*\n.*\n.*rank=128"
  ):
    galore(inner, rank=4, params_mode=mode).init(PARAMS)
  # Where nothing is projected, the optimizer sees the whole parameters.
  galore(inner, rank=4, rules=[("w", None)], params_mode=mode).init(
    {"w": PARAMS["w"]}
  )


@pytest.mark.parametrize(
  ("inner", "mode"),
  [
    (optax.contrib.momo(), "project"),
    (optax.polyak_sgd(), "split"),
    (_scaled_by_loss(optax.adamw(1e-3)), "split"),
  ],
)
def test_an_inner_that_needs_the_loss(inner, mode):
  tx = galore(inner, rank=4, params_mode=mode)
  state = tx.init(PARAMS)
  args = {"loss": 0.5} if mode == "split" else {}
  args |= {"value": 0.5}
  updates, _ = tx.update(PARAMS, state, PARAMS, **args)
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))
  assert jnp.any(updates["w"] != 0)


def test_a_residual_beside_an_inner_that_needs_the_loss():
  tx = galore(_scaled_by_loss(optax.adam(1e-3)), rank=4, residual="fira")
  updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, loss=0.5)
  assert jnp.any(updates["w"] != 0)


def test_the_wrapper_that_needs_gradients_goes_around():
  grad = lambda params, _: params
  tx = optax.contrib.sam(
    galore(optax.sgd(0.1), rank=4), optax.sgd(0.1), opaque_mode=True
  )
  updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad_fn=grad)
  assert jnp.any(updates["w"] != 0)


def test_inner_whose_moments_cannot_be_found():
  with pytest.raises(ValueError, match="cannot be wrapped"):
    galore(optax.lbfgs(), rank=4).init(PARAMS)


def test_the_working_spelling_works():
  tx = optax.chain(
    galore(optax.scale_by_adam(), rank=4),
    optax.add_decayed_weights(0.1),
    optax.scale_by_trust_ratio(),
    optax.scale_by_learning_rate(0.1),
  )
  updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))


TX = galore_adamw(1e-3, rank=4)


@pytest.mark.parametrize(
  ("grads", "message"),
  [
    ({"w": PARAMS["w"]}, r"'bias' is \(24,\) in `params` but is missing"),
    ({**PARAMS, "x": 1.0}, r"'x' is missing in `params` but is \(\)"),
    ({**PARAMS, "w": PARAMS["w"].T}, r"'w' is \(16, 24\).*\(24, 16\)"),
    ({**PARAMS, "w": None}, r"'w' is \(16, 24\).*is missing"),
  ],
)
def test_gradients_that_are_not_the_parameters(grads, message):
  with pytest.raises(ValueError, match=message):
    TX.update(grads, TX.init(PARAMS), PARAMS)


def test_gradients_that_do_not_fit_the_state():
  state = TX.init(PARAMS)
  with pytest.raises(ValueError, match=r"'w' has shape \(24, 16\).*\(16, 4\)"):
    TX.update({**PARAMS, "w": PARAMS["w"].T}, state)
  with pytest.raises(ValueError, match=r"projects the leaf 'w'.*'bias'"):
    TX.update({"bias": PARAMS["bias"]}, state)


def test_update_without_params_when_the_inner_needs_them():
  with pytest.raises(ValueError, match="not passing `params`"):
    TX.update(PARAMS, TX.init(PARAMS))
  tx = galore(optax.adam(1e-3), rank=4)
  tx.update(PARAMS, tx.init(PARAMS))


def test_traced_rank():
  init = lambda rank: galore(optax.adam(1.0), rank=rank).init(PARAMS)
  with pytest.raises(ValueError, match="`rank` decides the shapes"):
    jax.jit(init)(4)


def test_state_shardings_want_named_shardings():
  with pytest.raises(ValueError, match=r"one jax\.NamedSharding for each"):
    state_shardings(TX, PARAMS, {"w": jax.P(), "bias": jax.P()})


QUANTIzED = quantize_params({"attn": {"kernel": jnp.ones((64, 96))}})
NOT_AN_ARRAY = r"'attn/kernel' is a QArray \(int8, shape \(64, 96\)\)"


@pytest.mark.parametrize(
  ("call", "advice"),
  [
    (lambda q: TX.init(q), "before `quantize_params`"),
    (
      lambda q: TX.update(q, TX.init(dequantize_params(q))),
      "gradients at `dequantize_params",
    ),
    (
      lambda q: apply_updates(q, q, jax.random.key(0)),
      "gradient at `dequantize_params",
    ),
  ],
)
def test_quantized_weights_where_arrays_belong(call, advice):
  with pytest.raises(TypeError, match=NOT_AN_ARRAY) as error:
    call(QUANTIzED)
  assert advice in str(error.value)


def test_arithmetic_with_quantized_weights():
  with pytest.raises(TypeError, match="`dequantize_params`"):
    jnp.ones(64) @ QUANTIzED["attn"]["kernel"]


def test_an_update_of_another_shape_than_its_quantized_weight():
  with pytest.raises(ValueError, match=r"'attn/kernel' is \(1, 96\).*\(64, 96"):
    apply_updates(QUANTIzED, {"attn": {"kernel": jnp.ones((1, 96))}}, None)


def test_the_optimizer_before_its_subspace():
  with pytest.warns(UserWarning, match=r"comes last.*chain\(galore\(rank"):
    chain(optax.adam(1.0), galore(rank=4)).init(PARAMS)
  with pytest.warns(UserWarning, match="before or after it are full-size"):
    optax.chain(optax.adam(1.0), galore(rank=4)).init(PARAMS)


@pytest.mark.parametrize(
  ("params", "options", "parts"),
  [
    (PARAMS, {"rank": 64}, [r"none of the 2 leaves", "no smaller at rank 16",
     "its name (1)", "smaller `rank`"]),
    ({"embed": PARAMS["w"]}, {}, ["its name (1)", "`rules`"]),
    (PARAMS, {"rules": [("w", None)]}, ["rule 'w' (1)"]),
    ({"a": jnp.ones(3)}, {}, ["no matrix (1)", "two axes"]),
  ],
)  # fmt: skip
def test_projecting_nothing_warns_with_the_reason(params, options, parts):
  with pytest.warns(UserWarning, match="projects none") as warning:
    galore(optax.adam(1.0), **({"rank": 4} | options)).init(params)
  assert all(part in str(warning[0].message) for part in parts)


def test_parts_that_are_meant_to_stay_at_full_rank_do_not_warn(recwarn):
  masked = optax.masked(TX, {"w": False, "bias": True})
  masked.init(PARAMS)
  TX.init({})
  assert not list(recwarn)
