"""Layers that are stacked on another axis than the first."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from galore_optax import (
  Projection,
  baselines,
  describe,
  find_bases,
  galore,
  gum,
  state_bytes,
  state_shardings,
  sumo,
)
from tests.conformance import cases

DEPTH, ROWS, COLS = 3, 8, 16
RULE = [("kernel", Projection(rows=0, cols=2))]
QUICK = ("galore_adamw", "two-sided", "factored")  # the others: `-m slow`


class _Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    init = nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp"))
    return x, nn.Dense(COLS, kernel_init=init, name="up")(x)


def _boxed():
  """What `nn.scan` makes, with layers on the axis 1 of each leaf."""
  scan = nn.scan(
    _Block,
    variable_axes={"params": 1},
    split_rngs={"params": True},
    length=DEPTH,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  params = scan().init(jax.random.key(0), jnp.ones((2, ROWS)), None)["params"]
  return params["up"]


def _first(tree):
  """The same without boxes, and with layers on the axis 0."""
  return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), nn.unbox(tree))


def _grads(params, step):
  return jax.tree.map(lambda x: jnp.sin((step + 1) * 50 * x), params)


def _assert_the_same(tx, params):
  """Four steps, two of them with refreshes, next to layers on the axis 0."""
  first = _first(params)
  state, wanted = tx.init(params), tx.init(first)
  assert state_bytes(state) == state_bytes(wanted)
  assert describe(tx, params).total_bytes == state_bytes(wanted)
  update = jax.jit(tx.update)
  for step in range(4):
    grads = _grads(params, step)
    ours, state = update(grads, state, params)
    theirs, wanted = update(_first(grads), wanted, first)
    cases.assert_close(_first(ours), theirs)
  assert jax.tree.structure(ours) == jax.tree.structure(params)
  bases = find_bases(state)["kernel"]
  assert {x.shape[0] for x in bases.values()} == {DEPTH}


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(x, marks=() if x in QUICK else pytest.mark.slow)
    for x in cases.LAYOUTS
    if x not in cases.FULL_RANK
  ]
  + [pytest.param("sumo", marks=pytest.mark.slow)],
)
def test_named_layers_are_read_as_if_they_came_first(name):
  _assert_the_same(cases.make(name), _boxed())


def test_layers_that_a_rule_names():
  params = nn.unbox(_boxed())
  tx = galore(optax.adamw(1e-2, weight_decay=0.1), rank=2, rules=RULE)
  other = galore(optax.adamw(1e-2, weight_decay=0.1), rank=2)
  first = _first(params)
  state, wanted = tx.init(params), other.init(first)
  ours, _ = tx.update(_grads(params, 1), state, params)
  theirs, _ = other.update(_first(_grads(params, 1)), wanted, first)
  cases.assert_close(_first(ours), theirs)


def test_description():
  row = describe(galore(optax.adam(1e-3), rank=2), _boxed()).rows[1]
  assert (row.path, row.matrix) == ("kernel", f"{DEPTH} x ({ROWS}, {COLS})")
  assert row.state_bytes == DEPTH * 4 * (ROWS * 2 + 2 * 2 * COLS)


class _Stack(nnx.Module):
  def __init__(self, kernel, **metadata):
    self.kernel = nnx.Param(kernel, eager_sharding=False, **metadata)


def test_nnx_optimizer():
  """It takes gradients and parameters out of their boxes."""
  kernel = nn.unbox(_boxed())["kernel"]
  kernel += jnp.sin(jnp.arange(kernel.size).reshape(kernel.shape))
  names = ("embed", "layers", "mlp")
  models = [
    _Stack(kernel, out_sharding=names),
    _Stack(jnp.moveaxis(kernel, 1, 0)),
  ]
  for model in models:
    tx = galore(optax.adam(1e-2), rank=2, update_proj_gap=2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for step in range(3):
      grads = jax.tree.map(
        lambda x, i=step: jnp.sin(i + x), nnx.state(model, nnx.Param)
      )
      optimizer.update(model, grads)
  ours, theirs = (np.asarray(model.kernel[...]) for model in models)
  np.testing.assert_allclose(np.moveaxis(ours, 1, 0), theirs, atol=1e-5)
  assert np.abs(ours - kernel).max() > 1e-3


def test_a_suspicious_shape_is_named():
  params = nn.unbox(_boxed())
  tx = galore(optax.adam(1e-3), rank=2)
  message = (
    r"'kernel' \(8, 3, 16\) is read as 8 matrices of 3 x 16.*rows=0.*layers"
  )
  with pytest.warns(UserWarning, match=message) as caught:
    tx.init(params)
  assert len(caught) == 1
  # None of these warns, which pytest would report.
  tx.init(_boxed())
  galore(optax.adam(1e-3), rank=2, rules=RULE).init(params)
  last_two = [("kernel", Projection(rows=-2, cols=-1))]
  galore(optax.adam(1e-3), rank=2, rules=last_two).init(params)


def _named(shape, *names):
  return {"w": nn.Partitioned(jnp.ones(shape), names)}


@pytest.mark.parametrize(
  ("params", "shape"),
  [
    (_named((8, 16, 3), "embed", "mlp", "layers"), (3, 8, 2)),
    (_named((8, 3, 4, 16), "a", "layers", "expert", "b"), (3, 4, 8, 2)),
    (_named((8, 3, 16), None, ("x", "layers"), None), (3, 8, 2)),
    (_named((8, 3, 16), "decoder_layers", None, None), (8, 3, 2)),
    # A router has one column for each expert.
    (_named((16, 4), "embed", "experts"), (4, 2)),
    (_named((16, 2, 4), "embed", "layers", "experts"), (2, 4, 2)),
  ],
)
def test_names_of_axes(params, shape):
  bases = find_bases(galore(optax.adam(1e-3), rank=2).init(params))
  assert [x.shape for x in bases["w"].values()] == [shape]


def test_stacked_vectors_are_no_matrix():
  params = {**_named((8, 16), "embed", "layers"), "up": jnp.ones((8, 16))}
  tx = galore(optax.adam(1e-3), rank=2)
  rows = {row.path: row for row in describe(tx, params).rows}
  assert rows["w"].reason == "no matrix"
  assert rows["up"].rank == 2


def test_bases_that_do_not_tell_the_axes():
  """An update could not see which of the two axes stacks layers."""
  params = _named((8, 8, 16), "embed", "layers", "mlp")
  with pytest.raises(ValueError, match=r"'w'.*axes \(1,\).*rows=0, cols=2"):
    galore(optax.adam(1e-3), rank=2).init(params)
  rules = [("w", Projection(rows=0, cols=2))]
  galore(optax.adam(1e-3), rank=2, rules=rules).init(params)
  galore(optax.adam(1e-3), rank=2).init(_named((8, 8, 16), "layers", "a", "b"))


def test_shardings_of_the_state():
  """Given shardings as Flax makes them: in place of the boxes, or in them."""
  mesh = jax.make_mesh((2, 4), ("x", "y"), (jax.sharding.AxisType.Auto,) * 2)
  params = _boxed()
  named = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))
  plain = {"bias": named("y"), "kernel": named("x", None, "y")}
  boxed = {
    **plain,
    "kernel": jax.tree.map(lambda _: plain["kernel"], params["kernel"]),
  }
  tx = galore(optax.adam(1e-3), rank=2)
  shardings = state_shardings(tx, params, plain)
  assert shardings == state_shardings(tx, params, boxed)
  assert shardings.projector["kernel"]["left"].spec == jax.P(None, "x", None)
  mu = optax.tree.get(shardings, "mu").low["kernel"]
  assert mu.spec == jax.P(None, "x", "y")
  state = jax.jit(tx.init, out_shardings=shardings)(params)
  assert jax.tree.map(lambda x: x.sharding, state) == shardings


def test_factors():
  params = _boxed()
  _, adapters = baselines.lora(2).init(jax.random.key(0), params)
  assert adapters["kernel"].a.shape == (DEPTH, ROWS, 2)
  assert adapters["kernel"].change().shape == params["kernel"].value.shape


@pytest.mark.filterwarnings("ignore:galore projects none")
@pytest.mark.parametrize("make", [sumo, gum])
def test_orthogonal_momentum_at_full_rank_is_refused(make):
  """It is that of the last two axes."""
  with pytest.raises(ValueError, match=f"{make.__name__}.*'kernel'.*None"):
    make(1e-3, rank=8).init(_boxed())
  make(1e-3, rank=8, rules=[("kernel", None)]).init(_boxed())
