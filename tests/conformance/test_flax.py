"""Flax: NNX and Linen, sharding metadata, and scanned layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

from galore_optax import (
  adamw_8bit,
  dequantize,
  find_bases,
  galore_adamw,
  galore_adamw_8bit,
  projected_value_and_grad,
  state_bytes,
)
from tests.conformance import cases
from tests.conformance.cases import (
  every,
  every_layout,
  every_with_slow_codes,
)

# Of these, two keep codes for a bias that is in the box of its parameter.
every_or_8_bits = pytest.mark.parametrize(
  "name", ["galore_adamw", "q_galore_adamw_8bit", "adamw_8bit", cases.CONTROL]
)

_X = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)


def _linear(annotated=False, annotated_bias=False, **more):
  metadata = lambda *axes: {"out_sharding": axes, **more}
  return nnx.Linear(
    16,
    8,
    rngs=nnx.Rngs(0),
    kernel_metadata=metadata("x", "y") if annotated else {},
    bias_metadata=metadata("y") if annotated_bias else {},
  )


def _loss(model):
  return jnp.mean((model(_X) - 1) ** 2)


def _train(model, optimizer):
  loss, grads = nnx.value_and_grad(_loss)(model)
  optimizer.update(model, grads)
  return loss


def _plain_run(tx, steps=3, **metadata):
  """The same steps with `nnx.split`, `nnx.merge` and `jax.jit`."""
  graphdef, params = nnx.split(_linear(**metadata), nnx.Param)

  @jax.jit
  def step(params, state):
    grads = jax.grad(lambda p: _loss(nnx.merge(graphdef, p)))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for _ in range(steps):
    params, state = step(params, state)
  return nnx.to_pure_dict(params), state


def test_annotated_state_with_projected_gradients():
  """A backward pass that refreshes bases leaves them in their boxes."""

  def run(**metadata):
    graphdef, params = nnx.split(_linear(**metadata), nnx.Param)
    tx = galore_adamw(0.05, rank=4, scale=1.0, update_proj_gap=2)
    loss = lambda p: _loss(nnx.merge(graphdef, p))
    value_and_grad = jax.jit(projected_value_and_grad(loss, tx))
    state = first = tx.init(params)
    for _ in range(3):
      _, grads, state = value_and_grad(params, state)
      assert grads.kernel.shape == (16, 4)
      updates, state = jax.jit(tx.update)(grads, state, params)
      params = optax.apply_updates(params, updates)
    assert jax.tree.structure(state) == jax.tree.structure(first)
    return jax.device_get(nnx.to_pure_dict(params)), state

  found, state = run(annotated=True, eager_sharding=False)
  cases.assert_close(found, run()[0], 1e-5, 1e-6)
  (basis,) = state.projector["kernel"].values()
  assert basis.get_metadata()["out_sharding"] == ("y", None)


def _pure(model):
  return jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


@functools.cache
def _wanted(name):
  params, state = _plain_run(cases.make(name))
  cases.assert_projects(name, state)
  return jax.device_get(params)


@every
def test_nnx_split_and_merge_under_jit_trains(name):
  moved = jax.tree.map(
    lambda x, y: np.any(x != y), _wanted(name), _pure(_linear())
  )
  assert all(jax.tree.leaves(moved))


@every_or_8_bits
def test_nnx_optimizer_under_jit(name):
  model = _linear()
  optimizer = nnx.Optimizer(model, cases.make(name), wrt=nnx.Param)
  train = nnx.jit(_train)
  types = cases.types(nnx.state(optimizer))
  losses = [train(model, optimizer) for _ in range(3)]
  assert losses[-1] < losses[0]
  assert cases.types(nnx.state(optimizer)) == types
  cases.assert_close(_pure(model), _wanted(name), 1e-4, 1e-5)


def _mesh():
  return jax.make_mesh((2, 4), ("x", "y"), (jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize(
  "name",
  [
    "galore_adamw",
    pytest.param("q_galore_adamw_8bit", marks=pytest.mark.slow),
  ],
)
def test_annotated_nnx_optimizer_eagerly(name):
  """Metadata of a kernel must not reach what stands for it at low rank."""
  with jax.set_mesh(_mesh()):
    model = _linear(annotated=True)
    assert model.kernel[...].sharding.spec == jax.P("x", "y")
    optimizer = nnx.Optimizer(model, cases.make(name), wrt=nnx.Param)
    for _ in range(3):
      _train(model, optimizer)
  cases.assert_close(_pure(model), _wanted(name), 1e-4, 1e-5)


@every_with_slow_codes
def test_annotated_nnx_optimizer_under_jit(name):
  tx = cases.make(name)

  @nnx.jit
  def create():
    model = _linear(annotated=True)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

  mesh = _mesh()
  train = nnx.jit(_train)
  with jax.set_mesh(mesh):
    model, optimizer = create()
    _assert_fitting(nnx.state(optimizer), mesh)
    for _ in range(3):
      train(model, optimizer)
  cases.assert_close(_pure(model), _wanted(name), 1e-4, 1e-5)


@every_with_slow_codes
def test_annotated_state_outside_of_an_optimizer(name):
  """Boxes with names around bases and moments change no number."""
  tx = cases.make(name)
  params, state = _plain_run(tx, annotated=True, eager_sharding=False)
  cases.assert_close(jax.device_get(params), _wanted(name), 1e-4, 1e-5)
  plain = _plain_run(tx)[1]
  assert state_bytes(state) == state_bytes(plain)
  bases, wanted = find_bases(state), find_bases(plain)
  assert bases.keys() == wanted.keys()
  cases.assert_close(bases, wanted, 1e-4, 1e-5)


@pytest.mark.parametrize("rank, axis", [(4, "y"), (3, None)])
@pytest.mark.parametrize("codes", [False, True])
def test_annotated_state_of_rank_r_is_sharded(rank, axis, codes):
  """The rank's axis is divided like the projected side if the mesh divides it.

  The axes may be named by aliases, for which rules give the axes of the mesh.
  """
  make = galore_adamw_8bit if codes else galore_adamw
  more = {"min_size": 0, "basis_dtype": "int8"} if codes else {}
  tx = make(0.05, rank=rank, scale=1.0, **more)

  def create(rename, **metadata):
    linear = _linear(annotated=True, **metadata)
    kernel = linear.kernel
    kernel.set_metadata(out_sharding=tuple(map(rename, ("x", "y"))))
    return nnx.state(nnx.Optimizer(linear, tx, wrt=nnx.Param))

  rules = (("rows", "x"), ("columns", "y"))
  aliases = {axis: alias for alias, axis in rules}
  with jax.set_mesh(_mesh()):
    plain = create(lambda x: x)
    renamed = create(aliases.get, sharding_rules=rules)
  for state in plain, renamed:
    of_rank_r = _arrays_of_rank_r(nnx.to_pure_dict(state))
    assert {keys: x.sharding.spec for keys, x in of_rank_r.items()} == {
      "mu": jax.P("x", axis),
      "nu": jax.P("x", axis),
      "basis": jax.P(None, "y") if codes else jax.P("y", None),
    }


def _arrays_of_rank_r(state):
  """Moments of the kernel, and its basis; of quantized ones the codes."""
  codes = lambda x: x["codes"] if isinstance(x, dict) else x
  adam = state["opt_state"]["inner_state"][0]
  return {
    "mu": codes(adam["mu"]["low"]["kernel"]),
    "nu": codes(adam["nu"]["low"]["kernel"]),
    "basis": codes(state["opt_state"]["projector"]["kernel"]["right"]),
  }


def test_annotation_by_a_named_sharding():
  """Its mesh says whether the rank can be divided."""
  mesh = _mesh()
  model = _linear(annotated=True, eager_sharding=False)
  sharding = jax.NamedSharding(mesh, jax.P("x", "y"))
  model.kernel.set_metadata(out_sharding=sharding)
  params = nnx.state(model, nnx.Param)
  for rank, axis in (4, "y"), (3, None):
    state = galore_adamw(0.05, rank=rank, scale=1.0).init(params)
    (mu,) = optax.tree.get(state, "mu").low.values()
    found = mu.get_metadata()["out_sharding"]
    assert found == jax.NamedSharding(mesh, jax.P("x", axis))


def test_a_state_may_be_sharded_unlike_its_parameters():
  """By Flax's `optimizer_sharding`, as full moments are."""
  model = _linear(annotated=True, eager_sharding=False)
  model.kernel.set_metadata(optimizer_sharding=(None, "x"))
  tx = galore_adamw(0.05, rank=4, scale=1.0)
  state = nnx.state(nnx.Optimizer(model, tx, wrt=nnx.Param))
  specs = nnx.to_pure_dict(nnx.get_partition_spec(state))
  assert _arrays_of_rank_r(specs) == {
    "mu": jax.P(None, "x"),
    "nu": jax.P(None, "x"),
    "basis": jax.P("x", None),
  }


def _assert_fitting(state, mesh):
  """Asserts that the shardings of the metadata divide every array."""
  shardings = nnx.to_pure_dict(nnx.get_named_sharding(state, mesh))
  pure = nnx.to_pure_dict(state)
  flat, _ = jax.tree_util.tree_flatten_with_path(pure)
  wanted = dict(jax.tree_util.tree_flatten_with_path(shardings)[0])
  for keys, x in flat:
    wanted[keys].shard_shape(x.shape)


@every
def test_annotated_bias(name):
  """A leaf at full rank keeps its metadata."""

  def check(make):
    with jax.set_mesh(_mesh()):
      model = _linear(annotated=True, annotated_bias=True)
      optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)
    _assert_fitting(nnx.state(optimizer), _mesh())

  cases.hold("annotated bias", name, check)


def _boxed():
  params, grads = cases.problem()
  box = lambda tree: {
    "bias": nn.Partitioned(tree["bias"], ("y",)),
    "kernel": nn.Partitioned(tree["kernel"], ("x", "y")),
  }
  return box(params), [box(g) for g in grads]


@every
def test_partition_specs_of_boxed_parameters(name):
  """Every array of the state can be sharded as its spec says."""
  params, _ = _boxed()
  is_box = lambda x: isinstance(x, nn.Partitioned)
  is_masked = lambda x: is_box(x) and isinstance(x.value, optax.MaskedNode)

  def check(make):
    state = make().init(params)
    specs = jax.tree.leaves(nn.get_partition_spec(state), is_leaf=_is_spec)
    boxes = jax.tree.leaves(state, is_leaf=is_box)
    for x, spec in zip(boxes, specs, strict=True):
      if not is_masked(x):
        value = x.value if is_box(x) else x
        jax.NamedSharding(_mesh(), spec).shard_shape(value.shape)

  cases.hold("boxed bias", name, check)
  state = jax.tree.leaves(cases.make(name).init(params), is_leaf=is_box)
  assert any(map(is_masked, state)) == (name != cases.CONTROL)


def _is_spec(x):
  return isinstance(x, jax.P)


@every
def test_boxed_parameters_give_boxed_updates(name):
  params, grads = _boxed()
  tx = cases.make(name)
  found, state = cases.run(tx, params, grads)
  assert cases.types(state) == cases.types(tx.init(params))
  assert isinstance(found["kernel"], nn.Partitioned)
  unboxed = nn.meta.unbox(found)
  cases.assert_projects(name, state)
  cases.assert_close(unboxed, cases.reference(name)[0], 1e-4, 1e-5)


def test_a_box_holds_the_codes_of_a_moment():
  """They have the parameter's shape, as the axes in its box say."""
  params = {"embed": nn.Partitioned(jnp.ones((16, 300)), ("x", "y"))}
  state = adamw_8bit(1e-3, min_size=0).init(params)
  found = jax.tree.leaves(nn.get_partition_spec(state), is_leaf=_is_spec)
  count, codes, scale = found[:3]
  assert codes == jax.P("x", "y")
  assert count == scale == jax.P()
  mu = optax.tree.get(state, "mu")["embed"]
  assert mu.shape == (16, 300) and mu.ndim == 2 and mu.size == 4800
  np.testing.assert_array_equal(dequantize(mu), np.zeros((16, 300)))


@every_layout
def test_linen_train_state(name):
  params, grads = cases.problem(name=name)
  tx, _ = cases.built(name)
  state = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
  step = jax.jit(lambda state, g: state.apply_gradients(grads=g))
  for g in grads:
    state = step(state, g)
  found = (state.params, state.opt_state)
  cases.assert_close(found, cases.reference(name))


class _Block(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(16, 16, rngs=rngs)
    self.norm = nnx.RMSNorm(16, rngs=rngs)

  def __call__(self, x):
    return x + jax.nn.tanh(self.dense(self.norm(x)))


def _nnx_stack():
  @nnx.split_rngs(splits=3)
  @nnx.vmap(
    in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"}
  )
  def make(rngs):
    return _Block(rngs=rngs)

  @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
  def forward(x, block):
    return block(x)

  graphdef, params = nnx.split(make(nnx.Rngs(0)), nnx.Param)
  return params, lambda p: jnp.mean(forward(_X, nnx.merge(graphdef, p)) ** 2)


class _LinenBlock(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    y = nn.Dense(16, name="dense")(nn.RMSNorm(name="norm")(x))
    return x + jnp.tanh(y), None


def _linen_stack():
  stack = nn.scan(
    _LinenBlock,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=3,
  )()
  params = stack.init(jax.random.key(0), _X, None)["params"]
  return params, lambda p: jnp.mean(
    stack.apply({"params": p}, _X, None)[0] ** 2
  )


@every_with_slow_codes
@pytest.mark.parametrize("stack", [_nnx_stack, _linen_stack])
def test_scanned_layers(name, stack):
  """Kernels are projected layer by layer; biases and norm scales are not."""
  tx = cases.make(name)
  params, loss = stack()
  state = tx.init(params)
  cases.assert_projects(name, state, ("dense/kernel",))
  for side, basis in cases.bases(state).get("dense/kernel", {}).items():
    assert basis.shape == (3, 16, cases.RANK), side

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  values = []
  for _ in range(3):
    params, state, value = step(params, state)
    values.append(float(value))
  assert values[-1] < values[0]
