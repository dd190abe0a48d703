import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  adamw_8bit,
  basis_overlap,
  captured_energy,
  describe,
  find_bases,
  galore,
  galore_adamw_8bit,
  ldadam,
  q_galore_adamw_8bit,
  quantize_params,
  refresh_counts,
  stable_rank,
  state_bytes,
)


@pytest.fixture(scope="module")
def stack():
  """Three (24, 40) matrices of falling spectra, and their singular vectors."""
  rng = np.random.default_rng(0)
  left = np.linalg.qr(rng.normal(size=(3, 24, 24)))[0]
  right = np.linalg.qr(rng.normal(size=(3, 40, 24)))[0]
  values = 0.8 ** np.arange(24) * np.array([[1.0], [1e-12], [1e12]])
  g = np.einsum("bmk,bk,bnk->bmn", left, values, right)
  return jnp.asarray(g, jnp.float32), left, right, values


def test_stable_rank_is_that_of_the_spectrum(stack):
  g, _, _, values = stack
  expected = (values**2).sum(-1) / values[:, 0] ** 2
  np.testing.assert_allclose(stable_rank(g), expected, rtol=1e-4)


def test_captured_energy_is_that_of_the_leading_values(stack):
  g, left, right, values = stack
  share = (values[:, :5] ** 2).sum(-1) / (values**2).sum(-1)
  bases = {"left": left[..., :5], "right": right[..., :5]}
  bases = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), bases)
  for sides in (("left",), ("right",), ("left", "right")):
    found = captured_energy(g, {side: bases[side] for side in sides})
    np.testing.assert_allclose(found, share, rtol=1e-5)


def test_overlap_is_that_of_the_side_that_overlaps_less(stack):
  _, left, right, _ = stack
  left, right = (jnp.asarray(x, jnp.float32) for x in (left, right))
  old = {"left": left[..., :4], "right": right[..., :4]}
  new = {"left": left[..., 1:5], "right": right[..., 2:6]}
  np.testing.assert_allclose(basis_overlap(old, old), 1, rtol=1e-5)
  np.testing.assert_allclose(basis_overlap(new, old), 0.5, rtol=1e-5)
  del new["right"], old["right"]
  np.testing.assert_allclose(basis_overlap(new, old), 0.75, rtol=1e-5)


def test_a_zero_gradient_has_no_rank_and_no_energy():
  zero = jnp.zeros((6, 4))
  assert stable_rank(zero) == 0
  assert captured_energy(zero, {"left": jnp.eye(6)[:, :2]}) == 0


def test_bfloat16_gradients_are_summed_in_float32(stack):
  g, _, _, values = stack
  expected = (values[0] ** 2).sum() / values[0, 0] ** 2
  found = stable_rank(g[0].astype(jnp.bfloat16))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-2)


@pytest.fixture(scope="module")
def low_bits():
  """Q-GaLore after three steps of a gap of two, and the last gradients."""
  shapes = {"bias": (40,), "stack": (3, 24, 40), "w": (300, 40)}
  rng = np.random.default_rng(0)
  params = {k: jnp.asarray(rng.normal(size=s), jnp.float32)
            for k, s in shapes.items()}  # fmt: skip
  tx = q_galore_adamw_8bit(1e-2, rank=4, update_proj_gap=2, min_size=0)
  state, update = tx.init(params), jax.jit(tx.update)
  for i in range(3):
    grads = jax.tree.map(lambda x, i=i: x * (1 + 0.1 * i), params)
    _, state = update(grads, state, params)
  return tx, params, state, grads


def test_quantized_bases(low_bits):
  """As the state stores them, and as arrays."""
  _, params, state, grads = low_bits
  found = find_bases(state)
  assert set(found) == {"stack", "w"}
  assert {side: x.shape for side, x in found["w"].items()} == {"right": (40, 4)}
  for path, stored in state.projector.items():
    arrays = found[path]
    energy = captured_energy(grads[path], stored)
    np.testing.assert_allclose(energy, captured_energy(grads[path], arrays))
    assert energy.shape == params[path].shape[:-2]
    assert np.all((energy > 0.1) & (energy < 1))
    # The overlap of a skew basis with itself is at most 1.
    assert np.all(basis_overlap(stored, stored) > 0.95)
    assert np.all(basis_overlap(stored, arrays) <= 1)
    basis = np.moveaxis(next(iter(arrays.values())), -1, -2)
    gram = np.einsum("...rm,...sm->...rs", basis, basis)
    np.testing.assert_allclose(
      gram, np.broadcast_to(np.eye(4), gram.shape), atol=0.1
    )


def test_refreshes_are_counted(low_bits):
  """For each path and matrix: all at step 0, later one after another."""
  tx, params, state, _ = low_bits
  found = refresh_counts(optax.chain(tx).init(params))
  assert {k: x.tolist() for k, x in found.items()} == {
    "stack": [0, 0, 0],
    "w": 0,
  }
  found = refresh_counts((state, {"more": 1}))
  assert found["stack"].shape == (3,) and found["w"].shape == ()
  # Of four matrices, two are due at step 1 and two at step 2.
  assert sum(int(x.sum()) for x in found.values()) == 4 + 4
  plain = galore(optax.adam(1e-3), rank=4).init(params)
  assert refresh_counts(plain) == {}
  assert refresh_counts(optax.adam(1e-3).init(params)) == {}


def test_quantized_states_are_described_leaf_by_leaf(low_bits):
  """4-bit codes count as half a byte, and belong to their parameter."""
  tx, params, state, _ = low_bits
  table = describe(tx, params)
  assert table.total_bytes == state_bytes(state)
  rows = {row.path: row for row in table.rows}
  schedule = 4 * (3 + 5)
  scales = 4 + 1  # float32 and a code for zero
  basis = 4 * 40 // 2 + 4 * scales
  moments = 2 * (300 * 4 + 2 * 4 * 4)
  assert rows["w"].state_bytes == basis + moments + schedule
  assert (rows["w"].rank, rows["w"].side) == (4, "right")
  assert rows["w"].matrix == "(300, 40)"
  assert rows["stack"].matrix == "3 x (24, 40)"
  assert rows["bias"].rank is None
  owned = sum(row.state_bytes for row in table.rows)
  assert table.total_bytes - owned == 2 * 4  # step and count


def test_every_leaf_at_full_rank_has_its_reason():
  params = {
    "attn": jnp.zeros((64, 64)),
    "bias": jnp.zeros(64),
    "conv": jnp.zeros((64, 64)),
    "empty": jnp.zeros((0, 64)),
    "fft": jnp.zeros((64, 64), complex),
    "small": jnp.zeros((6, 8)),
    "row": jnp.zeros((64, 1)),
    "v": jnp.zeros(64),
  }
  tx = galore(optax.adam(1e-3), rank=16, rules=[("conv", None)])
  for _ in range(2):  # also where the trace is known already
    table = describe(tx, params)
    assert {row.path: row.reason for row in table.rows} == {
      "attn": "",
      "bias": "its name",
      "conv": "rule 'conv'",
      "empty": "empty",
      "fft": "complex",
      "row": "thin",
      "small": "no smaller at rank 6",
      "v": "no matrix",
    }
  lines = {x.split()[0]: x for x in str(table).splitlines()}
  assert lines["small"].endswith("no smaller at rank 6")
  plain = describe(optax.adam(1e-3), params)
  assert "because of" not in str(plain)


def test_what_is_guessed_from_a_name_says_so():
  """Also Haiku's bias; a reason that is no guess does not."""
  params = {
    "linear": {"w": jnp.zeros((3, 64, 64)), "b": jnp.zeros((3, 64))},
    "embed": jnp.zeros((64, 64)),
    "conv": jnp.zeros((64, 64)),
    "v": jnp.zeros(64),
  }
  tx = galore(optax.adam(1e-3), rank=16, rules=[("conv", None)])
  table = describe(tx, params)
  guessed = [row.path for row in table.rows if row.guessed]
  assert guessed == ["embed", "linear/b"]
  assert str(table).count("its name (a guess)") == 2
  assert str(table).count("(a guess)") == 2
  # The same rule, given by the user, is none.
  rules = [("embed", None), ("linear/b", None), ("conv", None)]
  table = describe(galore(optax.adam(1e-3), rank=16, rules=rules), params)
  assert not any(row.guessed for row in table.rows)


COMPLEX = {
  "bias": jnp.zeros((3, 96), complex),
  "fft": jnp.zeros((64, 96), complex),
  "stack": jnp.zeros((3, 64, 96), complex),
  "w": jnp.zeros((64, 96)),
}


def test_complex_leaves_are_described_in_full():
  table = describe(optax.adam(1e-3), COMPLEX)
  for row in table.rows:
    assert row.state_bytes == row.adam_bytes, row.path
  counter = 4
  assert table.total_bytes == counter + sum(x.adam_bytes for x in table.rows)
  tx = galore(optax.adam(1e-3), rank=4)
  rows = {row.path: row for row in describe(tx, COMPLEX).rows}
  assert rows["fft"].reason == "complex"
  assert rows["fft"].state_bytes == rows["fft"].adam_bytes == 2 * 8 * 64 * 96


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bytes_under_adam_are_those_of_optax(dtype):
  params = {"bias": jnp.zeros(96, dtype), "w": jnp.zeros((64, 96), dtype)}
  for row in describe(optax.adam(1e-3), params).rows:
    assert row.state_bytes == row.adam_bytes, row.path
  (_, row) = describe(galore(optax.adam(1e-3), rank=4), params).rows
  moments = 2 * 4 * 96 * jnp.dtype(dtype).itemsize
  assert row.state_bytes == moments + 4 * 64 * 4


def _nested(inner):
  """A wrapper whose optimizer knows parameters under another path."""
  return optax.GradientTransformation(
    lambda params: inner.init({"tower": {"all": params}}), inner.update
  )


@pytest.mark.parametrize(
  ("tx", "counters"),
  [
    (galore(optax.adam(1e-3), rank=4), 2),
    (optax.chain(optax.clip(1.0), galore(optax.adam(1e-3), rank=4)), 2),
    (galore_adamw_8bit(1e-3, rank=4, min_size=0), 2),
    (adamw_8bit(1e-3, min_size=0), 1),
    (_nested(galore(optax.adam(1e-3), rank=4)), 2),
    (ldadam(1e-3, rank=4), 2),
  ],
)
def test_parameters_in_another_tree_are_described(tx, counters):
  """Complex ones are two matrices, and all bytes belong to a parameter."""
  tx = optax.contrib.split_real_and_imaginary(tx)
  table = describe(tx, COMPLEX)
  state = jax.eval_shape(tx.init, COMPLEX)
  assert table.total_bytes == state_bytes(state)
  owned = sum(row.state_bytes for row in table.rows)
  assert table.total_bytes - owned == 4 * counters
  rows = {row.path: row for row in table.rows}
  if not find_bases(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)):
    return
  assert rows["fft"].matrix == "2 x (64, 96)"
  assert rows["stack"].matrix == "6 x (64, 96)"
  assert rows["w"].matrix == "(64, 96)"
  for path in ("fft", "stack", "w"):
    assert (rows[path].side, rows[path].rank) == ("left", 4)
  assert (rows["bias"].rank, rows["bias"].reason) == (None, "its name")
  assert rows["bias"].guessed
  assert 3 * rows["fft"].state_bytes == rows["stack"].state_bytes


def test_a_leaf_of_which_one_part_is_projected():
  tx = galore(optax.adam(1e-3), rank=4, rules=[("fft/imaginary", None)])
  tx = optax.contrib.split_real_and_imaginary(tx)
  row = next(x for x in describe(tx, COMPLEX).rows if x.path == "fft")
  assert row.matrix == "(64, 96)"
  assert row.reason == "rule 'fft/imaginary'"
  assert row.state_bytes == 2 * 4 * 64 * 96 + 4 * (64 * 4 + 2 * 4 * 96)


def test_quantized_weights_are_described_as_float32_weights():
  params = {"kernel": jnp.zeros((64, 96)), "bias": jnp.zeros(96)}
  tx = galore(optax.adam(1e-3), rank=4)
  assert str(describe(tx, quantize_params(params))) == str(describe(tx, params))
