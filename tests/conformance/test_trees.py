"""Every kind of tree, leaf shape and matrix view, and the state as a tree."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from galore_optax import Projection, Refresh
from tests.conformance import cases
from tests.conformance.cases import every, every_galore, every_of_arrays


@flax.struct.dataclass
class _Struct:
  bias: jax.Array
  kernel: jax.Array


def _boxed(tree):
  return {
    "bias": nn.Partitioned(tree["bias"], ("y",)),
    "kernel": nn.Partitioned(tree["kernel"], ("x", "y")),
  }


_TREES = {
  "dict": dict,
  "None leaf": lambda tree: {**tree, "none": None},
  "empty parts": lambda tree: {**tree, "a": {}, "b": (), "c": []},
  "tuple": lambda tree: (tree["bias"], tree["kernel"]),
  "list": lambda tree: [tree["bias"], (tree["kernel"],)],
  "FrozenDict": flax.core.FrozenDict,
  "dataclass": lambda tree: _Struct(**tree),
  "nnx.State": lambda tree: nnx.State(
    {name: nnx.Param(x) for name, x in tree.items()}
  ),
  "nn.Partitioned": _boxed,
}


@every
@pytest.mark.parametrize("kind", _TREES)
def test_updates_have_the_structure_of_the_gradients(name, kind):
  """And types are those of a plain dict, leaf by leaf."""
  tx = cases.make(name)
  params, grads = (_TREES[kind](x) for x in _values())
  state = tx.init(params)
  assert len(cases.bases(state)) == (0 if name == cases.CONTROL else 1)
  updates, after = jax.eval_shape(tx.update, grads, state, params)
  assert cases.types(updates) == cases.types(grads)
  assert cases.types(after) == cases.types(state)


def _values():
  params, grads = cases.problem()
  return params, grads[0]


@pytest.mark.parametrize("name", ["faithful", cases.CONTROL])
@pytest.mark.parametrize("kind", _TREES)
def test_updates_have_the_values_of_a_plain_tree(name, kind):
  params, grads = (_TREES[kind](x) for x in _values())
  tx, update = cases.built(name)
  updates, _ = update(grads, tx.init(params), params)
  wanted, _ = update(_values()[1], tx.init(_values()[0]), _values()[0])
  cases.assert_close(jax.tree.leaves(updates), jax.tree.leaves(wanted))


@every
@pytest.mark.parametrize("empty", [{}, (), [], {"a": None}], ids=repr)
def test_trees_without_leaves(name, empty):
  tx = cases.make(name)
  updates, _ = tx.update(empty, tx.init(empty), empty)
  assert updates == empty


@pytest.mark.filterwarnings("ignore:galore projects none")
@every
@pytest.mark.parametrize("leaf", ["kernel", "bias"])
def test_a_bare_array(name, leaf):
  tx = cases.make(name)
  params, g = (tree[leaf] for tree in _values())
  state = tx.init(params)
  ours = leaf == "kernel" and name != cases.CONTROL
  assert len(cases.bases(state)) == ours
  updates, after = jax.eval_shape(tx.update, g, state, params)
  assert cases.types(updates) == cases.types(g)
  assert cases.types(after) == cases.types(state)


_ODD_SHAPES = {
  "scalar": (),
  "vector": (3,),
  "row": (1, 5),
  "col": (5, 1),
  "one": (1, 1),
  "no_rows": (0, 4),
  "no_layers": (0, 3, 4),
  "no_entries": (0,),
}


@pytest.mark.filterwarnings("ignore:galore projects none")
@every
def test_odd_shapes(name):
  params = cases.normal(_ODD_SHAPES)
  grads = [cases.normal(_ODD_SHAPES, seed) for seed in (1, 2, 3)]
  tx = cases.make(name)
  state = tx.init(params)
  assert all(x.size for x in jax.tree.leaves(cases.bases(state)))
  found, after = cases.run(tx, params, grads)
  assert cases.types(after) == cases.types(state)
  assert cases.types(found) == cases.types(params)
  cases.assert_finite((found, after))
  for key, x in params.items():
    assert jnp.all(found[key] != x), key


_LAYERS = (3, 8, 16)


def _exact(make, **settings):
  """The optimizer, with bases that do not depend on the leaves' paths."""
  refresh = Refresh(policy="synchronous", finder="svd")
  return make(refresh=refresh, **settings)


@every_of_arrays
def test_stacked_layers_equal_a_loop_over_layers(name):
  """Also beside leaves of other ranks; biases stay at full rank."""
  shapes = {"bias": (3, 16), "kernel": _LAYERS, "other": (8, 12)}
  params = cases.normal(shapes)
  grads = [cases.normal(shapes, seed) for seed in (1, 2, 3)]

  def unstack(tree):
    layers = {f"layer{i}": tree["kernel"][i] for i in range(3)}
    return {"bias": tree["bias"], "other": tree["other"], **layers}

  def check(make):
    tx = _exact(make)
    found, state = cases.run(tx, params, grads)
    wanted, _ = cases.run(tx, unstack(params), [unstack(g) for g in grads])
    cases.assert_close(unstack(found), wanted, 1e-5, 1e-6)
    if make is not cases.OPTIMIZERS[name].plain:
      cases.assert_projects(name, state, ("kernel", "other"))
      assert cases.bases(state)["kernel"]["left"].shape == (3, 8, 2)

  cases.hold("stacked", name, check)


@pytest.mark.parametrize(
  "name", [name for name in cases.GALORE if "8bit" not in name]
)
def test_dense_general_and_convolutions_equal_their_matrices(name):
  shapes = {"conv": (3, 2, 2, 16), "heads": (8, 2, 8)}
  params = cases.normal(shapes)
  grads = [cases.normal(shapes, seed) for seed in (1, 2)]
  rules = [
    ("heads", Projection(rows=0, cols=(1, 2))),
    ("conv", Projection(rows=(0, 1, 2), cols=3)),
  ]
  as_matrices = lambda tree: {
    "conv": tree["conv"].reshape(12, 16),
    "heads": tree["heads"].reshape(8, 16),
  }
  make = cases.OPTIMIZERS[name].make
  found, _ = cases.run(_exact(make, rules=rules), params, grads)
  wanted, _ = cases.run(
    _exact(make), as_matrices(params), [as_matrices(g) for g in grads]
  )
  cases.assert_close(as_matrices(found), wanted, 1e-5, 1e-6)


@every
def test_map_params_identity(name):
  """With and without a rest, and a guard for masked nodes."""
  tx = cases.make(name)
  params, _ = cases.problem()
  state = tx.init(params)
  is_masked = lambda x: isinstance(x, optax.MaskedNode)
  mapped = optax.tree.map_params(tx, lambda x: x, state)
  cases.assert_equal(mapped, state)
  for guard in (None, is_masked):
    mapped = optax.tree.map_params(
      tx, lambda x, _: x, state, params, is_leaf=guard
    )
    cases.assert_equal(mapped, state)


@every
def test_map_params_meets_nothing_of_another_shape(name):
  """What is mapped with the parameters has the parameters' shapes."""
  tx = cases.make(name)
  params, _ = cases.problem()

  def check(x, param):
    assert x.shape == param.shape
    return x

  optax.tree.map_params(tx, check, tx.init(params), params)


@every
def test_ranks_sides_and_scale(name):
  """Bases are orthonormal, on the shorter side, and of the given rank."""
  params, _ = cases.problem()
  _, state = cases.reference(name)
  sides = {"two-sided": {"left", "right"}, cases.CONTROL: set()}
  found = cases.bases(state).get("kernel", {})
  assert set(found) == sides.get(name, {"left"})
  for side, basis in found.items():
    size = params["kernel"].shape[0 if side == "left" else 1]
    assert basis.shape == (size, cases.RANK)
    atol = 0.1 if name.startswith("q_galore") else 1e-5  # in four bits
    np.testing.assert_allclose(basis.T @ basis, np.eye(cases.RANK), atol=atol)


@every_galore
def test_updates_are_linear_in_a_traced_scale(name):
  make = cases.OPTIMIZERS[name].make
  params, grads = cases.problem()
  state = make().init(params)
  update = jax.jit(
    lambda scale: make(scale=scale).update(grads[0], state, params)[0]
  )
  none, half, full = (update(scale) for scale in (0.0, 0.5, 1.0))
  twice = 2 * (half["kernel"] - none["kernel"])
  cases.assert_close(twice, full["kernel"] - none["kernel"], 1e-4, 1e-7)
  assert jnp.any(full["kernel"] != none["kernel"])
  cases.assert_close(none["bias"], full["bias"])
