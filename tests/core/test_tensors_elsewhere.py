"""Tucker factors with what else an optimizer goes through."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from galore_optax import Projection, galore
from tests.core.small import MODEL, left_of_the_way
from tests.marks import slow

GAP = 3
# Four tensors of height, inputs and outputs, and a matrix.
SHAPES = {"conv": (4, 3, 8, 16), "w": (8, 12)}
RULES = [("conv", Projection(tensor=(2, 3), stack=0, rank=(2, 0.25)))]


def make(**options):
  inner = options.pop("inner", optax.adamw(1e-2, weight_decay=0.1))
  options = {"rules": RULES, "update_proj_gap": GAP, **options}
  return galore(inner, rank=4, **options)


def normal(seed, shapes=SHAPES, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  return {k: jnp.asarray(rng.normal(size=x), dtype) for k, x in shapes.items()}


def run(tx, steps=5, repeat=1, dtype=jnp.float32):
  params = normal(0, dtype=dtype)
  state, update = tx.init(params), jax.jit(tx.update)
  for step in range(steps):
    for _ in range(repeat):
      updates, state = update(normal(step + 1, dtype=dtype), state, params)
      params = optax.apply_updates(params, updates)
  return params, state


@pytest.fixture(scope="module")
def plain():
  return run(make())[0]


def assert_close(found, wanted, atol=1e-5):
  for path, x in wanted.items():
    np.testing.assert_allclose(found[path], x, atol=atol, err_msg=path)


def test_accumulated_gradients_are_the_mean(plain):
  params, state = run(make(accumulation_steps=2), repeat=2)
  assert_close(params, plain)
  assert state.accumulator.low["conv"].shape == (4, 3, 2, 4)


def test_chain_and_clipping_keep_the_moments_small(plain):
  tx = go.chain(
    optax.clip_by_global_norm(1e9),
    make(inner=None),
    optax.adamw(1e-2, weight_decay=0.1),
  )
  assert_close(run(tx)[0], plain)


def test_bfloat16_parameters_have_moments_in_bfloat16():
  params, state = run(make(), dtype=jnp.bfloat16)
  assert params["conv"].dtype == jnp.bfloat16
  mu = optax.tree.get(state, "mu").low["conv"]
  assert (mu.dtype, mu.shape) == (jnp.bfloat16, (4, 3, 2, 4))
  bases = state.projector["conv"].values()
  assert all(x.dtype == jnp.float32 for x in bases)
  wanted = run(make())[0]["conv"]
  close = np.isclose(params["conv"].astype(np.float32), wanted, atol=0.05)
  assert np.mean(close) > 0.95


@pytest.mark.parametrize(
  ("inner", "options"),
  [
    (optax.lion(0.03), {}),
    (
      optax.adafactor(
        0.05, min_dim_size_to_factor=2, multiply_by_parameter_scale=False
      ),
      {},
    ),
    (optax.adam(0.05), {"params_mode": "project"}),
    (optax.adam(0.1), {"refresh": go.Refresh(random_from=5)}),
    slow(optax.adam(0.1), {"faithful": True}),
    slow(optax.adam(0.05), {"refresh": go.Refresh(moments="ldadam")}),
  ],
)
def test_other_settings_reach_the_target(inner, options):
  rules = [("w", Projection(tensor=(0, 2), rank=0.75))]
  tx = galore(inner, scale=1.0, rules=rules, update_proj_gap=GAP, **options)
  assert left_of_the_way(tx, (6, 3, 8)) < 0.6


def test_projected_gradients_leave_tensors_whole():
  """A matrix's gradient comes at rank r, that of a tensor as it is."""

  def loss(params, x):
    y = jnp.einsum("bi,nhio->bo", x, params["conv"])
    return jnp.mean((x @ params["w"]) ** 2) + jnp.mean((y - 1) ** 2)

  rng = np.random.default_rng(0)
  tx, batch = make(), jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
  ends = []
  for lean in (True, False):
    params = normal(0)
    state = tx.init(params)
    gradients = go.projected_value_and_grad(loss, tx)

    @jax.jit
    def step(params, state, lean=lean, gradients=gradients):
      if lean:
        _, grads, state = gradients(params, state, batch)
        shapes = (grads["w"].shape, grads["conv"].shape)
        assert shapes == ((4, 12), SHAPES["conv"])
      else:
        grads = jax.grad(loss)(params, batch)
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    for _ in range(5):
      params, state = step(params, state)
    ends.append(params)
  assert_close(*ends, atol=1e-4)


def test_updates_inside_the_backward_pass_are_the_same():
  """There a rule is about the leaf of one layer, here about the stack."""
  shapes = {"inner": (8, 16), "layers": (3, 16, 16), "outer": (16, 1)}
  params = normal(0, shapes)
  way = {"tensor": (-2, -1), "rank": (4, 6)}
  rules = lambda **stack: [
    ("layers", Projection(**way, **stack)),
    ("", None),
  ]
  init, step = go.layerwise(make(rules=rules()), MODEL)
  tx = make(rules=rules(stack=0))
  step = jax.jit(step)

  @jax.jit
  def usual(params, state, batch):
    grads = jax.grad(MODEL.loss)(params, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  fused, state, other = params, init(params), tx.init(params)
  for i in range(5):
    (batch,) = normal(i, {"x": (4, 8)}).values()
    fused, state, _ = step(fused, state, batch)
    params, other = usual(params, other, batch)
  assert_close(fused, params, atol=1e-4)


@pytest.mark.parametrize(
  ("kind", "spec", "told"),
  [
    ("Auto", ("y", None, "x", None), True),
    slow("Auto", ("y", None, "x", None), False),
    slow("Auto", (None, None, "x", "y"), True),
    ("Explicit", (None, None, "x", "y"), False),
  ],
)
def test_meshes(plain, kind, spec, told):
  """The state is sharded as the leaf is, and numbers are those of one device.

  Told of the sharding, the first reads tensors that devices divide, and the
  second projects one after the other.
  """
  kind = getattr(jax.sharding.AxisType, kind)
  mesh = jax.make_mesh((2, 4), ("x", "y"), (kind,) * 2)
  named = {
    "conv": jax.NamedSharding(mesh, jax.P(*spec)),
    "w": jax.NamedSharding(mesh, jax.P("x", None)),
  }
  tx = make(param_shardings=named) if told else make()
  params = jax.device_put(normal(0), named)
  of_state = go.state_shardings(tx, params, named)
  factors = of_state.projector["conv"]
  assert factors["axis1"].spec == jax.P(spec[0], spec[2], None)
  assert factors["axis2"].spec == jax.P(spec[0], spec[3], None)
  update = jax.jit(tx.update)
  with jax.set_mesh(mesh):
    if kind == jax.sharding.AxisType.Auto:
      state = jax.jit(tx.init, out_shardings=of_state)(params)
    else:
      state = jax.jit(tx.init)(params)
    for step in range(5):
      grads = jax.device_put(normal(step + 1), named)
      updates, state = update(grads, state, params)
      params = optax.apply_updates(params, updates)
  assert_close(jax.device_get(params), plain)
