"""Conditional changes in place, and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_optax.tree import in_place


def _change(unit, x):
  """Adds to one row, and multiplies it."""
  return x.at[unit].set(x[unit] * 2 + unit + 1)


def _wanted(chosen, x):
  x = np.array(x)
  for unit in np.flatnonzero(chosen):
    x[unit] = x[unit] * 2 + unit + 1
  return x


@pytest.mark.parametrize("chosen", [[0, 0, 0], [0, 1, 0], [1, 0, 1], [1], [0]])
def test_each_chosen_unit_is_changed_once(chosen):
  chosen, x = jnp.array(chosen, bool), jnp.arange(6.0).reshape(3, 2)
  found = jax.jit(lambda c, x: in_place.update_each(c, _change, x))(chosen, x)
  np.testing.assert_array_equal(found, _wanted(chosen, x))


def test_units_come_in_their_order():
  def append(unit, log):
    count, units = log
    return count + 1, units.at[count].set(unit)

  chosen = jnp.array([False, True, True, False, True])
  log = jnp.int32(0), jnp.full(5, -1)
  _, units = in_place.update_each(chosen, append, log)
  np.testing.assert_array_equal(units, [1, 2, 4, -1, -1])


@pytest.mark.parametrize("condition", [True, False])
def test_one_change_is_made_or_not(condition):
  x = {"codes": jnp.arange(3, dtype=jnp.uint8), "none": None}
  found = in_place.update_if(
    jnp.bool_(condition), lambda x: jax.tree.map(lambda y: y + 1, x), x
  )
  np.testing.assert_array_equal(found["codes"], np.arange(3) + condition)
  assert found["none"] is None


@pytest.mark.parametrize("in_scan", [False, True])
def test_reverse_mode_goes_through_what_a_change_closes_over(in_scan):
  """Also where the derivative is traced after the function, as in a scan."""
  chosen = jnp.array([True, False, True])

  def step(x, factor):
    def change(unit, x):
      once = lambda x: x.at[unit].set(jnp.sin(factor * x[unit]))
      return in_place.update_if(unit > 0, once, x * factor)

    return in_place.update_each(chosen, change, x)

  def loss(factor):
    x = jnp.array([1.0, 2.0, 3.0])
    if in_scan:
      x, _ = jax.lax.scan(lambda x, _: (step(x, factor), None), x, length=2)
    else:
      x = step(step(x, factor), factor)
    return jnp.sum(x**2)

  def by_hand(factor):
    x = jnp.array([1.0, 2.0, 3.0])
    for _ in range(2):
      x = x * factor
      x = x * factor
      x = x.at[2].set(jnp.sin(factor * x[2]))
    return jnp.sum(x**2)

  for of in (jax.value_and_grad, lambda f: lambda x: jax.jvp(f, (x,), (1.0,))):
    found, wanted = (jax.jit(of(f))(0.7) for f in (loss, by_hand))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_under_vmap_each_element_has_its_own_choice():
  chosen = jnp.array([[True, False, True], [False, False, False]])
  x = jnp.arange(12.0).reshape(2, 3, 2)
  each = jax.vmap(lambda c, x: in_place.update_each(c, _change, x))
  for k, found in enumerate(each(chosen, x)):
    np.testing.assert_array_equal(found, _wanted(chosen[k], x[k]))


def test_a_change_that_is_not_made_copies_nothing():
  """The buffer that is donated is the one that comes back."""
  big = jax.ShapeDtypeStruct((64, 256, 256), jnp.float32)
  chosen = jax.ShapeDtypeStruct((64,), jnp.bool_)
  f = lambda c, x: in_place.update_each(c, _change, x)
  compiled = jax.jit(f, donate_argnums=1).lower(chosen, big).compile()
  one = 256 * 256 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * one


def test_on_a_mesh_there_are_conditionals():
  """Processes would run the collectives of loops in different sequences."""
  mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,))
  args = jnp.array([1, 0, 1], bool), jnp.arange(6.0).reshape(3, 2)
  f = lambda chosen, x: in_place.update_each(chosen, _change, x)
  alone = str(jax.make_jaxpr(f)(*args))
  args = jax.device_put(args, jax.NamedSharding(mesh, jax.P()))
  shared = str(jax.make_jaxpr(f)(*args))
  found = jax.jit(f)(*args)
  assert "while[" in alone and "while[" not in shared and "cond[" in shared
  np.testing.assert_array_equal(found, _wanted(*args))


@pytest.mark.parametrize("vary", [True, False])
def test_in_the_body_of_shard_map_there_are_loops(vary):
  """There each device works for itself, and has its own choice."""
  mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,))
  chosen = jnp.array([[1, 0, 1], [0, 1, 1]], bool)
  x = jnp.arange(12.0).reshape(2, 3, 2)

  def body(chosen, x):
    one = chosen[0] if vary else jnp.array([True, False, True])
    return in_place.update_each(one, _change, x[0])[None]

  f = jax.shard_map(body, mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P("d"))
  text = str(jax.make_jaxpr(f)(chosen, x))
  assert "while[" in text and "cond[" not in text
  for k, found in enumerate(jax.jit(f)(chosen, x)):
    np.testing.assert_array_equal(
      found, _wanted(chosen[k if vary else 0], x[k])
    )
