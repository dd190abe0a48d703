"""LoRA and its relatives against their defining equations, in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import galore_optax
from galore_optax import (
  Projection,
  adamw_8bit,
  dequantize,
  galore_adamw,
  state_bytes,
)
from galore_optax.baselines import (
  Adapter,
  jagged_schedule,
  lora,
  low_rank,
  qlora,
  relora,
)
from galore_optax.subspace import moments
from tests.marks import slow

KEY = jax.random.key(0)
RULES = (
  ("conv", Projection(rows=(0, 1, 2), cols=3)),
  ("heads", Projection(rank=3, rows=0, cols=(1, 2))),
  ("skipped", None),
)


def normal(shape, seed=0, dtype="float32"):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape) / 8, dtype)


PARAMS = {
  "layers": {"kernel": normal((3, 24, 40)), "norm": jnp.ones((3, 24))},
  "heads": {"kernel": normal((24, 4, 8), 1)},
  "conv": {"kernel": normal((3, 3, 4, 16), 2)},
  "skipped": {"kernel": normal((24, 24), 3)},
}
LORA = lora(rank=4, alpha=8.0, rules=RULES, full=("norm",))
RELORA = relora(rank=4, alpha=8.0, rules=RULES, full=("norm",), pruned=0.75)


@functools.cache
def divide(method):
  return jax.jit(method.init)


@functools.cache
def join(method):
  return jax.jit(method.apply)


def perturbed(adapters, seed=7):
  """The adapters as if they had been trained."""
  rng = np.random.default_rng(seed)
  noise = lambda x: x + jnp.asarray(rng.normal(size=x.shape), x.dtype)
  return jax.tree.map(noise, adapters)


def same(x, y):
  jax.tree.map(np.testing.assert_array_equal, x, y)


def test_nothing_changes_at_first():
  for params in (PARAMS, jax.tree.map(lambda x: x.astype("bfloat16"), PARAMS)):
    frozen, adapters = divide(LORA)(KEY, params)
    found = join(LORA)(frozen, adapters)
    same(found, params)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    dtypes = jax.tree.map(lambda x: x.dtype, (found, params))
    assert dtypes[0] == dtypes[1]
    assert adapters["layers/kernel"].a.dtype == params["layers"]["kernel"].dtype
  # If both factors were zero, they would stay zero.
  size = np.abs(adapters["layers/kernel"].a.astype("float32"))
  assert 0.9 * 24**-0.5 < size.max() <= 24**-0.5 and size.min() < 0.01


def test_in_double_precision_nothing_is_rounded():
  with jax.enable_x64(True):
    values = np.random.default_rng(0).normal(size=(16, 24))
    params = {"w": jnp.asarray(values)}
    method = lora(rank=2)
    frozen, adapters = method.init(KEY, params)
    same(method.apply(frozen, adapters), params)
    frozen, adapters = method.init(KEY, params)
    trained = jax.tree.map(lambda x: x + 0.1, adapters)
    found = method.apply(frozen, trained)["w"]
    change = trained["w"].scale * (trained["w"].a @ trained["w"].b)
    np.testing.assert_allclose(found, params["w"] + change, rtol=1e-14)


def test_merged_weights_are_the_sum():
  frozen, adapters = divide(LORA)(KEY, PARAMS)
  assert list(adapters) == [
    "conv/kernel", "heads/kernel", "layers/kernel", "layers/norm"
  ]  # fmt: skip
  adapters = perturbed(adapters)
  found = jax.jit(LORA.merge)(frozen, adapters)
  product = {
    name: np.float64(x.a) @ np.float64(x.b)
    for name, x in adapters.items()
    if isinstance(x, Adapter)
  }
  expected = {
    "layers": {
      "kernel": PARAMS["layers"]["kernel"] + 8 / 4 * product["layers/kernel"],
      "norm": adapters["layers/norm"],
    },
    "heads": {
      "kernel": PARAMS["heads"]["kernel"]
      + 8 / 3 * product["heads/kernel"].reshape(24, 4, 8)
    },
    "conv": {
      "kernel": PARAMS["conv"]["kernel"]
      + 8 / 4 * product["conv/kernel"].reshape(3, 3, 4, 16)
    },
    "skipped": PARAMS["skipped"],
  }
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
    found,
    expected,
  )


def test_only_adapters_get_gradients():
  frozen, adapters = divide(LORA)(KEY, PARAMS)
  adapters = perturbed(adapters)
  towards = jax.tree.map(lambda x: normal(x.shape, 9), PARAMS)

  @jax.jit
  def gradient(adapters):
    loss = lambda x: optax.tree.vdot(LORA.apply(frozen, x), towards)
    return jax.grad(loss)(adapters)

  grads = gradient(adapters)
  assert jax.tree.structure(grads) == jax.tree.structure(adapters)
  x, g = adapters["layers/kernel"], np.float64(towards["layers"]["kernel"])
  found = grads["layers/kernel"]
  np.testing.assert_allclose(
    found.a, 2 * g @ np.swapaxes(x.b, 1, 2), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    found.b, 2 * np.swapaxes(x.a, 1, 2) @ g, rtol=1e-4, atol=1e-5
  )
  same(grads["layers/norm"], towards["layers"]["norm"])
  # Leaves with neither factors nor a pattern in `full` are frozen.
  assert not any("skipped" in name for name in grads)


def steps(method, tx, frozen, adapters, state, count, target):
  @jax.jit
  def step(adapters, state):
    def loss(x):
      return optax.tree.norm(
        optax.tree.sub(method.apply(frozen, x), target), squared=True
      )

    grads = jax.grad(loss)(adapters)
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state

  for _ in range(count):
    adapters, state = step(adapters, state)
  return adapters, state


def test_the_rank_of_the_change_grows_with_each_restart():
  params = {"kernel": normal((24, 40))}
  target = {"kernel": normal((24, 40), 5)}
  method, tx = relora(rank=4, alpha=4.0, full=()), optax.adam(1e-2)
  frozen, adapters = divide(method)(KEY, params)
  state, restart, ranks = tx.init(adapters), jax.jit(method.restart), []
  for i in range(4):
    adapters, state = steps(method, tx, frozen, adapters, state, 5, target)
    change = join(method)(frozen, adapters)["kernel"] - params["kernel"]
    ranks.append(np.linalg.matrix_rank(change, tol=1e-5))
    before = join(method)(frozen, adapters)
    kinds = jax.tree.map(lambda x: x.dtype, (frozen, adapters, state))
    new = restart(jax.random.key(i), frozen, adapters, state)
    assert jax.tree.structure(new) == jax.tree.structure(
      (frozen, adapters, state)
    )
    assert jax.tree.map(lambda x: x.dtype, new) == kinds
    assert jnp.any(new[1]["kernel"].a != adapters["kernel"].a)
    frozen, adapters, state = new
    same(frozen, before)
    same(join(method)(frozen, adapters), before)
    assert not jnp.any(adapters["kernel"].b)
  assert ranks == [4, 8, 12, 16]
  assert restart._cache_size() == 1


def test_restarts_differ_by_their_key():
  frozen, adapters = divide(RELORA)(KEY, PARAMS)
  restart = jax.jit(lambda key: RELORA.restart(key, frozen, adapters, ()))
  one, same_, other = (restart(jax.random.key(i)) for i in (1, 1, 2))
  same(one, same_)
  assert jnp.all(one[1]["layers/kernel"].a != other[1]["layers/kernel"].a)


def random_state(tx, adapters):
  state = tx.init(adapters)
  rng = np.random.default_rng(0)
  fill = lambda x: (
    jnp.asarray(rng.normal(size=x.shape), x.dtype)
    if jnp.issubdtype(x.dtype, jnp.floating)
    else x + 7
  )
  return jax.tree.map(fill, state)


def test_restarts_prune_the_moments_of_factors_and_nothing_else():
  frozen, adapters = divide(RELORA)(KEY, PARAMS)
  state = random_state(optax.adam(1e-3), adapters)
  _, fresh, new = jax.jit(RELORA.restart)(KEY, frozen, adapters, state)
  same(fresh["layers/norm"], adapters["layers/norm"])
  assert new[0].count == state[0].count == 7
  moments = [(getattr(state[0], n), getattr(new[0], n)) for n in ("mu", "nu")]
  for factor in ("a", "b"):
    pairs = [
      [np.asarray(getattr(tree["layers/kernel"], factor)) for tree in pair]
      for pair in moments
    ]
    size = np.abs(pairs[0][0] * pairs[1][0])
    least = np.quantile(size, 0.75, axis=(1, 2), keepdims=True, method="lower")
    for old, pruned in pairs:
      np.testing.assert_array_equal(pruned, np.where(size > least, old, 0))
      share = np.mean(pruned == 0, axis=(1, 2))
      np.testing.assert_allclose(share, 0.75, atol=0.01)
  for old, pruned in moments:
    same(pruned["layers/norm"], old["layers/norm"])


def test_gradients_that_multi_steps_adds_up_are_not_pruned():
  """Right after a step their sum is zero, whatever the moments are."""
  method = relora(rank=8, pruned=0.75)
  params = {"kernel": normal((96, 128))}
  frozen, adapters = divide(method)(KEY, params)
  steps_ = optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation()
  state = random_state(steps_, adapters)
  pending = jax.tree.map(jnp.zeros_like, state.acc_grads)
  state = state._replace(acc_grads=pending)
  new = jax.jit(method.restart)(KEY, frozen, adapters, state)[2]
  pruned = new.inner_opt_state[0].mu["kernel"].a
  np.testing.assert_allclose(np.mean(pruned == 0), 0.75, atol=0.02)


@pytest.mark.parametrize("pruning", ["magnitude", "random"])
def test_updates_stay_small_after_a_restart(pruning):
  """No first moment is pruned if its second one is pruned."""
  method = relora(rank=8, pruned=0.9, pruning=pruning)
  params, target = ({"kernel": normal((96, 128), i)} for i in (1, 2))
  frozen, adapters = divide(method)(KEY, params)
  tx = optax.adam(1e-2)
  adapters, state = steps(
    method, tx, frozen, adapters, tx.init(adapters), 5, target
  )
  frozen, adapters, state = jax.jit(method.restart)(
    KEY, frozen, adapters, state
  )
  # b starts from zero again, so that a has no gradient at first.
  none = jax.tree.map(jnp.zeros_like, adapters)
  for _ in range(2):
    updates, state = jax.jit(tx.update)(none, state)
    assert max(map(jnp.max, map(jnp.abs, jax.tree.leaves(updates)))) < 0.1


def test_moments_that_galore_keeps_at_a_lower_rank_are_pruned():
  method = relora(rank=8, pruned=1.0)
  params, target = ({"kernel": normal((96, 128), i)} for i in (1, 2))
  frozen, adapters = divide(method)(KEY, params)
  tx = galore_adamw(1e-2, rank=2)
  adapters, state = steps(
    method, tx, frozen, adapters, tx.init(adapters), 3, target
  )

  def find(state):
    inner = optax.tree.get(state, "inner_state")
    trees = moments.find_moments(inner).values()
    return [tree.low["kernel/a"] for _, tree in trees]

  assert len(find(state)) == 2 and all(x.any() for x in find(state))
  new = jax.jit(method.restart)(KEY, frozen, adapters, state)[2]
  assert not any(x.any() for x in find(new))
  kept, bases = (optax.tree.get(x, "projector") for x in (new, state))
  same(kept, bases)


def test_of_equal_moments_a_share_is_kept():
  method = relora(rank=8, pruned=0.9)
  frozen, adapters = divide(method)(KEY, {"kernel": normal((96, 128))})
  state = jax.tree.map(jnp.ones_like, optax.trace(0.9).init(adapters))
  new = jax.jit(method.restart)(KEY, frozen, adapters, state)[2]
  found = new.trace["kernel"].a
  np.testing.assert_allclose(np.mean(found == 1), 0.1, atol=0.01)


@pytest.mark.parametrize(
  ("how", "share"),
  [({"pruned": 1}, 1), ({"pruned": 0}, 0), ({"pruning": "random"}, 0.9)],
)
def test_other_ways_to_prune(how, share):
  method = relora(rank=8, **how)
  frozen, adapters = divide(method)(KEY, {"kernel": normal((96, 128))})
  state = random_state(optax.trace(0.9), adapters)
  _, _, new = jax.jit(method.restart)(KEY, frozen, adapters, state)
  x, y = state.trace["kernel"].a, new.trace["kernel"].a
  np.testing.assert_allclose(
    np.mean(y == 0), share, atol=0.04 if 0 < share < 1 else 0
  )
  assert jnp.all((y == 0) | (y == x))


def test_moments_in_eight_bits_are_pruned_too():
  method = relora(rank=32, alpha=32.0, full=(), pruned=0.9)
  params, target = ({"kernel": normal((256, 256), i)} for i in (1, 2))
  frozen, adapters = divide(method)(KEY, params)
  tx = adamw_8bit(1e-2)
  adapters, state = steps(
    method, tx, frozen, adapters, tx.init(adapters), 3, target
  )
  new = jax.jit(method.restart)(KEY, frozen, adapters, state)[2]
  assert jax.tree.structure(new) == jax.tree.structure(state)
  for old, pruned in ((state[0].mu, new[0].mu), (state[0].nu, new[0].nu)):
    old, pruned = (dequantize(x["kernel"].a) for x in (old, pruned))
    assert 0.88 < np.mean(pruned == 0) < 0.93
    stays = np.asarray(pruned != 0)
    np.testing.assert_allclose(pruned[stays], old[stays], rtol=0.02)


def test_the_jagged_schedule():
  base = optax.warmup_cosine_decay_schedule(0, 0.5, 10, 100, 0.05)
  found = jax.vmap(jagged_schedule(base, 25, warmup=5))(jnp.arange(100))
  plain = np.asarray(jax.vmap(base)(jnp.arange(100)))
  t = np.arange(100)
  ramp = np.where(t >= 25, np.minimum(1, t % 25 / 5), 1)
  np.testing.assert_allclose(found, plain * ramp, rtol=1e-6)
  at_once = jax.vmap(jagged_schedule(0.5, 25, warmup=0))(jnp.arange(100))
  np.testing.assert_array_equal(at_once, 0.5)
  with pytest.raises(ValueError, match="fewer than the 25"):
    jagged_schedule(base, 25, warmup=25)


@pytest.mark.parametrize(
  "method", [LORA, qlora(4, rules=RULES)], ids=["lora", "qlora"]
)
def test_a_stack_equals_its_matrices(method):
  """Except for a random start: a stack of factors has one key."""
  frozen, adapters = divide(method)(KEY, PARAMS)
  adapters = perturbed(adapters)
  whole = join(method)(frozen, adapters)["layers"]["kernel"]
  one = {"layers": {"kernel": PARAMS["layers"]["kernel"][1]}}
  alone = lora(4, method.alpha) if method is LORA else qlora(4, method.alpha)
  frozen, fresh = divide(alone)(KEY, one)
  x, y = fresh["layers/kernel"], adapters["layers/kernel"]
  trained = {"layers/kernel": Adapter(y.a[1], y.b[1], x.view, x.scale, x.dtype)}
  found = join(alone)(frozen, trained)["layers"]["kernel"]
  # Scales of a stack may be quantized in other blocks than those of a matrix.
  limit = 1e-6 if method is LORA else 0.004 * np.abs(whole).max()
  np.testing.assert_allclose(found, whole[1], atol=limit)


def spectrum(shape, decay):
  """Matrices whose i-th singular value is i^-decay."""
  rng = np.random.default_rng(0)
  *stack, m, n = shape
  u, _ = np.linalg.qr(rng.normal(size=(*stack, m, m)))
  v, _ = np.linalg.qr(rng.normal(size=(*stack, n, m)))
  values = np.arange(1, m + 1.0) ** -decay
  return np.float32(u * values @ np.swapaxes(v, -1, -2))


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_low_rank_starts_at_the_best_approximation(decay):
  x = spectrum((2, 32, 48), decay)
  method = low_rank(rank=8)
  frozen, adapters = divide(method)(KEY, {"kernel": jnp.asarray(x)})
  assert not jax.tree.leaves(frozen)
  found = np.asarray(join(method)(frozen, adapters)["kernel"])
  values = np.linalg.svd(x, compute_uv=False)
  best = (values[:, 8:] ** 2).sum(-1)
  error = ((found - x) ** 2).sum((-2, -1))
  assert np.all(error >= best * (1 - 1e-4))
  # It exceeds the smallest possible error by less than 1% of the squared norm.
  assert np.all(error - best < 0.01 * (values**2).sum(-1))
  sizes = [np.linalg.norm(f, axis=(1, 2)) for f in jax.tree.leaves(adapters)]
  np.testing.assert_allclose(*sizes, rtol=1e-4)


def test_low_rank_can_start_at_random_and_has_no_weights_beside_it():
  method = low_rank(rank=16, start="random")
  params = {"kernel": normal((96, 128)), "bias": normal((128,))}
  frozen, adapters = divide(method)(KEY, params)
  found = join(method)(frozen, adapters)
  np.testing.assert_allclose(np.std(found["kernel"]), 1 / 8, rtol=0.1)
  assert np.linalg.matrix_rank(found["kernel"], tol=1e-4) == 16
  same(adapters["bias"], params["bias"])
  tx, target = optax.adam(1e-2), {"kernel": normal((96, 128), 4)}
  target["bias"] = jnp.zeros(128)
  trained, _ = steps(
    method, tx, frozen, adapters, tx.init(adapters), 10, target
  )
  now = join(method)(frozen, trained)
  distance = lambda x: optax.tree.norm(optax.tree.sub(x, target))
  assert distance(now) < 0.95 * distance(found)
  assert np.linalg.matrix_rank(now["kernel"], tol=1e-4) == 16
  with pytest.raises(ValueError, match="kept in full"):
    method.restart(KEY, frozen, adapters, ())


@pytest.mark.parametrize("start", ["spectral", "random"])
def test_weights_of_zeros_are_learned_too(start):
  """Output projections often are zero at first: one factor needs a gradient."""
  method = low_rank(rank=8, start=start)
  params, target = (
    {"kernel": jnp.zeros((96, 128))},
    {"kernel": normal((96, 128))},
  )
  frozen, adapters = divide(method)(KEY, params)
  same(join(method)(frozen, adapters)["kernel"], params["kernel"])
  tx = optax.adam(1e-2)
  trained, _ = steps(method, tx, frozen, adapters, tx.init(adapters), 5, target)
  assert jnp.abs(join(method)(frozen, trained)["kernel"]).max() > 1e-3


def test_half_a_byte_for_each_frozen_weight():
  """In the compiled program, not only by the name of the dtype."""
  params = {"kernel": normal((512, 384))}
  for double, bits in ((False, 4.5), (True, 4 + 8 / 64 + 32 / 2**14)):
    method = qlora(rank=1, double_quantization=double)
    frozen, adapters = divide(method)(KEY, params)
    assert state_bytes(frozen) <= 512 * 384 * bits / 8 * 1.002
    shapes = jax.eval_shape(lambda x: x, (frozen, adapters))
    compiled = jax.jit(method.apply).lower(*shapes).compile()
    sizes = compiled.memory_analysis()
    assert sizes.argument_size_in_bytes < 512 * 384 * bits / 8 + 4 * 1024
    with pytest.raises(ValueError, match="kept in full"):
      method.restart(KEY, frozen, adapters, ())


def test_only_four_bits_of_a_weight_are_kept():
  method = qlora(rank=4, alpha=8.0, rules=RULES)
  frozen, adapters = divide(method)(KEY, PARAMS)
  adapters = perturbed(adapters)
  change = (
    2
    * np.float64(adapters["layers/kernel"].a)
    @ np.float64(adapters["layers/kernel"].b)
  )
  q = frozen["layers"]["kernel"]
  found = join(method)(frozen, adapters)["layers"]["kernel"]
  np.testing.assert_allclose(found, dequantize(q) + change, atol=1e-5)
  off = np.abs(dequantize(q) - PARAMS["layers"]["kernel"])
  assert 0 < off.max() < 0.16 * np.abs(PARAMS["layers"]["kernel"]).max()
  same(frozen["skipped"], PARAMS["skipped"])


def test_saved_and_restored(tmp_path):
  for i, method in enumerate((RELORA, qlora(4, rules=RULES, full=("norm",)))):
    frozen, adapters = divide(method)(KEY, PARAMS)
    adapters = perturbed(adapters)
    whole = (frozen, adapters, optax.adam(1e-3).init(adapters))
    path = str(tmp_path / str(i))
    ocp.save(path, whole)
    like = jax.eval_shape(lambda whole=whole: whole)
    found = ocp.load(path, like)
    same(found, whole)
    same(join(method)(*found[:2]), join(method)(frozen, adapters))


def test_parameters_in_the_boxes_of_flax():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.up = nnx.Linear(
        16, 48, kernel_metadata={"out_sharding": ("embed", "mlp")}, rngs=rngs
      )
      self.norm = nnx.RMSNorm(48, rngs=rngs)

    def __call__(self, x):
      return self.norm(self.up(x))

  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((2, 4), ("embed", "mlp"), axis_types=auto)
  with jax.set_mesh(mesh):
    graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    check_boxes(graph, params)


def check_boxes(graph, params):
  method = lora(rank=2, full=("norm",))
  frozen, adapters = method.init(KEY, params)
  assert list(adapters) == ["norm/scale", "up/kernel"]
  found = method.merge(frozen, perturbed(adapters))
  assert jax.tree.structure(found) == jax.tree.structure(params)
  x = adapters["up/kernel"]
  assert (x.a.shape, x.b.shape) == ((16, 2), (2, 48))
  loss = lambda adapters: jnp.sum(
    nnx.merge(graph, method.apply(frozen, adapters))(jnp.ones((3, 16))) ** 3
  )
  grads = jax.jit(jax.grad(loss))(adapters)
  assert jnp.any(grads["up/kernel"].b != 0)
  assert x.a.sharding.spec == jax.P("embed", None)


@pytest.mark.parametrize(
  "method",
  [slow(lora(4)), qlora(4), low_rank(4)],
  ids=["lora", "qlora", "low_rank"],
)
def test_explicit_meshes(method):
  mesh = jax.make_mesh((2, 4), ("x", "y"))
  params = {"kernel": normal((2, 64, 128))}
  spec = jax.P(None, "x", "y")
  sharded = jax.device_put(params, jax.NamedSharding(mesh, spec))
  frozen, adapters = divide(method)(KEY, params)
  with jax.set_mesh(mesh):
    found = jax.jit(method.init)(KEY, sharded)
    a, b = found[1]["kernel"].a, found[1]["kernel"].b
    assert a.sharding.spec == jax.P(None, "x", None)
    assert b.sharding.spec == jax.P(None, None, "y")
    whole = jax.jit(method.apply)(*found)["kernel"]
    assert whole.sharding.spec == spec
  expected = join(method)(frozen, adapters)["kernel"]
  np.testing.assert_allclose(whole, expected, atol=2e-4)


@pytest.mark.parametrize(
  ("make", "error", "match"),
  [
    (lambda: lora(0), ValueError, "`rank` must be positive"),
    (lambda: lora(True), TypeError, "`rank` must be a positive int"),
    (lambda: lora(4, alpha=0.0), ValueError, "`alpha` must be positive"),
    (lambda: lora(4, dtype="int8"), TypeError, "floating-point dtype"),
    (lambda: lora(4, full="norm"), TypeError, "regular expressions"),
    (lambda: lora(4, rules=[("x", 3)]), TypeError, "Projection or None"),
    (
      lambda: lora(4, rules=[("x", Projection(scale=0.25))]),
      ValueError,
      "sets `scale`, which adapters do not use",
    ),
    (lambda: relora(4, pruned=1.5), ValueError, r"lie in \[0, 1\]"),
    (lambda: relora(4, pruning="magnitud"), ValueError, "Did you mean"),
    (lambda: low_rank(4, start="svd"), ValueError, "`start` must be one of"),
    (lambda: lora(4, full=("bais",)).init(KEY, PARAMS), ValueError, "'bais'"),
    (
      lambda: lora(4, rules=[("kernal", None)]).init(KEY, PARAMS),
      ValueError,
      "matches no leaf. Did you mean",
    ),
    (
      lambda: lora(4).init(KEY, {"bias": jnp.ones(3)}),
      ValueError,
      r"No leaf gets factors: bias \(its name\)",
    ),
    (
      lambda: lora(4).init(KEY, {"embedding": jnp.ones((64, 48))}),
      ValueError,
      r"embedding \(its name\)\. Lower",
    ),
    (
      lambda: lora(40).init(KEY, {"kernel": jnp.ones((64, 48))}),
      ValueError,
      r"kernel \(`rank` too large",
    ),
    (
      lambda: lora(4).init(KEY, {"kernel": jnp.ones((32, 32), "int8")}),
      TypeError,
      "only floating-point leaves",
    ),
  ],
)
@pytest.mark.filterwarnings("ignore:More matrices than")
def test_errors(make, error, match):
  with pytest.raises(error, match=match):
    make()


def test_parts_that_do_not_belong_together_are_refused():
  frozen, adapters = divide(LORA)(KEY, PARAMS)
  other = {**adapters, "elsewhere": jnp.ones(3)}
  with pytest.raises(ValueError, match="no leaf 'elsewhere'"):
    LORA.apply(frozen, other)
  lost = {k: v for k, v in adapters.items() if k != "layers/norm"}
  with pytest.raises(ValueError, match="'layers/norm' is neither"):
    LORA.apply(frozen, lost)


@pytest.mark.parametrize("name", galore_optax.baselines.__all__)
def test_the_old_names_say_where_baselines_are(name):
  with pytest.raises(
    AttributeError, match=f"use galore_optax.baselines.{name}"
  ):
    getattr(galore_optax, name)
