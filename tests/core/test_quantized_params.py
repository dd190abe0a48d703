"""Updates of quantized weights are right in expectation, and change no more."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  QArray,
  apply_updates,
  dequantize,
  dequantize_params,
  quantize,
  quantize_params,
)
from galore_optax.quantization import qarray
from tests.marks import slow


def normal(shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


WEIGHTS = {"bias": normal((64,)), "kernel": normal((256, 64))}
SMALL = quantize_params(WEIGHTS)
STEP = qarray.elementwise_scale(SMALL["kernel"])
add = jax.jit(apply_updates)


def read(params):
  return np.asarray(dequantize(params["kernel"]), np.float64)


@jax.jit
def mean_after(updates, keys):
  """The mean over keys of the kernel after an update."""

  def one(total, key):
    new = apply_updates(SMALL, updates, key)
    return total + dequantize(new["kernel"]), None

  total, _ = jax.lax.scan(one, jnp.zeros((256, 64)), keys)
  return total / len(keys)


@pytest.mark.parametrize("size", [1e-3, slow(0.3), slow(5.0)])
def test_updates_are_right_in_expectation(size):
  """Sizes are in steps of the format; the largest changes every code."""
  updates = {"bias": WEIGHTS["bias"], "kernel": size * STEP * normal((256, 64))}
  keys = jax.random.split(jax.random.key(0), 500)
  found = np.asarray(mean_after(updates, keys), np.float64) - read(SMALL)
  error = (found - np.asarray(updates["kernel"], np.float64)) / STEP
  # Each is within six sigmas, and the mean of all within five.
  assert np.abs(error).max() < 6 * 0.5 * 1.1 / np.sqrt(500)
  assert abs(error.mean()) < 5 * 0.5 / np.sqrt(500 * error.size)


TREES = {
  "norm": optax.tree.norm,
  "global_norm": optax.global_norm,
  "sum": optax.tree.sum,
  "max": optax.tree.max,
  "vdot": lambda x: optax.tree.vdot(x, x),
  "scale": lambda x: optax.tree.scale(0.5, x),
  "add_scale": lambda x: optax.tree.add_scale(x, 0.1, x),
  "div": lambda x: optax.tree.div(x, x),
  "cast": lambda x: optax.tree.cast(x, jnp.bfloat16),
  "float_cast": lambda x: jax.tree.map(
    lambda y: y.astype(jnp.bfloat16) if y.dtype == jnp.float32 else y, x
  ),
  "incremental_update": lambda x: optax.incremental_update(x, x, 0.1),
  "ema": lambda x: optax.ema(0.9).update(x, optax.ema(0.9).init(x)),
  "clip_by_global_norm": lambda x: optax.clip_by_global_norm(1.0).update(
    x, optax.EmptyState()
  ),
  "jit": jax.jit(lambda x: optax.tree.scale(0.5, x)),
}


@pytest.mark.parametrize("name", TREES)
def test_arithmetic_on_trees_is_refused(name):
  with pytest.raises(TypeError, match=r"QArray \(int8\).*`dequantize_params`"):
    TREES[name](SMALL)
  TREES[name](dequantize_params(SMALL))


OPERATORS = {
  "number": lambda x: x * 2.0,
  "reflected": lambda x: 2.0 * x,
  "NumPy scalar": lambda x: np.float32(2.0) * x,
  "NumPy array": lambda x: np.ones((256, 64)) + x,
  "asarray": lambda x: np.asarray(x),
  "matmul": lambda x: jnp.ones((2, 256)) @ x,
  "minus": lambda x: -x,
  "comparison": lambda x: x > 0.0,
  "index": lambda x: x[0],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_refused(name):
  with pytest.raises(TypeError, match=r"QArray.*`dequantize_params`"):
    OPERATORS[name](SMALL["kernel"])


@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
def test_trees_without_arithmetic_are_right(kind):
  """What moves and selects entries, and what makes no numbers of them."""
  small = quantize_params(WEIGHTS, kind=kind)
  other = jax.tree.map(lambda x: jnp.flip(x, -1), small)
  wanted = jax.tree.map(lambda x: jnp.flip(x, -1), dequantize_params(small))
  jax.tree.map(np.testing.assert_array_equal, dequantize_params(other), wanted)
  found = dequantize_params(optax.tree.where(True, small, other))
  jax.tree.map(np.testing.assert_array_equal, found, dequantize_params(small))
  zeros = dequantize_params(optax.tree.zeros_like(small))
  assert not any(x.any() for x in jax.tree.leaves(zeros))
  jax.tree.map(lambda x: x.shape, small)
  jax.tree.map(jnp.isfinite, small)
  jax.eval_shape(lambda x: x, small)


def test_small_updates_are_lost_without_a_key_and_not_with_one():
  updates = {"bias": jnp.zeros(64), "kernel": 0.02 * STEP}
  lost, rounded = SMALL, SMALL
  for i in range(50):
    lost = add(lost, updates, None)
    rounded = add(rounded, updates, jax.random.key(i))
  moved = (read(lost) - read(SMALL)) / STEP
  # Of one step in total almost all is lost; blocks with new levels move a bit.
  assert abs(moved.mean()) < 0.05
  moved = (read(rounded) - read(SMALL)) / STEP
  np.testing.assert_allclose(moved.mean(), 1.0, atol=0.03)


def test_blocks_without_an_update_are_bitwise_unchanged():
  zeros = jax.tree.map(jnp.zeros_like, WEIGHTS)
  same = add(SMALL, zeros, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, same, SMALL)
  one = {**zeros, "kernel": zeros["kernel"].at[3, 5].set(1e-3)}
  new = add(SMALL, one, jax.random.key(0))["kernel"]
  columns = np.arange(64) != 5  # one block each
  for part in ("codes", "scale", "zero"):
    x, y = getattr(new, part), getattr(SMALL["kernel"], part)
    np.testing.assert_array_equal(x[:, columns], y[:, columns])


def test_weights_without_updates_do_not_drift():
  """Although other weights of their blocks change at every step."""
  still = jnp.arange(256)[:, None] % 2 == 0
  updates = {"bias": jnp.zeros(64)}
  params = SMALL
  for i in range(60):
    noise = jax.random.normal(jax.random.key(i), (256, 64))
    updates["kernel"] = jnp.where(still, 0, 0.05 * STEP * noise)
    params = add(params, updates, jax.random.key(i))
  moved = (read(params) - read(SMALL)) / STEP
  assert np.std(moved[::2]) < 0.6  # rounded once or twice, not 60 times


def test_keys_differ_from_leaf_to_leaf():
  params = {"a/kernel": SMALL["kernel"], "b/kernel": SMALL["kernel"]}
  updates = {name: 0.5 * STEP for name in params}
  new = add(params, updates, jax.random.key(0))
  assert jnp.any(new["a/kernel"].codes != new["b/kernel"].codes)


def test_other_leaves_are_added_to_as_by_optax():
  params = {**SMALL, "half": jnp.ones((4,), jnp.bfloat16), "none": None}
  updates = {
    "bias": jnp.full(64, 0.25),
    "kernel": STEP,
    "half": jnp.full((4,), 1e-3, jnp.float32),
    "none": None,
  }
  new = add(params, updates, jax.random.key(0))
  plain = optax.apply_updates(
    {"bias": params["bias"], "half": params["half"]},
    {"bias": updates["bias"], "half": updates["half"]},
  )
  for name, x in plain.items():
    np.testing.assert_array_equal(new[name], x)
    assert new[name].dtype == x.dtype
  assert new["none"] is None
  same = add(SMALL, {"bias": None, "kernel": None}, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, same, SMALL)


def stacked(kind="int8"):
  """A stack of two axes, and updates of which some round to nothing."""
  weights = {"kernel": normal((3, 2, 64, 32))}
  updates = {"kernel": 3e-3 * normal((3, 2, 64, 32), seed=1)}
  return quantize_params(weights, kind=kind), updates


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_stack_is_rounded_as_its_matrices_are(kind):
  params, updates = stacked(kind)
  found = add(params, updates, None)["kernel"]
  for i, j in np.ndindex(3, 2):
    take = lambda tree, at=(i, j): jax.tree.map(lambda x: x[at], tree)
    one = add(take(params), take(updates), None)["kernel"]
    np.testing.assert_array_equal(one.codes, found.codes[i, j])
    np.testing.assert_array_equal(one.scale, found.scale[i, j])


def test_a_stack_on_a_mesh_is_rounded_as_on_one_device():
  params, updates = stacked()
  alone = add(params, updates, jax.random.key(0))
  mesh = jax.make_mesh((3,), ("d",), (jax.sharding.AxisType.Auto,))
  place = lambda tree: jax.device_put(tree, jax.NamedSharding(mesh, jax.P("d")))
  found = add(place(params), place(updates), jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, found, alone)


def test_a_stack_needs_memory_for_one_matrix():
  """That is, for the float32 sums of one, and not of all."""
  params = jax.eval_shape(
    lambda: quantize_params({"kernel": jnp.zeros((32, 512, 256))})
  )
  updates = {"kernel": jax.ShapeDtypeStruct((32, 512, 256), jnp.float32)}
  key = jax.eval_shape(lambda: jax.random.key(0))
  step = jax.jit(apply_updates, donate_argnums=0)
  memory = step.lower(params, updates, key).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 8 * 4 * 512 * 256


@pytest.mark.parametrize("kind", ["int4", "float8"])
def test_other_formats_train(kind):
  """A linear regression, with gradients at the dequantized weights."""
  key = None if kind == "float8" else jax.random.key(0)
  x, target = normal((32, 16)), normal((16, 8), 1)

  @jax.jit
  def step(params, i):
    loss = lambda p: jnp.mean((x @ (p["kernel"] - target)) ** 2)
    value, grads = jax.value_and_grad(loss)(dequantize_params(params))
    updates = jax.tree.map(lambda g: -0.5 * g, grads)
    now = None if key is None else jax.random.fold_in(key, i)
    return apply_updates(params, updates, now), value

  params = quantize_params({"kernel": 0.1 * normal((16, 8), 2)}, kind=kind)
  assert params["kernel"].kind == kind
  losses = []
  for i in range(60):
    params, value = step(params, i)
    losses.append(float(value))
  assert np.mean(losses[-10:]) < 0.1 * losses[0]
  assert jnp.dtype(params["kernel"].codes.dtype).itemsize == 1


def test_float8_has_no_random_rounding():
  """A key is ignored for float8: a tree may have both kinds of leaves."""
  params = quantize_params(WEIGHTS, kind="float8")
  drawn, nearest = (
    apply_updates(params, WEIGHTS, key) for key in (jax.random.key(0), None)
  )
  jax.tree.map(np.testing.assert_array_equal, drawn, nearest)
  with pytest.raises(ValueError, match=r"which 'float8' does not have"):
    quantize(jnp.ones((8, 4)), "float8", key=jax.random.key(0))


def test_rules_may_be_an_iterator():
  found = quantize_params({"w": jnp.ones((8, 300))}, iter(["w"]))
  assert isinstance(found["w"], QArray)


def test_which_leaves_are_quantized():
  params = {
    "attn": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)},
    "stack": {"kernel": jnp.ones((3, 8, 4))},
    "embed": jnp.ones((10, 4)),
    "kernel": quantize(jnp.ones((8, 4)), "int4"),
  }
  small = quantize_params(params)
  is_small = lambda x: isinstance(x, QArray)
  found = jax.tree.map(is_small, small, is_leaf=is_small)
  assert found == {
    "attn": {"kernel": True, "bias": False},
    "stack": {"kernel": True},
    "embed": False,
    "kernel": True,
  }
  assert small["kernel"] is params["kernel"]
  assert quantize_params(small)["attn"]["kernel"] is small["attn"]["kernel"]
  wide = dequantize_params(small, jnp.bfloat16)
  assert wide["stack"]["kernel"].dtype == jnp.bfloat16
  assert wide["embed"].dtype == jnp.float32
  assert jax.tree.map(jnp.shape, wide) == jax.tree.map(
    lambda x: x.shape, params, is_leaf=is_small
  )


@pytest.mark.parametrize(
  ("shape", "spec"), [((768, 32), ("x", "y")), slow((64, 1376), (None, "y"))]
)
def test_explicit_mesh(shape, spec):
  """Also where the mesh does not divide the blocks."""
  w, u, key = normal(shape), 0.1 * normal(shape, 1), jax.random.key(0)
  update = jax.jit(lambda q, u: apply_updates(q, {"kernel": u}, key))
  wanted = dequantize_params(update(quantize_params({"kernel": w}), u))
  with jax.set_mesh(jax.make_mesh((2, 4), ("x", "y"))):
    w, u = jax.device_put((w, u), jax.P(*spec))
    q = quantize_params({"kernel": w})
    new = update(q, u)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, q)
    assert q["kernel"].codes.sharding.spec == jax.P(*spec)
    found = jax.jit(dequantize_params)(new)["kernel"]
    assert found.sharding.spec == jax.P(*spec)
  np.testing.assert_allclose(found, wanted["kernel"], atol=1e-5)


@pytest.mark.parametrize(
  ("rules", "kind", "error", "message"),
  [
    (("kernel$",), "int3", ValueError, r"`kind` must be one of.*'int3'"),
    (("kernel$",), "dynamic", ValueError, r"`kind` must be one of.*'float8'"),
    ("kernel$", "int8", TypeError, r"`rules` must be.*got 'kernel\$'"),
    ((1,), "int8", TypeError, r"`rules` must be regular expressions"),
    (("attn",), "int8", ValueError, r"'attn'.*matches no leaf.*kernel"),
    (("bias",), "int8", ValueError, r"'bias'.*no leaf of two axes or more"),
    (("(",), "int8", ValueError, r"'\('.*not a regular expression"),
  ],
)
def test_errors(rules, kind, error, message):
  with pytest.raises(error, match=message):
    quantize_params(WEIGHTS, rules, kind)


def test_integers_are_not_quantized():
  with pytest.raises(TypeError, match=r"'kernel' is int32; only real float"):
    quantize_params({"kernel": jnp.ones((4, 4), int)})
