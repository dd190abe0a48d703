"""Saving and restoring the state: Orbax old and new, and msgpack."""

import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp_v0
import pytest
from orbax.checkpoint import v1 as ocp

from galore_optax import baselines, galore, quantize_params, state_shardings
from galore_optax.quantization.qarray import zeros
from galore_optax.subspace.projection import RandomBasis
from tests.conformance import cases, inner_optimizers
from tests.conformance.cases import every
from tests.marks import with_slow


def _state(tx, name=cases.CONTROL):
  """A state whose leaves all differ from those that `init` gives."""
  params, _ = cases.problem(name=name)

  def other(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.key(7)
    return (jnp.arange(x.size).reshape(x.shape) % 7 + 1).astype(x.dtype)

  return jax.tree.map(other, tx.init(params))


def _standard(path, state, target):
  with ocp_v0.StandardCheckpointer() as checkpointer:
    checkpointer.save(path / "state", state)
    checkpointer.wait_until_finished()
    return checkpointer.restore(path / "state", target)


def _manager(path, state, target):
  with ocp_v0.CheckpointManager(path) as manager:
    manager.save(3, args=ocp_v0.args.StandardSave(state))
    manager.wait_until_finished()
    return manager.restore(3, args=ocp_v0.args.StandardRestore(target))


def _v1(path, state, target):
  ocp.save(path / "state", state)
  return ocp.load(path / "state", target)


def _v1_checkpointer(path, state, target):
  with ocp.training.Checkpointer(path) as checkpointer:
    checkpointer.save_checkpointables(3, {"state": state})
    loaded = checkpointer.load_checkpointables(3, {"state": target})
  return loaded["state"]


def _msgpack(path, state, target):
  del path
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), target)
  saved = flax.serialization.to_bytes(state)
  return jax.tree.map(jnp.asarray, flax.serialization.from_bytes(zeros, saved))


_FORMATS = {
  "v0 Standard": _standard,
  "v0 CheckpointManager": _manager,
  "v1": _v1,
  "v1 Checkpointer": _v1_checkpointer,
  "msgpack": _msgpack,
}


# One format of each library; the others with `-m slow`.
_QUICK = ("v0 Standard", "v1", "msgpack")
# The optimizers that are tried in all quick formats. The others are saved as
# arrays just like these, so that one format of Orbax is enough.
_ALL_QUICK = ("galore_adamw", "q_galore_adamw_8bit", cases.CONTROL)
# `flax.serialization` restores no types and no shardings.
_ORBAX = [form for form in _FORMATS if form != "msgpack"]


def _is_slow(name, form):
  return form not in _QUICK or (
    form == "v0 Standard" and name not in _ALL_QUICK
  )


def _layouts_in(forms):
  """Pairs of optimizers and formats as parameters of a test."""
  return pytest.mark.parametrize(
    ("name", "form"),
    [
      pytest.param(x, y, marks=pytest.mark.slow if _is_slow(x, y) else ())
      for x in cases.LAYOUTS
      for y in forms
    ],
  )


def _target(tx, shardings=None, name=cases.CONTROL):
  """The state's types, on one device or as given."""
  params, _ = cases.problem(name=name)
  state = jax.eval_shape(tx.init, params)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = shardings or jax.tree.map(lambda _: one, state)
  return jax.tree.map(
    lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to),
    state,
    shardings,
  )


@_layouts_in(_FORMATS)
def test_round_trip(name, form, tmp_path):
  """With a bias in the tree, for which the state holds no empty arrays."""
  tx = cases.make(name)
  state = _state(tx, name)
  cases.assert_projects(name, state)
  restored = _FORMATS[form](tmp_path, state, _target(tx, name=name))
  cases.assert_equal(restored, state)


@every
def test_training_goes_on_after_a_restore(name, tmp_path):
  tx, update = cases.built(name)
  params, grads = cases.problem()
  wanted = cases.reference(name)
  params, state = cases.run(tx, params, grads[:1], update)
  state = _v1(tmp_path, state, _target(tx))
  for g in grads[1:]:
    updates, state = update(g, state, params)
    params = optax.apply_updates(params, updates)
  cases.assert_equal((params, state), wanted)


@pytest.mark.parametrize("form", with_slow(_ORBAX, *set(_ORBAX) - set(_QUICK)))
def test_leaves_of_unusual_kinds(form, tmp_path):
  """int8 and int4 codes and typed keys of an inner optimizer."""
  tx = galore(inner_optimizers.momentum_in_codes(), rank=2)
  state = _state(tx)
  restored = _FORMATS[form](tmp_path, state, _target(tx))
  cases.assert_equal(restored, state)


def test_msgpack_keeps_quantized_weights_and_adapters():
  params = {"kernel": jnp.arange(64.0).reshape(8, 8)}
  frozen, adapters = baselines.qlora(2).init(jax.random.key(0), params)
  tree = [quantize_params(params), frozen, adapters]
  zeros = jax.tree.map(jnp.zeros_like, tree)
  cases.assert_equal(_msgpack(None, tree, zeros), tree)


@pytest.mark.parametrize(
  ("other", "message"),
  [
    (zeros((4, 8), "int4"), "'codes' as \\['int8'\\], .*\\['int4'\\]"),
    (zeros((4, 8), "int8", symmetric=True), "QArray of \\['codes', 'scale'\\]"),
    (zeros((4, 6), "int8"), "'codes' of shape \\(4, 8\\).*is \\(4, 6\\)"),
    (RandomBasis(jnp.uint32(0), (4, 8)), "'seed' as \\[\\].*\\['4x8'\\]"),
  ],
)
def test_msgpack_is_not_read_as_something_else(other, message):
  saved = flax.serialization.to_bytes({"w": zeros((4, 8), "int8")})
  with pytest.raises(ValueError, match=f"at './w'.*{message}"):
    flax.serialization.from_bytes({"w": other}, saved)


@pytest.mark.slow
def test_msgpack_where_flax_is_imported_later():
  code = (
    "import sys, numpy as np, galore_optax as go\n"
    "assert 'flax' not in sys.modules\n"
    "import flax.serialization as s\n"
    "x = np.zeros((2, 2), np.int8)\n"
    "q = go.QArray(x, np.zeros((1, 2), np.float32), None, 'int8')\n"
    "s.from_bytes(q, s.to_bytes(q))"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def _mesh(shape):
  return jax.make_mesh(shape, ("x", "y"), (jax.sharding.AxisType.Auto,) * 2)


def _shardings(tx, mesh, name):
  params, _ = cases.problem(name=name)
  stack = (None,) * (params["kernel"].ndim - 2)
  specs = {"bias": jax.P("y"), "kernel": jax.P(*stack, "x", "y")}
  named = {k: jax.NamedSharding(mesh, spec) for k, spec in specs.items()}
  return state_shardings(tx, params, named)


@_layouts_in(_ORBAX)
def test_restore_onto_a_different_mesh(name, form, tmp_path):
  tx = cases.make(name)
  state = _state(tx, name)
  sharded = jax.device_put(state, _shardings(tx, _mesh((2, 4)), name))
  wanted = _shardings(tx, _mesh((4, 2)), name)
  restored = _FORMATS[form](tmp_path, sharded, _target(tx, wanted, name))
  cases.assert_equal(restored, state)
  found = jax.tree.map(lambda x: x.sharding, restored)
  assert found == wanted
  split = [x for x in jax.tree.leaves(restored) if not x.is_fully_replicated]
  assert len(split) >= 2
