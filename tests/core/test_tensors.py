"""Tucker factors: leaves of which a rule projects several axes."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from galore_optax import Projection, Refresh, describe, galore
from galore_optax.subspace import projection
from galore_optax.tree import tensor_view
from tests.core import tensor_reference

GAP, RATE, DECAY, ALPHA = 3, 0.01, 0.1, 0.25
SHAPES = {
  "attention": (12, 4, 6),  # width, heads, size of a head
  "conv": (3, 3, 8, 10),  # height, width, inputs, outputs
  "experts": (6, 8, 2, 9),  # the third axis counts tensors
  "matrix": (8, 12),
}
RULES = [
  ("attention", Projection(tensor=(0, -1), rank=0.5)),
  ("conv", Projection(tensor=(2, 3), rank=(3, 5))),
  ("experts", Projection(tensor=(0, 1, 3), stack=2, rank=(2, 8, 3))),
]


def make(**options):
  inner = optax.adamw(RATE, weight_decay=DECAY)
  options = {"update_proj_gap": GAP, "rules": RULES, **options}
  return galore(inner, rank=4, scale=ALPHA, **options)


def normal(seed, shapes=SHAPES, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  return {k: jnp.asarray(rng.normal(size=x), dtype) for k, x in shapes.items()}


def train(tx, steps=8, params=None, dtype=jnp.float32):
  """Parameters and states after each step, and the gradients."""
  params = normal(0, dtype=dtype) if params is None else params
  state, update = tx.init(params), jax.jit(tx.update)
  shapes = {path: x.shape for path, x in params.items()}
  for step in range(steps):
    grads = normal(step + 1, shapes, dtype)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    yield params, state, grads


@pytest.fixture(scope="module")
def trained():
  return list(train(make()))


def references(state):
  """Path to the references of a leaf's tensors, and what counts them."""
  found, axes = {}, {"attention": None, "conv": None, "experts": 2}
  for path, stack in axes.items():
    factors = {int(k[-1]): x for k, x in state.projector[path].items()}
    parts = (
      [factors]
      if stack is None
      else [{k: x[i] for k, x in factors.items()} for i in range(2)]
    )
    found[path] = (
      stack,
      [tensor_reference.TuckerAdamW(x, ALPHA, RATE, DECAY) for x in parts],
    )
  return found


def is_due(step, number, count=5):
  return step == 0 or step % GAP == number * GAP // count


def test_it_is_the_reference_through_several_refreshes(trained):
  weights = {k: np.asarray(x, np.float64) for k, x in normal(0).items()}
  found = references(make().init(normal(0)))
  first = {"attention": 0, "conv": 1, "experts": 2}  # the matrix is the fifth
  for step, (params, state, grads) in enumerate(trained):
    for path, (stack, tensors) in found.items():
      for i, tensor in enumerate(tensors):
        at = (...,) if stack is None else (slice(None), slice(None), i)
        change = tensor.update(
          weights[path][at],
          np.asarray(grads[path])[at],
          is_due(step, first[path] + i),
        )
        weights[path][at] += change
        bases = state.projector[path]
        for axis, factor in tensor.factors.items():
          basis = bases[f"axis{axis}"]
          basis = basis if stack is None else basis[i]
          np.testing.assert_allclose(basis, factor, atol=1e-5)
      np.testing.assert_allclose(params[path], weights[path], atol=1e-5)


def test_exact_factors_are_those_of_the_reference():
  """Singular vectors span what very many iterations do."""
  params = {"conv": normal(0)["conv"]}
  tx = make(rules=RULES[1:2], refresh=Refresh(finder="svd"))
  ((_, state, grads),) = train(tx, 1, params)
  for axis in (2, 3):
    basis = np.asarray(state.projector["conv"][f"axis{axis}"])
    u = np.linalg.svd(tensor_reference.unfold(grads["conv"], axis))[0]
    u = u[:, : basis.shape[1]]
    np.testing.assert_allclose(basis @ basis.T, u @ u.T, atol=1e-5)


def test_factors_are_orthonormal_and_fit_the_axes(trained):
  state = trained[-1][1]
  shapes = {
    path: {side: x.shape for side, x in bases.items()}
    for path, bases in state.projector.items()
  }
  assert shapes == {
    "attention": {"axis0": (12, 6), "axis2": (6, 3)},
    "conv": {"axis2": (8, 3), "axis3": (10, 5)},
    # The rank 8 is the size of the second axis, which stays whole.
    "experts": {"axis0": (2, 6, 2), "axis2": (2, 9, 3)},
    "matrix": {"left": (8, 4)},
  }
  for bases in state.projector.values():
    for basis in bases.values():
      gram = jnp.einsum("...mr,...ms->...rs", basis, basis)
      np.testing.assert_allclose(
        gram, np.broadcast_to(np.eye(gram.shape[-1]), gram.shape), atol=1e-5
      )


def test_one_factor_is_the_matrix_view():
  """Projecting the outputs alone is the right side of the matrix."""
  params = {"conv": normal(0)["conv"]}
  ways = [
    Projection(tensor=3, rank=4),
    Projection(rows=(0, 1, 2), cols=3, proj_type="right"),
  ]
  bases = None
  ends = []
  for way in ways:
    tx = make(rules=[("conv", way)])
    state, update, x = tx.init(params), jax.jit(tx.update), params
    if bases is None:
      (bases,) = state.projector["conv"].values()
    else:
      state = state._replace(projector={"conv": {"right": bases}})
    for step in range(5):
      updates, state = update({"conv": normal(step + 1)["conv"]}, state, x)
      x = optax.apply_updates(x, updates)
    ends.append(x["conv"])
  np.testing.assert_allclose(*ends, atol=1e-5)


def test_the_gradient_of_low_rank_is_followed_exactly():
  """A gradient whose rank is that of the factors loses nothing."""
  rng = np.random.default_rng(0)
  core = rng.normal(size=(3, 3, 3, 5))
  g = tensor_reference.times(core, rng.normal(size=(8, 3)), 2)
  g = jnp.asarray(tensor_reference.times(g, rng.normal(size=(10, 5)), 3))
  tx = galore(optax.sgd(1.0), scale=1.0, rules=RULES[1:2])
  params = {"conv": jnp.zeros(g.shape)}
  updates, state = tx.update({"conv": g}, tx.init(params), params)
  np.testing.assert_allclose(updates["conv"], -g, atol=1e-4)
  share = go.captured_energy(g, state.projector["conv"])
  np.testing.assert_allclose(share, 1, rtol=1e-5)


def test_directions_of_noise_stay_zero():
  """In a gradient of rank one, Adam would scale up what is rounding."""
  vectors = [np.arange(1.0, n + 1) for n in SHAPES["conv"]]
  g = jnp.asarray(np.einsum("a,b,c,d->abcd", *vectors), jnp.float32)
  tx = galore(optax.adam(1.0), scale=1.0, rules=RULES[1:2])
  params = {"conv": jnp.zeros(g.shape)}
  _, state = tx.update({"conv": g}, tx.init(params), params)
  mu = optax.tree.get(state, "mu").low["conv"]
  assert np.sum(np.abs(mu) > 0) == 9  # one direction of each axis, nine places


def test_describe_shows_factors_core_and_bytes():
  tx = make()
  params = normal(0)
  rows = {row.path: row for row in describe(tx, params).rows}
  conv, experts = rows["conv"], rows["experts"]
  assert conv.matrix == "(3, 3, 8, 10), core (3, 3, 3, 5)"
  assert conv.side == "axis2 (8, 3), axis3 (10, 5)"
  assert (conv.rank, experts.rank) == ((3, 5), (2, 3))
  assert conv.state_bytes == 4 * (8 * 3 + 10 * 5 + 2 * 9 * 3 * 5)
  assert experts.matrix == "2 x (6, 8, 9), core (2, 8, 3)"
  assert "3, 5" in str(describe(tx, params))
  total = sum(row.state_bytes for row in rows.values())
  assert go.state_bytes(jax.eval_shape(tx.init, params)) == total + 8


def test_a_state_is_restored_with_its_factors(trained):
  state = trained[3][1]
  empty = make().init(normal(0))
  data = flax.serialization.to_bytes(state)
  restored = flax.serialization.from_bytes(empty, data)
  grads, params = trained[4][2], trained[3][0]
  update = jax.jit(make().update)
  for a, b in zip(
    jax.tree.leaves(update(grads, restored, params)),
    jax.tree.leaves(update(grads, state, params)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  rules = [("conv", Projection(tensor=(2, 3), rank=(3, 4))), *RULES]
  with pytest.raises(
    ValueError, match=r"'conv' has rank.*'axis3': 5.*'axis3': 4"
  ):
    make(rules=rules).update(grads, restored, params)
  rules = [("conv", Projection(rows=(0, 1, 2), cols=3)), *RULES]
  with pytest.raises(
    ValueError, match=r"'conv'.*does not fit the state's basis"
  ):
    make(rules=rules).update(grads, restored, params)


def test_factors_are_not_taken_for_the_sides_of_a_matrix():
  """Two of the same shapes: bases of a matrix, and factors of its axes."""
  params = {"w": jnp.ones((8, 12))}
  two_sided = galore(optax.adam(1.0), rank=4, proj_type="full")
  rules = [("w", Projection(tensor=(0, 1), rank=4))]
  factors = galore(optax.adam(1.0), rules=rules)
  for one, other in ((two_sided, factors), (factors, two_sided)):
    with pytest.raises(
      ValueError, match=r"'w'.*does not fit the state's basis"
    ):
      one.update(params, other.init(params), params)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"rank": (3, 5)}, "has several entries.*tensor="),
    ({"tensor": (2, 3), "rank": (3,)}, "one entry for each axis of `tensor`"),
    ({"tensor": 3, "rank": (3, 5)}, "one entry for each axis of `tensor`"),
    ({"tensor": (2, 3), "rank": (0.5, 1.5)}, "at most 1.0"),
    ({"tensor": (2, 3), "rows": 0}, "rows=0.*Leave one"),
    ({"tensor": (2, 3), "cols": 0}, "cols=0.*Leave one"),
    ({"tensor": (2, 3), "proj_type": "std"}, "proj_type='std'.*Leave one"),
    ({"stack": 0}, "`stack` is for `tensor`"),
  ],
)
def test_contradictions_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Projection(**fields)


@pytest.mark.parametrize(
  ("how", "message"),
  [
    (
      Projection(tensor=(2, 4)),
      "'conv': `tensor` must be axes between -4 and 3",
    ),
    (Projection(tensor=(2, -2)), "must name different axes"),
    (Projection(tensor=(2, 3), stack=2), "must name different axes"),
    (Projection(tensor=()), "must name at least one axis"),
    (Projection(tensor=(0, 1)), "sizes \\(3, 3\\), none.*rank 4.*None"),
  ],
)
def test_a_rule_that_does_not_fit_its_leaf_is_refused(how, message):
  params = {"conv": jnp.zeros(SHAPES["conv"])}
  with pytest.raises(ValueError, match=message):
    make(rules=[("conv", how)]).init(params)


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (lambda: make(residual="fira"), "residual='fira'.*'normalized'"),
    (lambda: go.apollo_adamw(1e-3, rules=RULES), "apollo|random"),
    (lambda: go.sumo(1e-3, rules=RULES), "`sumo`"),
    (lambda: go.gum(1e-3, rules=RULES), "`gum`"),
    (lambda: go.ldadam(1e-3, rules=RULES), "`ldadam`"),
    (lambda: go.baselines.lora(rank=2, rules=RULES), "adapters"),
  ],
)
def test_what_needs_matrices_refuses_tensors(build, message):
  with pytest.raises(ValueError, match=f"'attention'.*({message}).*rows="):
    build()


def test_axes_that_count_layers_are_found_by_their_names():
  """As `nn.scan` names them, also on another axis than the first."""
  box = flax.linen.Partitioned(
    jnp.ones((3, 8, 5, 10)), (None, None, "layers", None)
  )
  tx = make(rules=[("conv", Projection(tensor=(1, 3), rank=(3, 4)))])
  state = tx.init({"conv": box})
  assert optax.tree.get(state, "mu").low["conv"].shape == (5, 3, 3, 4)
  (row,) = describe(tx, {"conv": box}).rows
  assert row.matrix == "5 x (3, 8, 10), core (3, 3, 4)"
  assert (row.reason, row.guessed) == ("axis 'layers'", True)
  # An update knows no names, but finds the axis by the shapes of factors.
  unboxed = {"conv": box.value}
  state = tx.init({"conv": box.replace_boxed(box.value)})
  update = lambda g, params: tx.update({"conv": g}, state, {"conv": params})[0]
  assert update(box, box)["conv"].value.shape == (3, 8, 5, 10)
  assert describe(tx, unboxed).rows[0].matrix != row.matrix


def test_views_are_undone():
  view = tensor_view.tensor_view((4, 3, 2, 5), (3, 1), stack=2)
  assert (view.stack, view.dims, view.factored) == ((2,), (4, 3, 5), (2, 1))
  x = jnp.arange(120).reshape(4, 3, 2, 5)
  y = view.as_stack(x)
  assert y.shape == (2, 4, 3, 5)
  np.testing.assert_array_equal(y[1], x[:, :, 1])
  np.testing.assert_array_equal(view.from_stack(y), x)
  assert view.spec(("a", "b", "c", "d")) == ("c", "a", "b", "d")


def test_projection_and_lift_are_products_along_axes():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 4, 5))
  factors = {
    "axis0": rng.normal(size=(2, 3, 2)),
    "axis2": rng.normal(size=(2, 5, 4)),
  }
  low = np.einsum("labc,lar,lcs->lrbs", x, *factors.values())
  bases = {side: jnp.asarray(p) for side, p in factors.items()}
  np.testing.assert_allclose(
    projection.project(jnp.asarray(x), bases), low, rtol=1e-4
  )
  lifted = np.einsum("lrbs,lar,lcs->labc", low, *factors.values())
  np.testing.assert_allclose(
    projection.lift(jnp.asarray(low), bases), lifted, rtol=1e-4
  )


# One leaf of two tensors, and the step of a burst that both are due at.
STACKED = {"experts": SHAPES["experts"]}


def last(tx, steps=6, dtype=jnp.float32):
  params = normal(0, STACKED, dtype)
  (*_, (params, state, _)) = train(tx, steps, params, dtype)
  return params["experts"], state


@pytest.fixture(scope="module")
def plain():
  return last(make(rules=RULES[2:]))[0]


@pytest.mark.parametrize(
  ("options", "atol"),
  [
    ({"basis_dtype": "int8"}, 2e-2),
    ({"basis_dtype": "bfloat16"}, 2e-2),
    ({"state_dtype": "bfloat16"}, 2e-2),
  ],
)
def test_narrow_state_trains_almost_alike(plain, options, atol):
  params, _ = last(make(rules=RULES[2:], **options))
  difference = np.max(np.abs(params - plain))
  assert 0 < difference < atol


def test_moments_in_8_bits_train_almost_alike(plain):
  inner = optax.chain(
    go.scale_by_adam_8bit(min_size=0),
    optax.add_decayed_weights(DECAY),
    optax.scale_by_learning_rate(RATE),
  )
  options = {"update_proj_gap": GAP, "rules": RULES[2:], "scale": ALPHA}
  params, state = last(galore(inner, rank=4, **options))
  assert optax.tree.get(state, "mu").low["experts"].kind == "dynamic"
  assert 0 < np.max(np.abs(params - plain)) < 2e-2


def test_a_burst_is_one_iteration_at_each_of_its_steps():
  tx = make(rules=RULES[2:], refresh=Refresh(policy="synchronous", burst=2))
  params = normal(0, STACKED)
  bases = tx.init(params).projector["experts"]
  weight = np.asarray(params["experts"][:, :, 1], np.float64)
  tensor = tensor_reference.TuckerAdamW(
    {int(side[-1]): x[1] for side, x in bases.items()}, ALPHA, RATE, DECAY, 1
  )
  for step, (new, _, grads) in enumerate(train(tx, 6, params)):
    grad = np.asarray(grads["experts"])[:, :, 1]
    weight += tensor.update(weight, grad, step % GAP < 2)
    np.testing.assert_allclose(new["experts"][:, :, 1], weight, atol=1e-5)


@pytest.mark.parametrize("method", ["normalized", "factored"])
def test_the_residual_is_normalized_along_the_last_axis_named(method):
  """Here the first axis of the tensor."""
  rules = [("experts", Projection(tensor=(3, 0), stack=2, rank=(4, 2)))]
  tx = make(rules=rules, refresh="synchronous", residual=method)
  params = normal(0, STACKED)
  state = tx.init(params)
  assert state.recovery["experts"].columns.shape == (2, 6)
  bases = state.projector["experts"]
  weight = np.asarray(params["experts"][:, :, 1], np.float64)
  tensor = tensor_reference.TuckerAdamW(
    {int(side[-1]): x[1] for side, x in bases.items()},
    *(ALPHA, RATE, DECAY, 2, method, 0),
  )
  for step, (new, _, grads) in enumerate(train(tx, 6, params)):
    grad = np.asarray(grads["experts"])[:, :, 1]
    weight += tensor.update(weight, grad, step % GAP == 0)
    np.testing.assert_allclose(new["experts"][:, :, 1], weight, atol=1e-5)


def test_adaptive_refreshes_count_tensors():
  tx = make(rules=RULES[2:], refresh="adaptive")
  params = normal(0, STACKED)
  state, update = tx.init(params), jax.jit(tx.update)
  for _ in range(12):  # a gradient that does not change settles at once
    _, state = update(params, state, params)
  counts = go.refresh_counts(state)["experts"]
  assert counts.shape == (2,) and np.all((counts > 1) & (counts <= 5))
