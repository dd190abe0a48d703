"""Meshes with Explicit and Auto axes, and shardings of the state."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from galore_optax import (
  Projection,
  chain,
  galore,
  galore_adamw,
  state_shardings,
)
from tests.conformance import cases
from tests.conformance.cases import every, every_of_arrays
from tests.marks import with_slow

_EXPLICIT, _AUTO = jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto
# Matrices sharded along rows, columns and both, and a stack along its layers.
_SPECS = {
  "bias": jax.P("y"),
  "both": jax.P("x", "y"),
  "cols": jax.P(None, "y"),
  "rows": jax.P("x", None),
  "stack": jax.P("y", "x", None),
}
_SHAPES = {
  name: {1: (16,), 2: (8, 16), 3: (4, 8, 16)}[len(spec)]
  for name, spec in _SPECS.items()
}
_FEW = ("bias", "both", "stack")
# The optimizers that are tried on all of them, the others on a few.
_ON_ALL = ("galore_adamw", "factored")


def _of(name, tree):
  """What a tree has for the leaves that an optimizer is tried on."""
  return tree if name in _ON_ALL else {key: tree[key] for key in _FEW}


def _mesh(kind):
  return jax.make_mesh((2, 4), ("x", "y"), (kind,) * 2)


def _shardings(mesh, name=_ON_ALL[0]):
  return {
    leaf: jax.NamedSharding(mesh, spec)
    for leaf, spec in _of(name, _SPECS).items()
  }


def _problem(shardings=None, name=_ON_ALL[0]):
  """Parameters and gradients, on one device or sharded."""
  params, *grads = (_of(name, cases.normal(_SHAPES, k)) for k in range(3))
  if shardings is None:
    return params, grads
  return jax.device_put((params, grads), (shardings, [shardings, shardings]))


def _tolerance(name):
  """Relative and absolute; GUM's full-size polar factors amplify rounding."""
  return (1e-3, 1e-4) if name == "gum" else (1e-4, 1e-5)


def _step(tx, **of_jit):
  """Compiled in one: the update, the new state and the new parameters."""

  def step(g, state, params):
    updates, state = tx.update(g, state, params)
    return updates, state, optax.apply_updates(params, updates)

  return jax.jit(step, **of_jit)


@functools.cache
def _wanted(name):
  tx = cases.make(name)
  params, grads = _problem(name=name)
  state, step = jax.jit(tx.init)(params), _step(tx)
  for g in grads:
    _, state, params = step(g, state, params)
  return jax.device_get(params)


# With `-m slow`: those whose arrays are sharded as those of others are.
@pytest.mark.parametrize(
  "name",
  with_slow(
    cases.LAYOUTS,
    "galore_adafactor",
    "two-sided",
    "fira",
    "apollo_mini",
    "adamw_8bit",
  ),
)
def test_explicit_mesh(name):
  """Types stay what they are, and numbers are those of one device."""
  tx = cases.make(name)
  mesh = _mesh(_EXPLICIT)
  params, grads = _problem(_shardings(mesh, name), name)
  with jax.set_mesh(mesh):
    state, step = jax.jit(tx.init)(params), _step(tx)
    cases.assert_projects(name, state, set(params) - {"bias"})
    kinds = jax.tree.map(jax.typeof, state)
    for g in grads:
      updates, state, params = step(g, state, params)
      assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, g)
      assert jax.tree.map(jax.typeof, state) == kinds
  cases.assert_close(jax.device_get(params), _wanted(name), *_tolerance(name))


def _specs(tree):
  """Specs without what says nothing."""

  def spec(x):
    parts = tuple(x.sharding.spec) if x.sharding is not None else ()
    while parts and parts[-1] is None:
      parts = parts[:-1]
    return jax.P(*parts)

  return jax.tree.map(spec, tree)


@every
def test_init_on_an_explicit_mesh(name):
  """In and out of jit, and of abstract values, it gives the same types."""
  tx = cases.make(name)
  mesh = _mesh(_EXPLICIT)
  params, _ = _problem(_shardings(mesh))
  with jax.set_mesh(mesh):
    abstract = jax.eval_shape(tx.init, params)
    state = jax.jit(tx.init)(params)
    eager = tx.init(params)
  assert _specs(state) == _specs(eager) == _specs(abstract)
  split = [x for x in jax.tree.leaves(state) if not x.is_fully_replicated]
  assert len(split) >= len(_SPECS) - 1


@pytest.mark.parametrize(
  "name",
  with_slow(
    cases.LAYOUTS,
    "galore_adafactor",
    "fira",
    "gum",
    "apollo_mini",
    "adamw_8bit",
    "adamw",
  ),
)
def test_auto_mesh(name):
  """With the state where `state_shardings` puts it."""
  tx = cases.make(name)
  named = _shardings(_mesh(_AUTO), name)
  params, grads = _problem(named, name)
  of_state = state_shardings(tx, params, named)
  state = jax.jit(tx.init, out_shardings=of_state)(params)
  assert jax.tree.map(lambda x: x.sharding, state) == of_state
  step = _step(tx, out_shardings=(named, of_state, named))
  for g in grads:
    _, state, params = step(g, state, params)
  cases.assert_close(jax.device_get(params), _wanted(name), *_tolerance(name))


@every
@pytest.mark.parametrize("guard", [False, True])
def test_shardings_by_map_params(name, guard):
  """Optax's own way to shard a state, with and without a guard."""
  tx = cases.make(name)
  mesh = _mesh(_AUTO)
  params, _ = _problem()
  is_masked = lambda x: isinstance(x, optax.MaskedNode)
  of_state = optax.tree.map_params(
    tx,
    lambda x, sharding: x if is_masked(x) else sharding,
    jax.eval_shape(tx.init, params),
    _shardings(mesh),
    transform_non_params=lambda _: jax.NamedSharding(mesh, jax.P()),
    is_leaf=is_masked if guard else None,
  )
  state = jax.jit(tx.init, out_shardings=of_state)(params)
  found = jax.tree.map(lambda x: x.sharding, state)
  assert found == jax.tree.broadcast(of_state, state)
  if name == cases.CONTROL:
    assert optax.tree.get(found, "mu") == _shardings(mesh)


def _specs_of(tx):
  """Specs of the bases of the leaf `both`, and of all first moments."""
  keep = lambda tree: {name: tree[name] for name in ("bias", "both")}
  params, named = keep(_problem()[0]), keep(_shardings(_mesh(_AUTO)))
  of_state = state_shardings(tx, params, named)
  state = jax.jit(tx.init, out_shardings=of_state)(params)
  assert jax.tree.map(lambda x: x.sharding, state) == of_state
  specs = jax.tree.map(lambda x: tuple(x.sharding.spec), state)
  [(_, mu)] = optax.tree.get_all_with_path(specs, "mu")
  return cases.bases(specs)["both"], mu


def _inject(**static):
  return optax.inject_hyperparams(galore_adamw, **static)


_LOW = galore_adamw(cases.RATE, rank=cases.RANK)
_WRAPPED = {
  "itself": lambda: _LOW,
  "chain": lambda: chain(
    optax.clip_by_global_norm(1.0),
    galore(rank=cases.RANK),
    optax.adamw(cases.RATE),
  ),
  "optax.chain": lambda: optax.chain(
    galore(optax.scale_by_adam(), rank=cases.RANK),
    optax.add_decayed_weights(0.1),
    optax.scale_by_learning_rate(cases.RATE),
  ),
  "named_chain": lambda: optax.named_chain(
    ("clip", optax.clip(1.0)), ("low", _LOW)
  ),
  "inject_hyperparams, static rank": lambda: _inject(static_args="rank")(
    optax.linear_schedule(1.0, 0.0, 9), rank=cases.RANK
  ),
  "inject_hyperparams, rank by rule": lambda: _inject()(
    cases.RATE, rules=[("both", Projection(rank=cases.RANK))]
  ),
  "MultiSteps": lambda: optax.MultiSteps(_LOW, 2).gradient_transformation(),
  "apply_if_finite": lambda: optax.apply_if_finite(_LOW, 3),
  "schedule_free": lambda: optax.contrib.schedule_free(_LOW, 0.1),
  "partition": lambda: optax.partition(
    {"a": _LOW, "b": optax.sgd(cases.RATE)}, {"bias": "a", "both": "a"}
  ),
}


@pytest.mark.parametrize("wrapper", _WRAPPED)
def test_state_shardings_follow_the_parameters(wrapper):
  """Bases along the side they span, moments like their parameter."""
  basis, mu = _specs_of(_WRAPPED[wrapper]())
  assert basis == {"left": ("x", None)}
  assert mu.low == {"both": ("x", "y")}
  assert mu.full["bias"] == ("y",)


def test_state_shardings_of_masked_leaves():
  tx = optax.masked(_LOW, {"bias": False, "both": True})
  basis, mu = _specs_of(tx)
  assert basis == {"left": ("x", None)}
  assert mu.low == {"both": ("x", "y")}
  assert mu.full["bias"] == optax.MaskedNode()


def test_state_shardings_of_both_sides():
  """y has four parts, into which a rank of two does not go."""
  basis, mu = _specs_of(galore_adamw(cases.RATE, rank=2, proj_type="full"))
  assert basis == {"left": ("x", None), "right": ("y", None)}
  assert mu.low == {"both": ("x", None)}


def test_state_shardings_of_stacked_layers():
  named = _shardings(_mesh(_AUTO))
  of_state = state_shardings(_LOW, _problem()[0], named)
  specs = jax.tree.map(lambda x: tuple(x.spec), of_state)
  assert cases.bases(specs)["stack"] == {"left": ("y", "x", None)}
  assert optax.tree.get(specs, "nu").low["stack"] == ("y", "x", None)


def test_state_shardings_without_galore():
  named = _shardings(_mesh(_AUTO))
  of_state = state_shardings(optax.adam(1e-3), _problem()[0], named)
  assert optax.tree.get(of_state, "mu") == named


def test_traced_rank_is_refused_with_what_works_instead():
  """`inject_hyperparams` traces what is not static when `init` is traced."""
  tx = _inject()(cases.RATE, rank=cases.RANK)
  named = _shardings(_mesh(_AUTO))
  with pytest.raises(ValueError, match=r"`rank`.*static_args"):
    state_shardings(tx, _problem()[0], named)


@every_of_arrays
def test_default_mesh_of_explicit_axes_with_replicated_arrays(name):
  """What `jax.make_mesh` gives by default, nothing being sharded."""
  tx, _ = cases.built(name)
  params, grads = cases.problem()
  mesh = jax.make_mesh((8,), ("data",))
  with jax.set_mesh(mesh):
    found = cases.run(tx, params, grads, jax.jit(tx.update))
  cases.assert_close(
    jax.device_get(found), jax.device_get(cases.reference(name))
  )


def test_extra_arguments_on_an_explicit_mesh():
  """Arrays and others reach the inner optimizer."""
  inner = optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau())
  tx = galore(inner, rank=cases.RANK)
  mesh = _mesh(_EXPLICIT)
  params, _ = _problem(_shardings(mesh))
  with jax.set_mesh(mesh):
    state = tx.init(params)
    update = jax.jit(lambda g, s, p, v: tx.update(g, s, p, value=v, name="a"))
    _, after = update(params, state, params, jnp.float32(3.0))
  assert optax.tree.get(after, "best_value") == 3.0


def _one_by_eight():
  return jax.make_mesh((1, 8), ("one", "x"), (_AUTO,) * 2)


def _updates(tx, spec):
  """Three updates of a stack of matrices on a mesh, and the compiled one."""
  mesh = _one_by_eight()
  sharding = jax.NamedSharding(mesh, spec)
  params, grads = (
    {"w": jax.device_put(cases.normal({"w": (8, 16, 24)}, k)["w"], sharding)}
    for k in (0, 1)
  )
  of_state = state_shardings(tx, params, {"w": sharding})
  state = jax.jit(tx.init, out_shardings=of_state)(params)
  update = jax.jit(tx.update, out_shardings=({"w": sharding}, of_state))
  update = update.lower(grads, state, params).compile()
  found = []
  for _ in range(3):
    updates, state = update(grads, state, params)
    found.append(jax.device_get(updates["w"]))
  return found, update.as_text()


@functools.cache
def _updates_of_one_device(**options):
  """The same updates where nothing is divided."""
  return _updates(galore_adamw(1e-2, update_proj_gap=4, **options), jax.P())[0]


@pytest.mark.parametrize(
  ("spec", "sides"),
  [
    (jax.P("x"), ["right"]),  # layers are divided: refreshed where they are
    (jax.P(None, "x"), ["right"]),
    (jax.P(None, "one", "x"), ["left"]),  # one device divides nothing
    (jax.P(None, None, "x"), ["left"]),
  ],
  ids=str,
)
@pytest.mark.parametrize("residual", [None, "normalized"])
def test_given_shardings_nothing_is_gathered(spec, sides, residual):
  """No gradient, basis or moment; and the updates are those of one device."""
  mesh = _one_by_eight()
  shardings = {"w": jax.NamedSharding(mesh, spec)}
  tx = galore_adamw(
    1e-2,
    rank=2,
    update_proj_gap=4,
    residual=residual,
    proj_type="auto",
    param_shardings=shardings,
  )
  state = tx.init({"w": jnp.zeros((8, 16, 24))})
  assert list(cases.bases(state)["w"]) == sides
  found, text = _updates(tx, spec)
  assert "all-gather" not in text and "all-reduce" in text
  wanted = _updates_of_one_device(rank=2, residual=residual, proj_type=sides[0])
  for x, y in zip(found, wanted, strict=True):
    cases.assert_close(x, y, 1e-4, 1e-5)


def _gathered(text):
  """Elements of the largest array that a program gathers."""
  found = re.findall(r"\[([\d,]+)\]\S* all-gather\(", text)
  return max(math.prod(map(int, shape.split(","))) for shape in found)


@pytest.mark.parametrize("residual", ["normalized", "factored"])
def test_given_shardings_residuals_are_added_one_by_one(residual):
  """The update of each matrix is that of one device."""
  spec = jax.P(None, "x")
  where = {"w": jax.NamedSharding(_one_by_eight(), spec)}
  tx = galore_adamw(
    1e-2,
    rank=8,
    update_proj_gap=4,
    residual=residual,
    param_shardings=where,
  )
  found, _ = _updates(tx, spec)
  wanted = _updates_of_one_device(rank=8, residual=residual)
  for x, y in zip(found, wanted, strict=True):
    cases.assert_close(x, y, 1e-4, 1e-5)


@pytest.mark.parametrize("given", [False, True])
def test_given_shardings_matrices_are_gathered_one_by_one(given):
  """The side is divided, so that low-rank updates have to be gathered."""
  spec, rank = jax.P(None, "x"), 8
  mesh = _one_by_eight()
  where = {"w": jax.NamedSharding(mesh, spec)}
  make = functools.partial(galore_adamw, 1e-2, rank=rank, update_proj_gap=4)
  found, text = _updates(make(param_shardings=where if given else None), spec)
  assert _gathered(text) == rank * 24 * (1 if given else 8)
  wanted = _updates_of_one_device(rank=rank)
  for x, y in zip(found, wanted, strict=True):
    cases.assert_close(x, y, 1e-4, 1e-5)


def test_without_shardings_stacks_of_divided_layers_are_gathered():
  """What `param_shardings` is for; if this fails, it has become needless."""
  tx = galore_adamw(1e-2, rank=2, update_proj_gap=4)
  assert "all-gather" in _updates(tx, jax.P("x"))[1]
