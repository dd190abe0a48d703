"""Projected gradients of weights, whatever a loss does with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

from galore_optax import (
  Projection,
  dequantize_params,
  galore,
  projected_value_and_grad,
  quantize_params,
)

_M, _N = 12, 20


def _normal(*shape):
  rng = np.random.default_rng(sum(shape))
  return jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)


def _scan(layer):
  def loss(params, x):
    def body(x, w):
      return x + jnp.tanh(layer(x, w)), None

    return jnp.sum(jax.lax.scan(body, x, params["w"])[0] ** 2)

  return loss


def _tied(params, x):
  return jnp.sum(jnp.tanh(x @ params["w"]) @ params["w"].T)


def _chosen(params, x):
  w = params["w"]
  return jnp.sum(
    jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: (-x) @ w) ** 2
  )


def _batched(params, x):
  one = lambda row: jnp.tanh(params["w"] @ row)
  return jnp.sum(jax.vmap(one)(x) ** 2)


def _checkpointed(x, w):
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return jax.checkpoint(jnp.dot, policy=policy)(x, w)


def _unrolled(params, x):
  for w in params["w"]:
    x = x + jnp.tanh(x @ w)
  return jnp.sum(x**2)


_HEADS = Projection(rows=0, cols=(1, 2))
_SECOND = Projection(rows=0, cols=2)  # layers are the axis between
# Name to shape of the weight, shape of x, loss, and how the weight is read.
FORMS = {
  "dense": ((_M, _N), (8, _M), lambda p, x: jnp.sum((x @ p["w"]) ** 2)),
  "sequences": ((_M, _N), (2, 4, _M), lambda p, x: jnp.sum((x @ p["w"]) ** 2)),
  "torch": ((_N, _M), (8, _M), lambda p, x: jnp.sum((x @ p["w"].T) ** 2)),
  "weight first": ((_N, _M), (8, _M), _batched),
  "jit": (
    (_M, _N),
    (8, _M),
    lambda p, x: jnp.sum(jax.jit(jnp.dot)(x, p["w"]) ** 2),
  ),
  "heads": (
    (_M, 4, 5),
    (2, 4, _M),
    lambda p, x: jnp.sum(jnp.einsum("btd,dnh->bnth", x, p["w"]) ** 2),
    _HEADS,
  ),
  "experts": (
    (3, _M, _N),
    (5, 3, _M),
    lambda p, x: jnp.sum(jnp.einsum("ced,edf->ecf", x, p["w"]) ** 2),
  ),
  "layers": ((3, _M, _M), (8, _M), _scan(jnp.dot)),
  "checkpoint": ((3, _M, _M), (8, _M), _scan(_checkpointed)),
  "second axis": (
    (_M, 3, _M),
    (8, _M),
    lambda p, x: _scan(jnp.dot)({"w": jnp.moveaxis(p["w"], 1, 0)}, x),
    _SECOND,
  ),
}
# The gradient of what these use is formed.
FORMED = {
  "tied": ((_M, _N), (8, _M), _tied),
  "branches": ((_M, _N), (8, _M), _chosen),
  "unrolled": ((3, _M, _M), (8, _M), _unrolled),
  "twice in a layer": (
    (3, _M, _M),
    (8, _M),
    _scan(lambda x, w: (x @ w) @ w.T),
  ),
  "shared by layers": (
    (_M, _M),
    (8, _M),
    lambda p, x: jnp.sum(
      jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ p["w"]), x) ** 2
    ),
  ),
  "elementwise": ((_M, _N), (8, _M), lambda p, x: jnp.sum(x @ jnp.exp(p["w"]))),
  "not at all": ((_M, _N), (8, _M), lambda p, x: jnp.sum(x**2)),
}


def _problem(name, sides, **options):
  shape, of_x, loss, *how = (FORMS | FORMED)[name]
  rules = [("w", how[0])] if how else [("w", Projection())]
  tx = galore(
    optax.sgd(1.0), rank=3, scale=1.0, rules=rules, proj_type=sides, **options
  )
  params = {"w": _normal(*shape), "b": _normal(*shape[-1:])}
  with_bias = lambda p, x: loss(p, x) + jnp.sum(p["b"] ** 2)
  return tx, params, _normal(*of_x), with_bias


@pytest.mark.parametrize("name", [*FORMS, *FORMED])
def test_update_is_that_of_the_full_gradient(name):
  """Bases are due at the first step, so that they are compared too."""
  for sides in ("std", "reverse_std"):
    tx, params, x, loss = _problem(name, sides)
    state = tx.init(params)

    @jax.jit
    def both(params, state, x, tx=tx, loss=loss):
      run = projected_value_and_grad(loss, tx)
      value, grads, refreshed = run(params, state, x)
      lean = tx.update(grads, refreshed, params)
      expected, full = jax.value_and_grad(loss)(params, x)
      return value, expected, grads, lean, tx.update(full, state, params)

    value, expected, grads, lean, usual = both(params, state, x)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert grads["w"].shape != params["w"].shape
    scale = jnp.max(jnp.abs(usual[0]["w"]))
    for a, b in zip(*map(jax.tree.leaves, (lean, usual)), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5 * max(1, scale))
    assert (scale > 0) == (name != "not at all")


def _product_shapes(jaxpr):
  """Shapes of all products in a jaxpr and in what it calls."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      yield eqn.outvars[0].aval.shape
    for param in eqn.params.values():
      for inner in param if isinstance(param, tuple | list) else (param,):
        inner = getattr(inner, "jaxpr", inner)
        if isinstance(inner, core.Jaxpr):
          yield from _product_shapes(inner)


def _forms_the_gradient(f, args, sizes):
  shapes = _product_shapes(jax.make_jaxpr(f)(*args).jaxpr)
  return any(sorted(shape[-2:]) == sizes for shape in shapes)


@pytest.mark.parametrize("name", FORMS)
def test_no_product_has_the_size_of_the_weight(name):
  """Tokens are neither of a matrix's sizes, so that no other product has it."""
  tx, params, x, loss = _problem(name, "std")
  state = tx.init(params)
  sizes = [_M, _N if name == "heads" or _N in params["w"].shape else _M]
  run = projected_value_and_grad(loss, tx)
  usual = lambda params, state, x: jax.value_and_grad(loss)(params, x)
  assert not _forms_the_gradient(run, (params, state, x), sizes)
  # The heads' gradient has other axes.
  if name != "heads":
    assert _forms_the_gradient(usual, (params, state, x), sizes)


def test_quantized_weights_are_read_one_layer_at_a_time():
  tx, params, x, loss = _problem("layers", "std")
  quantized = quantize_params(params, ("w",))
  run = projected_value_and_grad(loss, tx)
  value, grads, _ = jax.jit(run)(quantized, tx.init(params), x)
  read = dequantize_params(quantized)
  expected, same, _ = jax.jit(run)(read, tx.init(params), x)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_allclose(grads["w"], same["w"], rtol=1e-5, atol=1e-6)


def test_sums_over_tokens_are_in_float32():
  """In bfloat16 a sum of 4,096 ones would stop at 256."""
  tx = galore(optax.sgd(1.0), rank=1, rules=[("w", Projection())])
  params = {"w": jnp.zeros((4, 8), jnp.bfloat16)}
  state = tx.init(params)
  state = state._replace(projector={"w": {"left": jnp.eye(4)[:, :1]}})
  state = state._replace(step=jnp.int32(1))
  x = jnp.ones((4096, 4), jnp.bfloat16)
  loss = lambda p, x: jnp.sum((x @ p["w"]).astype(jnp.float32))
  _, grads, _ = jax.jit(projected_value_and_grad(loss, tx))(params, state, x)
  assert grads["w"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(grads["w"].astype("float32"), 4096.0)
