"""The faithful preset gives the weights of galore-torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import galore_adamw
from tests.parity import galore_torch_run


def run(name, arrays):
  """Weights after each step under the faithful preset."""
  tx = galore_adamw(
    galore_torch_run.RATE,
    eps=galore_torch_run.EPS,
    weight_decay=0.0,
    faithful=True,
    # On square matrices galore-torch projects the other side, not the paper's.
    proj_type="right" if name == "square" else "std",
    **galore_torch_run.SETTINGS,
  )
  params = {"w": jnp.asarray(arrays[f"{name}/weight"])}
  state, update, weights = tx.init(params), jax.jit(tx.update), []
  for grad in arrays[f"{name}/grads"]:
    updates, state = update({"w": grad}, state, params)
    params = optax.apply_updates(params, updates)
    weights.append(params["w"])
  return np.stack(weights)


@pytest.fixture(scope="module")
def recorded():
  with np.load(galore_torch_run.RECORD) as file:
    return dict(file)


@pytest.mark.parametrize("name", galore_torch_run.SHAPES)
def test_recorded_run(name, recorded):
  ours, expected = run(name, recorded), recorded[f"{name}/weights"]
  moved = np.abs(expected[-1] - recorded[f"{name}/weight"]).max()
  assert moved > 0.01
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_live_run_equals_the_recorded_one(recorded):
  pytest.importorskip(
    "galore_torch", reason="needs the extra `parity` (torch, galore-torch)"
  )
  live = galore_torch_run.run(galore_torch_run.inputs())
  for name, weights in live.items():
    np.testing.assert_allclose(weights, recorded[name], atol=1e-6)
