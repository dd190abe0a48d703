"""Training with projected gradients: the same as with full ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  Refresh,
  chain,
  deferred_value_and_grad,
  find_bases,
  galore,
  galore_adamw_8bit,
  gum,
  layerwise,
  projected_value_and_grad,
  state_shardings,
)
from tests.core.small import MODEL, RULES

_LAYERS, _D, _F = 2, 12, 20


def _normal(seed, *shape):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)


def _params():
  return {
    "layers": {
      "up": _normal(0, _LAYERS, _D, _F),
      "down": _normal(1, _LAYERS, _F, _D),
      "bias": jnp.zeros((_LAYERS, _F)),
    },
    "out": _normal(2, _D, 8),
  }


def _loss(params, batch):
  def body(x, layer):
    return x + jnp.tanh(x @ layer["up"] + layer["bias"]) @ layer["down"], None

  x, _ = jax.lax.scan(body, batch, params["layers"])
  return jnp.mean((x @ params["out"] - 1) ** 2)


def _batch(i):
  return _normal(100 + i, 16, _D)


def _train(tx, steps, projected, loss=_loss, batch=_batch, params=None):
  """Parameters, state and losses of a short training."""
  params = _params() if params is None else params
  state = tx.init(params)
  run = projected_value_and_grad(loss, tx) if projected else None

  @jax.jit
  def step(params, state, x):
    if run is None:
      value, grads = jax.value_and_grad(loss)(params, x)
    else:
      value, grads, state = run(params, state, x)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  losses = []
  for i in range(steps):
    params, state, value = step(params, state, batch(i))
    losses.append(float(value))
  return params, state, losses


def _same(a, b, atol=1e-5):
  for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
    np.testing.assert_allclose(x, y, atol=atol)


_galore = functools.partial(galore, rank=3, update_proj_gap=4)
_adamw = functools.partial(optax.adamw, 0.01, weight_decay=0.1)
OPTIMIZERS = {
  "staggered": lambda: _galore(_adamw()),
  "synchronous": lambda: _galore(_adamw(), refresh="synchronous"),
  "adaptive": lambda: _galore(_adamw(), refresh="adaptive"),
  "burst": lambda: _galore(
    optax.sgd(0.1, momentum=0.9), refresh=Refresh(burst=2)
  ),
  "two-sided": lambda: _galore(optax.lion(1e-3), proj_type="full"),
  "longer side": lambda: _galore(_adamw(), proj_type="reverse_std"),
  "accumulation": lambda: _galore(_adamw(), accumulation_steps=3),
  "8-bit": lambda: galore_adamw_8bit(
    0.01, rank=3, update_proj_gap=4, min_size=0
  ),
  "int8 bases": lambda: _galore(_adamw(), basis_dtype="int8"),
  "chain": lambda: chain(
    optax.identity(), galore(rank=3, update_proj_gap=4), _adamw()
  ),
  "traced": lambda: optax.inject_hyperparams(
    lambda rate, update_proj_gap, scale: galore(
      optax.adam(rate), rank=3, update_proj_gap=update_proj_gap, scale=scale
    )
  )(rate=0.01, update_proj_gap=4, scale=0.25),
  "partition": lambda: optax.partition(
    {"low": _galore(_adamw()), "full": optax.adam(0.01)},
    lambda params: jax.tree.map(
      lambda x: "low" if x.ndim > 2 else "full", params
    ),
  ),
}
# Optimizers that keep codes of few bits. After the smallest change a code may
# be another one, so that two trainings drift apart.
_CODED = ("8-bit", "int8 bases")
_OFTEN = ("staggered", "accumulation", "8-bit", "traced", "partition")


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name in _OFTEN else pytest.mark.slow)
    for name in OPTIMIZERS
  ],
)
def test_same_training_as_with_full_gradients(name):
  """Each basis is refreshed a dozen times."""
  tx = OPTIMIZERS[name]()
  usual, state, losses = _train(tx, 50, projected=False)
  lean, other, same = _train(tx, 50, projected=True)
  np.testing.assert_allclose(same, losses, rtol=1e-2)
  if name in _CODED:
    moved, apart = (
      optax.tree.norm(optax.tree.sub(x, usual)) for x in (_params(), lean)
    )
    assert apart < 0.01 * moved
  else:
    _same(lean, usual)
  assert losses[-1] < losses[0]
  assert jax.tree.structure(other) == jax.tree.structure(state)


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_layer_by_layer(clip_norm):
  """The layers' gradients are projected, those of the ends as usual."""
  tx = _galore(_adamw(), rules=RULES)
  params = {
    "inner": _normal(0, 8, 16),
    "layers": _normal(1, 3, 16, 16),
    "outer": _normal(2, 16, 1),
  }

  def train(projected):
    init, step = layerwise(tx, MODEL, clip_norm=clip_norm, projected=projected)
    step, state, found = jax.jit(step), init(params), []
    trained = params
    for i in range(9):
      trained, state, metrics = step(trained, state, _normal(i, 16, 8))
      found.append(metrics)
    return trained, state, found

  lean, usual = train(projected=True), train(projected=False)
  norms = [
    np.array([x["grad_norm"] for x in found]) for *_, found in (lean, usual)
  ]
  if clip_norm is None:
    _same(lean[0], usual[0], atol=1e-6)
    # A basis magnifies what rounding does to a gradient, by σ₁ / (σᵣ - σᵣ₊₁).
    _same(lean[1], usual[1], atol=1e-4)
    assert (norms[0] < 1.0001 * norms[1]).all()
    assert norms[0].sum() < norms[1].sum()
  else:
    assert (norms[0] > clip_norm).all()
    assert lean[-1][-1]["loss"] < lean[-1][0]["loss"]


@pytest.mark.parametrize("rank", [2, 3])
def test_bases_of_4_bits(rank):
  """With an even rank their codes leave the backward pass as they are stored.

  A gradient is then projected on what is stored, also at a refresh. Else the
  basis is rounded to bfloat16, and then to 4 bits.
  """
  dtype = jnp.bfloat16
  params = jax.tree.map(lambda x: x.astype(dtype), _params())
  tx = galore(
    optax.sgd(1.0), rank=rank, basis_dtype="int4", update_proj_gap=1, scale=1.0
  )
  state = tx.init(params)
  loss = lambda params, batch: _loss(params, batch.astype(dtype))
  run = jax.jit(projected_value_and_grad(loss, tx))
  _, low, state = run(params, state, _batch(0))
  full = jax.grad(loss)(params, _batch(0))
  bases = find_bases(state)
  is_close = {}
  for path in ("layers/down", "layers/up"):
    ((side, basis),) = bases[path].items()
    name = path.removeprefix("layers/")
    wide = full["layers"][name].astype(jnp.float32)
    pairs = "lmr,lmn->lrn" if side == "left" else "lmn,lnr->lmr"
    operands = (basis, wide) if side == "left" else (wide, basis)
    wanted = jnp.einsum(pairs, *operands)
    error = optax.tree.norm(low["layers"][name] - wanted) / jnp.linalg.norm(
      wanted
    )
    is_close[path] = bool(error < 0.01)
  assert set(is_close.values()) == {rank == 2}


def test_norms_are_those_of_projected_gradients():
  """Clipping in front of GaLore sees what is left of a gradient."""
  params, tx = _params(), galore(optax.sgd(1.0), rank=1, scale=1.0)
  state = tx.init(params)
  run = jax.jit(projected_value_and_grad(_loss, tx))
  _, grads, _ = run(params, state, _batch(0))
  full = jax.grad(_loss)(params, _batch(0))
  low, all_of_it = map(optax.tree.norm, (grads, full))
  assert 0.5 * all_of_it < low < 0.99 * all_of_it
  clipped = chain(optax.clip_by_global_norm(0.1), tx)
  state = clipped.init(params)
  run = jax.jit(projected_value_and_grad(_loss, clipped))
  _, grads, state = run(params, state, _batch(0))
  updates, _ = clipped.update(grads, state, params)
  np.testing.assert_allclose(optax.tree.norm(updates), 0.1, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradient_that_is_not_finite_leaves_bases_and_moments(bad):
  params, tx = _params(), _galore(optax.sgd(0.1, momentum=0.9))
  state = tx.init(params)
  run = projected_value_and_grad(_loss, tx)

  @jax.jit
  def both(params, state, x):
    _, grads, refreshed = run(params, state, x)
    full = jax.grad(_loss)(params, x)
    return (
      tx.update(grads, refreshed, params),
      tx.update(full, state, params),
      refreshed,
    )

  lean, usual, refreshed = both(params, state, _batch(0).at[3, 1].set(bad))
  _same(refreshed.bases, state.bases, 0)
  _same(lean, usual, 0)
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(lean))


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_step_that_is_not_taken_refreshes_nothing(is_taken):
  """Also if each gradient is finite: another part of the step may not be."""
  params, tx = _params(), _galore(optax.sgd(0.1, momentum=0.9))
  run = deferred_value_and_grad(_loss, tx)

  @jax.jit
  def refresh(params, state, is_taken):
    _, _, refreshed = run(params, state, None, _batch(0))
    return refreshed(is_taken)

  state = tx.init(params)
  new = refresh(params, state, jnp.bool_(is_taken))
  pairs = zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True)
  assert all(np.array_equal(a, b) for a, b in pairs) != is_taken


def test_auxiliary_value_and_keywords():
  tx = _galore(_adamw())
  run = projected_value_and_grad(
    lambda params, x, *, factor, name: (
      factor * _loss(params, x),
      {name: x[0, 0]},
    ),
    tx,
    has_aux=True,
  )
  params = _params()
  (value, aux), grads, _ = run(
    params, tx.init(params), _batch(0), factor=2.0, name="first"
  )
  np.testing.assert_allclose(value, 2 * _loss(params, _batch(0)), rtol=1e-6)
  assert aux["first"] == _batch(0)[0, 0]
  assert grads["layers"]["up"].shape == (_LAYERS, 3, _F)
  assert grads["out"].shape == (_D, 3)


def _multi_steps():
  return optax.MultiSteps(_galore(_adamw()), 2).gradient_transformation()


REFUSED = {
  "no GaLore": (lambda: optax.adam(0.1), "has no `galore"),
  "residual": (lambda: _galore(_adamw(), residual="fira"), "residual='fira'"),
  "SVD": (lambda: _galore(_adamw(), refresh=Refresh(finder="svd")), "'svd'"),
  "GoLore": (
    lambda: _galore(_adamw(), refresh=Refresh(random_from=3)),
    "random_from",
  ),
  "GUM": (lambda: gum(0.1, rank=3, update_proj_gap=4), "gum"),
  "MultiSteps": (_multi_steps, "accumulation_steps"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_needs_the_whole_gradient(name):
  make, message = REFUSED[name]
  tx, params = make(), _params()
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      projected_value_and_grad(_loss, tx), params, tx.init(params), _batch(0)
    )


def test_refuses_projected_gradients_where_they_are_not_enough():
  params, tx = _params(), _galore(_adamw(), residual="normalized")
  plain = _galore(_adamw())
  state = plain.init(params)
  _, grads, _ = projected_value_and_grad(_loss, plain)(params, state, _batch(0))
  with pytest.raises(ValueError, match="residual='normalized'"):
    tx.update(grads, tx.init(params), params)
  with pytest.raises(ValueError, match="'layers/down' has shape"):
    plain.update(grads, state)
  grads["out"] = grads["out"][:, :2]
  with pytest.raises(ValueError, match="'out' is"):
    plain.update(grads, state, params)


@pytest.mark.parametrize(
  ("loss", "has_aux"),
  [
    (lambda p, x: x @ p["out"], False),
    (lambda p, x: (_loss(p, x), x), False),
    (lambda p, x: _loss(p, x), True),
  ],
)
def test_refuses_a_loss_that_is_no_scalar(loss, has_aux):
  tx, params = _galore(_adamw()), _params()
  run = projected_value_and_grad(loss, tx, has_aux=has_aux)
  with pytest.raises(TypeError, match=r"`loss_fn` must|must return a pair"):
    run(params, tx.init(params), _batch(0))


def test_refuses_what_is_no_optimizer():
  with pytest.raises(TypeError, match="`tx` must be"):
    projected_value_and_grad(_loss, _loss)


def _mesh(kind):
  return jax.make_mesh((4, 2), ("data", "model"), (kind,) * 2)


_SPECS = {
  "layers": {
    "up": jax.P(None, None, "model"),
    "down": jax.P(None, "model", None),
    "bias": jax.P(None, "model"),
  },
  "out": jax.P(),
}


def _explicit_loss(params, batch):
  def body(x, layer):
    hidden = jnp.tanh(x @ layer["up"] + layer["bias"])
    down = functools.partial(jnp.dot, out_sharding=jax.P("data"))
    return x + down(hidden, layer["down"]), None

  x, _ = jax.lax.scan(body, batch, params["layers"])
  return jnp.mean((x @ params["out"] - 1) ** 2)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_same_training_on_a_mesh(kind):
  kind = getattr(jax.sharding.AxisType, kind)
  tx, mesh, params = _galore(_adamw()), _mesh(kind), _params()
  usual, _, _ = _train(tx, 6, projected=False)
  shardings = jax.tree.map(lambda x: jax.NamedSharding(mesh, x), _SPECS)
  rows = jax.NamedSharding(mesh, jax.P("data"))
  is_explicit = kind == jax.sharding.AxisType.Explicit
  with jax.set_mesh(mesh):
    lean, state, _ = _train(
      tx,
      6,
      projected=True,
      loss=_explicit_loss if is_explicit else _loss,
      batch=lambda i: jax.device_put(_batch(i), rows),
      params=jax.device_put(params, shardings),
    )
  _same(lean, usual)
  if is_explicit:
    expected = state_shardings(tx, params, shardings)
    for x, sharding in zip(
      *map(jax.tree.leaves, (state, expected)), strict=True
    ):
      assert x.sharding.is_equivalent_to(sharding, x.ndim)


def _loss_of_two_uses(params, batch):
  """A product reads `down`; the gradient of `up`, which has two uses, forms."""
  penalty = jnp.mean(jnp.sin(params["layers"]["up"] * batch[0, 0]))
  return _loss(params, batch) + penalty


def _steps_in_shard_map(
  tx, projected, check_vma=True, axis_name=None, loss_fn=_loss
):
  """One step, data parallel: devices share parameters and state."""
  loss = lambda params, x: loss_fn(params, x) / 4  # gradients are added up

  def step(params, state, x):
    if projected:
      run = projected_value_and_grad(loss, tx, axis_name=axis_name)
      _, grads, state = run(params, state, x)
      grads = jax.lax.psum(grads, axis_name) if axis_name else grads
    else:
      grads = jax.grad(loss)(params, x)
    return tx.update(grads, state, params)

  mesh = _mesh(jax.sharding.AxisType.Auto)
  whole, rows = jax.P(), jax.P("data")
  return jax.jit(
    jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(whole, whole, rows),
      out_specs=whole,
      axis_names={"data"},
      check_vma=check_vma,
    )
  )


def test_devices_of_shard_map_add_up_projected_gradients():
  tx, params = _galore(_adamw()), _params()
  state = tx.init(params)
  lean = _steps_in_shard_map(tx, projected=True)
  usual = _steps_in_shard_map(tx, projected=False)
  _same(lean(params, state, _batch(0)), usual(params, state, _batch(0)))
  text = lean.lower(params, state, _batch(0)).as_text()
  sums = [line for line in text.splitlines() if "all_reduce" in line]
  assert sums
  assert not any(f"{_D}x{_F}xf32" in line for line in text.splitlines()
                 if "->" in line and "reduce" in line)  # fmt: skip


def test_devices_hand_out_their_own_gradients_of_the_bases_they_share():
  tx, params = _galore(_adamw()), _params()
  state = tx.init(params)
  lean = _steps_in_shard_map(tx, True, False, "data", _loss_of_two_uses)
  usual = _steps_in_shard_map(tx, False, loss_fn=_loss_of_two_uses)
  found = lean(params, state, _batch(0))
  _same(found, usual(params, state, _batch(0)))
  for x in jax.tree.leaves(found):
    for shard in x.addressable_shards:  # nothing but this test would notice
      np.testing.assert_array_equal(shard.data, x.addressable_shards[0].data)


def test_devices_of_pmap_hand_out_their_own_gradients():
  tx, params = _galore(_adamw()), _params()
  state, batch = tx.init(params), _batch(0)

  def step(params, state, x):
    loss = lambda params, x: _loss(params, x) / 4
    run = projected_value_and_grad(loss, tx, axis_name="data")
    _, grads, state = run(params, state, x)
    return tx.update(jax.lax.psum(grads, "data"), state, params)

  parts = batch.reshape(4, -1, *batch.shape[1:])
  mapped = jax.pmap(step, "data", in_axes=(None, None, 0))
  found = mapped(params, state, parts)
  usual = _steps_in_shard_map(tx, projected=False)(params, state, batch)
  for i in range(4):
    _same(jax.tree.map(lambda x, i=i: x[i], found), usual)


def test_refuses_to_name_axes_that_are_summed_over_already():
  tx, params = _galore(_adamw()), _params()
  step = _steps_in_shard_map(tx, projected=True, axis_name="data")
  with pytest.raises(ValueError, match="leave `axis_name` out"):
    step(params, tx.init(params), _batch(0))


def test_refuses_devices_that_would_refresh_alone():
  tx, params = _galore(_adamw()), _params()
  step = _steps_in_shard_map(tx, projected=True, check_vma=False)
  with pytest.raises(ValueError, match="check_vma=True"):
    step(params, tx.init(params), _batch(0))
