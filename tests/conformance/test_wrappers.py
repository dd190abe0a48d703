"""Inside Optax's wrappers, and with any optimizer inside."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import Projection, galore
from tests.conformance import cases, inner_optimizers
from tests.conformance.cases import (
  every,
  every_galore,
  every_with_slow_codes,
)


def _mean_step(update, g, state, params, parts):
  """Accumulates one gradient in parts whose mean it is."""
  for factor in parts:
    share = jax.tree.map(lambda x: factor * x, g)  # noqa: B023
    updates, state = update(share, state, params)
  return updates, state


def _run_on_kernel(name):
  """Parameters when the optimizer only ever sees the kernel."""
  params, grads = cases.problem()
  alone = lambda tree: {"kernel": tree["kernel"]}
  return cases.run(cases.make(name), alone(params), [alone(g) for g in grads])[
    0
  ]["kernel"]


_kernel = functools.cache(_run_on_kernel)


@every_with_slow_codes
def test_masked(name):
  """What the mask leaves out passes through unchanged."""
  tx = optax.masked(cases.make(name), cases.KERNEL_ONLY)
  params, grads = cases.problem()
  found, state = cases.run(tx, params, grads)
  cases.assert_projects(name, state)
  cases.assert_close(found["kernel"], _kernel(name), rtol=1e-4)
  passed = params["bias"] + sum(g["bias"] for g in grads)
  cases.assert_close(found["bias"], passed)


@every
def test_partition(name):
  tx = optax.partition(
    {"low": cases.make(name), "rest": optax.sgd(0.1)},
    {"bias": "rest", "kernel": "low"},
  )
  params, grads = cases.problem()
  found, state = cases.run(tx, params, grads)
  cases.assert_projects(name, state)
  cases.assert_close(found["kernel"], _kernel(name), rtol=1e-4)
  stepped = params["bias"] - 0.1 * sum(g["bias"] for g in grads)
  cases.assert_close(found["bias"], stepped)


@pytest.mark.filterwarnings("ignore:galore projects none")
@every_galore
def test_rule_none_leaves_a_leaf_to_the_inner_optimizer(name):
  case = cases.OPTIMIZERS[name]
  params, grads = cases.problem()
  tx = case.make(rules=[("kernel", None)])
  found, state = cases.run(tx, params, grads)
  cases.assert_projects(cases.CONTROL, state)
  cases.assert_close(found, cases.run(case.plain(), params, grads)[0])


@every
def test_inject_hyperparams_without_static_args(name):
  """Numbers become arrays and callables schedules, ranks and gaps included."""
  schedule = optax.linear_schedule(1e-2, 1e-3, 3)
  case = cases.OPTIMIZERS[name]
  if case.alias is not None:
    # Only what decides the shapes of the inner optimizer's own state is static;
    # `optax.adafactor` cannot be injected without it, either.
    shapes = {"min_dim_size_to_factor", "min_size"} & set(case.fixed)
    tx = optax.inject_hyperparams(case.alias, static_args=shapes)(
      learning_rate=schedule,
      **{"rank": cases.RANK, "update_proj_gap": cases.GAP, **case.fixed},
    )
  else:
    tx = optax.inject_hyperparams(
      lambda learning_rate: case.make(learning_rate)
    )(learning_rate=schedule)
  params, grads = cases.problem()
  update = jax.jit(tx.update)
  found, state = cases.run(tx, params, grads, update)
  assert update._cache_size() == 1
  cases.assert_projects(name, state)
  wanted, _ = cases.run(case.make(schedule), params, grads)
  cases.assert_close(found, wanted, rtol=1e-4)
  cases.assert_close(
    state.hyperparams["learning_rate"], schedule(len(grads) - 1)
  )


@pytest.mark.parametrize("name", cases.ALIASES)
def test_inject_hyperparams_with_nothing_but_a_schedule_and_a_rank(name):
  alias = cases.OPTIMIZERS[name].alias
  tx = optax.inject_hyperparams(alias)(
    learning_rate=optax.linear_schedule(1e-2, 0.0, 9), rank=4
  )
  params, grads = cases.problem(name=name)
  state = tx.init(params)
  assert cases.bases(state)["kernel"]["left"].shape[-2:] == (8, 4)
  jax.eval_shape(tx.update, grads[0], state, params)


def test_inject_hyperparams_schedules_what_is_not_a_shape():
  """Scale and gap take schedules; rules pass through untouched."""
  factory = optax.inject_hyperparams(galore)
  tx = factory(
    optax.sgd(1.0),
    rank=cases.RANK,
    scale=lambda step: 0.5 / (1.0 + step),
    update_proj_gap=lambda step: 2 + step,
    rules=[("bias", None), ("kernel", Projection(rank=3))],
  )
  params, grads = cases.problem()
  state, update = tx.init(params), jax.jit(tx.update)
  assert cases.bases(state)["kernel"]["left"].shape == (8, 3)
  _, state = update(grads[0], state, params)
  basis = cases.bases(state)["kernel"]["left"]
  updates, state = update(grads[0], state, params)
  lifted = -0.25 * basis @ (basis.T @ grads[0]["kernel"])
  cases.assert_close(updates["kernel"], lifted, rtol=1e-4, atol=1e-5)
  cases.assert_close(updates["bias"], -grads[0]["bias"])


@every
def test_multi_steps_is_one_step_on_the_mean(name):
  """The refresh counter counts steps that are taken."""
  tx = optax.MultiSteps(cases.make(name), 2)
  params, grads = cases.problem()
  state, update = tx.init(params), jax.jit(tx.update)
  for g in grads:
    updates, state = _mean_step(update, g, state, params, (0.5, 1.5))
    params = optax.apply_updates(params, updates)
  wanted = cases.reference(name)
  cases.assert_close((params, state.inner_opt_state), wanted, 1e-4, 1e-5)
  steps = [x.step for x in cases.galore_states(state)]
  assert all(step == len(grads) for step in steps)


@every
def test_apply_if_finite_leaves_the_state_alone_on_nan(name):
  tx = optax.apply_if_finite(cases.make(name), 3)
  params, grads = cases.problem()
  update = jax.jit(tx.update)
  found, state = cases.run(tx, params, grads, update)
  cases.assert_close((found, state.inner_state), cases.reference(name), 1e-4)
  poison = jax.tree.map(lambda x: x * np.nan, grads[0])
  updates, after = update(poison, state, params)
  cases.assert_equal(after.inner_state, state.inner_state)
  assert after.notfinite_count == 1
  assert not any(jnp.any(u) for u in updates.values())


_WRAPPERS = {
  "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1, b1=0.9),
  "mechanize": lambda tx: optax.contrib.mechanize(tx, s_init=0.1),
  "conditionally_transform": lambda tx: optax.conditionally_transform(
    tx, lambda step: step % 2 == 0
  ),
}


@every_with_slow_codes
@pytest.mark.parametrize("wrapper", _WRAPPERS)
def test_wrappers(name, wrapper):
  tx = _WRAPPERS[wrapper](cases.make(name))
  params, grads = cases.problem()
  state = tx.init(params)
  cases.assert_projects(name, state)
  found, after = cases.run(tx, params, grads)
  assert cases.types(after) == cases.types(state)
  cases.assert_finite((found, after))
  assert all(jnp.any(found[key] != params[key]) for key in params)


@every_with_slow_codes
def test_lookahead(name):
  tx = optax.lookahead(cases.make(name), sync_period=2, slow_step_size=0.5)
  params, grads = cases.problem()
  found, state = cases.run(tx, optax.LookaheadParams(params, params), grads[:2])
  fast, inner = cases.run(cases.make(name), params, grads[:2])
  slow = jax.tree.map(lambda x, y: (x + y) / 2, params, fast)
  cases.assert_close(found, optax.LookaheadParams(slow, slow), 1e-4, 1e-5)
  cases.assert_close(state.fast_state, inner, 1e-4, 1e-5)


@pytest.mark.parametrize("inner", inner_optimizers.INNER)
def test_any_optimizer_inside(inner):
  """Full-rank leaves are its own; the kernel moves within its subspace."""
  plain = inner_optimizers.INNER[inner]()
  tx = galore(plain, rank=cases.RANK, update_proj_gap=9)
  params, grads = cases.problem()
  state = tx.init(params)
  cases.assert_projects(inner, state)
  assert max(x.size for x in jax.tree.leaves(state)) < params["kernel"].size
  found, after = cases.run(tx, params, grads)
  assert cases.types(after) == cases.types(state)
  cases.assert_finite(found)
  wanted, _ = cases.run(plain, params, grads)
  if inner != "codes":  # its noise has other shapes
    cases.assert_close(found["bias"], wanted["bias"], 1e-4)
  moved = found["kernel"] - params["kernel"]
  assert jnp.any(moved != 0)
  if inner not in inner_optimizers.DECAYING:
    assert np.linalg.matrix_rank(moved, tol=1e-5) <= cases.RANK
