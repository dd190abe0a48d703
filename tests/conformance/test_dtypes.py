"""Dtypes of updates and of the state, which are fixed at `init`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  Projection,
  galore,
  galore_adamw,
  galore_lion,
  galore_sgd,
)
from tests.conformance import cases
from tests.conformance.cases import every, every_galore
from tests.marks import with_slow

_PAIRS = [
  ("bfloat16", "bfloat16"),
  ("float16", "float16"),
  ("float32", "float32"),
  ("bfloat16", "float32"),
  ("float32", "bfloat16"),
  ("float64", "float64"),
]
_BFLOAT16 = jnp.dtype(jnp.bfloat16)


def _problem(param_dtype, grad_dtype):
  params = cases.normal(cases.SHAPES, 0, param_dtype)
  return params, cases.normal(cases.SHAPES, 1, grad_dtype)


def _dtypes(tree):
  return {x.dtype for x in jax.tree.leaves(tree)}


@every
@pytest.mark.parametrize(("param_dtype", "grad_dtype"), _PAIRS)
def test_state_dtypes_are_fixed_at_init(name, param_dtype, grad_dtype):
  """And updates have the gradients' dtype, or the parameters'."""

  def check(make):
    tx = make()
    params, grads = _problem(param_dtype, grad_dtype)
    state = tx.init(params)
    keep = lambda u: lambda: (jax.tree.map(jnp.zeros_like, u), state)

    def maybe(take):
      updates, _ = jax.eval_shape(tx.update, grads, state, params)
      update = lambda: tx.update(grads, state, params)
      return jax.lax.cond(take, update, keep(updates))

    updates, after = jax.eval_shape(maybe, True)
    assert cases.types(after) == cases.types(state)
    assert _dtypes(updates) <= {jnp.dtype(param_dtype), jnp.dtype(grad_dtype)}

  with jax.enable_x64(param_dtype == "float64"):
    cases.hold(f"{param_dtype} with {grad_dtype} gradients", name, check)


@every
@pytest.mark.parametrize("dtype", with_slow(["bfloat16", "float16"], "float16"))
def test_half_precision_follows_single_precision(name, dtype):
  half = _problem(dtype, dtype)
  single = jax.tree.map(lambda x: x.astype(jnp.float32), half)

  def check(make):
    tx = make()
    params, grads = half
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    params, grads = single
    wanted, _ = cases.built(name)[1](grads, tx.init(params), params)
    cases.assert_finite(updates)
    assert _dtypes(updates) == {jnp.dtype(dtype)}
    for found, x in zip(updates.values(), wanted.values(), strict=True):
      off = jnp.max(jnp.abs(found.astype(jnp.float32) - x))
      assert off < 0.02 * jnp.max(jnp.abs(x))

  cases.hold(f"values in {dtype}", name, check)


@every
def test_double_precision(name):
  with jax.enable_x64(True):
    params, grads = _problem("float64", "float64")
    tx = cases.make(name)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(grads, state, params)
    assert cases.types(after) == cases.types(state)
    assert _dtypes(updates) == {jnp.dtype("float64")}
    cases.assert_finite(updates)


def _moments(state):
  floats = [
    x
    for x in jax.tree.leaves(state)
    if jnp.ndim(x) and jnp.issubdtype(x.dtype, jnp.floating)
  ]
  ours = {id(x) for x in jax.tree.leaves(cases.bases(state))}
  return [x for x in floats if id(x) not in ours]


@pytest.mark.parametrize(
  "name", [name for name in cases.GALORE if "8bit" not in name]
)
def test_state_dtype_is_that_of_all_moments(name):
  tx = cases.OPTIMIZERS[name].make(state_dtype=jnp.bfloat16)
  params, grads = cases.problem()
  state = tx.init(params)
  assert _dtypes(_moments(state)) == {_BFLOAT16}
  assert _dtypes(cases.bases(state)) == {jnp.dtype("float32")}
  updates, after = jax.eval_shape(tx.update, grads[0], state, params)
  assert cases.types(after) == cases.types(state)
  assert cases.types(updates) == cases.types(params)


@pytest.mark.parametrize(
  ("alias", "option", "field"),
  [
    (galore_adamw, "mu_dtype", "mu"),
    (galore_lion, "mu_dtype", "mu"),
    (galore_sgd, "accumulator_dtype", "trace"),
  ],
)
def test_dtype_of_the_first_moment(alias, option, field):
  """It is that of the field, at low and at full rank, and of no other."""
  tx = alias(cases.RATE, rank=cases.RANK, **{option: jnp.bfloat16})
  params, grads = cases.problem()
  state = tx.init(params)
  updates, after = jax.jit(tx.update)(grads[0], state, params)
  assert cases.types(after) == cases.types(state)
  assert _dtypes(updates) == {jnp.dtype("float32")}
  first = jax.tree.leaves(optax.tree.get(after, field))
  assert _dtypes(first) == {_BFLOAT16}
  rest = [x for x in _moments(after) if id(x) not in {id(y) for y in first}]
  assert _dtypes(rest) <= {jnp.dtype("float32")}


def test_basis_dtype():
  """A basis of another dtype stays so, and orthonormal to its precision."""
  tx = galore(optax.adam(cases.RATE), rank=2, basis_dtype="bfloat16")
  params, grads = cases.problem()
  found, state = cases.run(tx, params, grads)
  basis = cases.bases(state)["kernel"]["left"]
  assert basis.dtype == _BFLOAT16
  basis = np.asarray(basis, np.float64)
  np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-2)
  cases.assert_finite(found)


def _complex(tree):
  return {**tree, "kernel": tree["kernel"] * (1 + 2j)}


@pytest.mark.filterwarnings("ignore:galore projects none")
@every
def test_complex_leaves_are_optimized_at_full_rank(name):
  """Right as without GaLore: they are not projected."""
  case = cases.OPTIMIZERS[name]
  params, grads = cases.problem()
  grads = [_complex(g) for g in grads]
  found, state = cases.run(case.make(), _complex(params), grads)
  assert not cases.bases(state)
  wanted, _ = cases.run(case.plain(), _complex(params), grads)
  cases.assert_close(_parts(found), _parts(wanted))


def _parts(tree):
  return jax.tree.map(lambda x: (jnp.real(x), jnp.imag(x)), tree)


@every_galore
def test_a_rule_that_projects_complex_leaves_is_refused(name):
  make = cases.OPTIMIZERS[name].make
  tx = make(rules=[("kernel", Projection(rank=2))])
  with pytest.raises(TypeError, match=r"'kernel' is complex64.*real leaves"):
    tx.init(_complex(cases.problem()[0]))
