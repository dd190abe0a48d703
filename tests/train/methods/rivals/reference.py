"""What the tests of the rivals share: small parameters, and NumPy's AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.methods import registry
from train.methods.options import OptimizerConfig

RATE = 0.1
B1, B2, EPS = 0.9, 0.999, 1e-8


def gradients(steps: int, seed: int = 0) -> list[dict]:
  """Gradients of a small model with two stacked layers, in float64.

  One matrix is wider than high, one higher than wide; their rows and columns
  have different sizes.
  """
  rng = np.random.default_rng(seed)
  shapes = {"up": (2, 8, 12), "down": (2, 12, 8)}

  def matrix(shape: tuple[int, ...]) -> np.ndarray:
    rows = np.exp(rng.normal(size=(*shape[:-1], 1)))
    return rows * np.exp(rng.normal(size=shape[-1])) * rng.normal(size=shape)

  return [
    {
      "embed": {"embedding": matrix((5, 8))},
      "layers": {k: {"kernel": matrix(s)} for k, s in shapes.items()},
      "lm_head": {"kernel": matrix((8, 5))},
      "norm": {"scale": rng.normal(size=8)},
    }
    for _ in range(steps)
  ]


def make(name: str, **options) -> optax.GradientTransformationExtraArgs:
  """The method at the constant rate."""
  chosen = OptimizerConfig(name=name, **options)
  schedule = optax.constant_schedule(RATE)
  return optax.with_extra_args_support(
    registry.get(name).make(chosen, schedule, None)
  )


def run(tx, grads: list[dict]) -> tuple[list[dict], optax.OptState]:
  """The updates of all steps, and the last state."""
  narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads)
  params = jax.tree.map(jnp.zeros_like, narrow[0])
  state, update, found = tx.init(params), jax.jit(tx.update), []
  for g in narrow:
    new, state = update(g, state, params)
    found.append(new)
  return found, state


def adam(grads: list[np.ndarray]) -> list[np.ndarray]:
  """Adam's updates, at the rate."""
  m, v, found = 0.0, 0.0, []
  for t, g in enumerate(grads, 1):
    m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
    step = (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)
    found.append(-RATE * step)
  return found


def by_layer(rule, grads: list[np.ndarray]) -> list[np.ndarray]:
  """The updates of a rule for one matrix, for each of two stacked ones."""
  layers = [rule([g[i] for g in grads]) for i in range(2)]
  return [np.stack(updates) for updates in zip(*layers, strict=True)]


def kernels(trees: list[dict], name: str) -> list:
  """The leaves of one stacked kernel, step by step."""
  return [tree["layers"][name]["kernel"] for tree in trees]


def check(found: list, expected: list, tolerance: float = 1e-4) -> None:
  """Compares updates, step by step."""
  assert len(found) == len(expected)
  for x, y in zip(found, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())
