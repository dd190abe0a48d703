"""The contract of a gradient transformation, under every transformation of JAX.

Purity, extra arguments, tracing, differentiation, vectorization, donation,
abstract values, state by name, and gradients that are zero or not finite.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import chain, galore
from tests.conformance import cases
from tests.conformance.cases import (
  every,
  every_galore,
  every_layout,
  every_of_arrays,
  every_public,
  every_with_slow_codes,
)


def _first(name):
  """What the first update of an optimizer is given, and what it gives."""
  tx, update = cases.built(name)
  params, grads = cases.problem(name=name)
  given = (grads[0], tx.init(params), params)
  return tx, given, update(*given)


@every
def test_init_and_update_are_pure_and_take_extra_arguments(name):
  tx, (g, state, params), expected = _first(name)
  assert isinstance(tx, optax.GradientTransformationExtraArgs) or (
    name == cases.CONTROL
  )
  cases.assert_projects(name, state)
  cases.assert_equal(tx.init(params), state)
  before = jax.tree.map(np.array, (g, state, params))
  cases.assert_equal(cases.built(name)[1](g, state, params), expected)
  cases.assert_equal(jax.tree.map(jnp.asarray, before), (g, state, params))


@every_galore
def test_extra_arguments_that_nobody_wants_are_ignored(name):
  tx, (g, state, params), expected = _first(name)
  update = jax.jit(lambda *x, value: tx.update(*x, value=value, unknown="a"))
  found = update(g, state, params, value=jnp.float32(1))
  cases.assert_close(found, expected)


def _on_plateau(spelling, optimizer):
  inner = optax.chain(
    optimizer, optax.contrib.reduce_on_plateau(0.5, patience=1, cooldown=0)
  )
  return {
    "optax": lambda: inner,
    "galore": lambda: galore(inner, rank=2),
    "chain": lambda: chain(galore(rank=2), inner),
  }[spelling]()


@pytest.mark.parametrize("spelling", ["optax", "galore", "chain"])
@pytest.mark.parametrize("optimizer", ["scale_by_adam", "adamw"])
def test_extra_arguments_reach_the_inner_optimizer(spelling, optimizer):
  inner = {"scale_by_adam": optax.scale_by_adam(), "adamw": optax.adamw(0.1)}
  tx = _on_plateau(spelling, inner[optimizer])
  params, grads = cases.problem()
  state, update = tx.init(params), jax.jit(tx.update)
  for _ in range(4):
    _, state = update(grads[0], state, params, value=jnp.float32(1.0))
  assert optax.tree.get(state, "scale") < 1
  with pytest.raises(TypeError, match="value"):
    tx.update(grads[0], state, params)


@every_layout
def test_one_compilation_serves_all_steps(name):
  tx = cases.make(name)
  params, grads = cases.problem(name=name)
  update = jax.jit(tx.update)
  cases.run(tx, params, grads, update)
  assert update._cache_size() == 1


@every_public
def test_scan_equals_a_loop(name):
  tx, _ = cases.built(name)
  params, grads = cases.problem(name=name)

  def step(carry, g):
    params, state = carry
    updates, state = tx.update(g, state, params)
    return (optax.apply_updates(params, updates), state), None

  stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
  found, _ = jax.jit(lambda c, g: jax.lax.scan(step, c, g))(
    (params, tx.init(params)), stacked
  )
  cases.assert_close(found, cases.reference(name))


@every
def test_cond_takes_or_leaves_an_update(name):
  tx, given, expected = _first(name)

  @jax.jit
  def maybe(take, g, state, params):
    keep = lambda: (jax.tree.map(jnp.zeros_like, g), state)
    return jax.lax.cond(take, lambda: tx.update(g, state, params), keep)

  cases.assert_close(maybe(True, *given), expected)
  cases.assert_equal(maybe(False, *given)[1], given[1])


@every_of_arrays
def test_without_jit(name):
  tx, given, expected = _first(name)
  with jax.disable_jit():
    cases.assert_close(tx.update(*given), expected, rtol=1e-4, atol=1e-5)


@every_with_slow_codes
def test_pmap(name):
  tx, given, expected = _first(name)
  copies = jax.tree.map(lambda x: jnp.stack([x, x]), given)
  found = jax.pmap(tx.update, devices=jax.devices()[:2])(*copies)
  cases.assert_close(jax.tree.map(lambda x: x[1], found), expected)


@every
def test_shard_map_with_replicated_state(name):
  tx, (g, state, params), expected = _first(name)
  mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))

  def step(share, state, params):
    mean = jax.tree.map(lambda x: jax.lax.pmean(x[0], "data"), share)
    return tx.update(mean, state, params)

  shares = jax.tree.map(lambda x: jnp.stack([0.5 * x, 1.5 * x]), g)
  found = jax.jit(
    jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(jax.P("data"), jax.P(), jax.P()),
      out_specs=jax.P(),
    )
  )(shares, state, params)
  cases.assert_close(found, expected, rtol=1e-4)


@every
def test_vmap_over_an_ensemble_equals_a_loop(name):
  tx, update = cases.built(name)
  params, grads = cases.problem(name=name)
  twins = lambda x: jnp.stack([x, -2 * x])
  params = jax.tree.map(twins, params)
  g = jax.tree.map(twins, grads[0])
  state = jax.jit(jax.vmap(tx.init))(params)
  found = jax.jit(jax.vmap(tx.update))(g, state, params)
  for i in range(2):
    at = lambda tree: jax.tree.map(lambda x: x[i], tree)  # noqa: B023
    expected = update(at(g), tx.init(at(params)), at(params))
    cases.assert_close(at(found), expected, rtol=1e-4)


def _slope(tx, g):
  """Gradient of a function of the first update."""
  params, _ = cases.problem()
  state = tx.init(params)

  @jax.jit
  @jax.grad
  def slope(g):
    updates, _ = tx.update(g, state, params)
    return sum(
      jnp.sum(u * x) for u, x in zip(updates.values(), g.values(), strict=True)
    )

  return slope(g)


@every
def test_gradient_through_an_update(name):
  found = _slope(cases.make(name), cases.problem()[1][0])
  cases.assert_finite(found)
  assert all(jnp.any(x != 0) for x in found.values())


@every
def test_gradient_through_an_update_of_a_rank_one_gradient(name):
  """Of rank one, and with a row that is dead."""
  g = cases.problem()[1][0]
  rows = g["kernel"][:, 0].at[0].set(0)
  g = {**g, "kernel": jnp.outer(rows, g["kernel"][0])}
  cases.hold(
    "rank-one gradient",
    name,
    lambda make: cases.assert_finite(_slope(make(), g)),
  )


@every_with_slow_codes
def test_schedules_and_traced_learning_rates(name):
  """A schedule gives the steps of its values, given as traced numbers."""
  schedule = lambda step: 1e-2 / (1.0 + step)
  params, grads = cases.problem()
  tx = cases.make(name, schedule)
  expected, _ = cases.run(tx, params, grads)
  update = jax.jit(lambda rate, *args: cases.make(name, rate).update(*args))
  state = cases.make(name, 0.5).init(params)
  for step, g in enumerate(grads):
    updates, state = update(schedule(step), g, state, params)
    params = optax.apply_updates(params, updates)
  cases.assert_close(params, expected)


_FIELDS = [
  "count",
  "mu",
  "nu",
  "trace",
  "ema",
  "v_row",
  "v_col",
  "v",
  "learning_rate",
  "projector",
  "step",
]


def _found(state, field):
  return len(optax.tree.get_all_with_path(state, field))


@every
def test_state_is_found_by_name_as_without_galore(name):
  """`optax.tree.get` is as unambiguous as in the wrapped optimizer's state."""
  params, _ = cases.problem()
  state = cases.make(name).init(params)
  plain = cases.OPTIMIZERS[name].plain().init(params)
  wanted = {field: _found(plain, field) for field in _FIELDS}
  ours = int(name != cases.CONTROL)
  wanted |= {"projector": ours, "step": ours}
  assert {field: _found(state, field) for field in _FIELDS} == wanted
  unique = [field for field, number in wanted.items() if number == 1]
  assert len(unique) >= 2
  for field in unique:
    value = jax.tree.map(jnp.ones_like, optax.tree.get(state, field))
    changed = optax.tree.set(state, **{field: value})
    cases.assert_equal(optax.tree.get(changed, field), value)


@every
def test_zero_gradients(name):
  tx, update = cases.built(name)
  params, grads = cases.problem()
  zero = jax.tree.map(jnp.zeros_like, params)
  params, state = cases.run(tx, params, [zero, *grads, zero], update)
  cases.assert_finite((params, state))


@every
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_gradients_are_survived(name, step, bad):
  """A NaN at a refresh counts as zero, and the next clean step moves on."""

  def check(make):
    tx = make()
    update = (
      cases.built(name)[1]
      if make is cases.OPTIMIZERS[name].make
      else (jax.jit(tx.update))
    )
    params, grads = cases.problem()
    poison = jax.tree.map(lambda x: x.at[0].set(bad), grads[0])
    grads = [*grads[:step], poison]
    params, state = cases.run(tx, params, grads, update)
    updates, state = update(cases.problem()[1][0], state, params)
    cases.assert_finite((params, updates, state))
    assert all(jnp.any(x != 0) for x in updates.values())

  cases.hold("nan gradient", name, check)


@every_layout
def test_donation_without_warnings(name):
  tx, _ = cases.built(name)
  params, grads = cases.problem(name=name)
  params = jax.tree.map(jnp.copy, params)

  def step(params, state, g):
    updates, state = tx.update(g, state, params)
    return optax.apply_updates(params, updates), state

  step, state = jax.jit(step, donate_argnums=(0, 1)), tx.init(params)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    for g in grads:
      old = (params, state)
      params, state = step(*old, g)
      # What an update hands on as it is, such as a placeholder, stays.
      arrays = [x for x in jax.tree.leaves(old) if x.size > 1]
      assert all(x.is_deleted() for x in arrays)
  cases.assert_close((params, state), cases.reference(name))


@every_layout
def test_abstract_init(name):
  tx, (_, state, params), _ = _first(name)
  abstract = jax.eval_shape(lambda: params)
  assert cases.types(jax.eval_shape(tx.init, params)) == cases.types(state)
  assert cases.types(tx.init(abstract)) == cases.types(state)


_STRICT = {
  "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
  "debug_nans": lambda: jax.debug_nans(True),
}


@every_with_slow_codes
@pytest.mark.parametrize("setting", _STRICT)
def test_strict_settings(name, setting):
  tx = cases.make(name)
  params, grads = cases.problem()
  with _STRICT[setting]():
    found = cases.run(tx, params, grads)
  cases.assert_close(found, cases.reference(name))


@every
def test_nothing_is_transferred_in_a_step(name):
  _, given, expected = _first(name)
  with jax.transfer_guard("disallow"):
    found = cases.built(name)[1](*given)
  cases.assert_equal(found, expected)


@every
def test_strict_dtype_promotion_as_without_galore(name):
  """Most of Optax fails it; GaLore must not be what fails."""
  params, grads = cases.problem()

  def fails(make):
    tx = make()
    state = tx.init(params)
    with jax.numpy_dtype_promotion("strict"):
      try:
        jax.eval_shape(tx.update, grads[0], state, params)
      except jax.dtypes.TypePromotionError:
        return True
    return False

  case = cases.OPTIMIZERS[name]
  assert fails(case.make) == fails(case.plain)
