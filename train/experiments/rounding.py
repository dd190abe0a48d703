"""How the rounding of Adam's moments to bfloat16 changes its steps.

`python -m train.experiments.rounding` prints the table of
docs/explanation/decisions.md. Adam's moments of many numbers are followed for
some thousands of steps: in float32, and stored in bfloat16 between steps in
several ways. Only the storage differs; the arithmetic is float32.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.quantization import bfloat16

NUMBERS = 4096
STEPS = 6000
LAST = 1000  # steps at the end over which figures are means
B1, EPS = 0.9, 1e-8


@dataclasses.dataclass(frozen=True)
class Row:
  """One way to store moments, against float32, for one kind of gradient.

  Attributes:
    gradient: which gradients.
    storage: how moments are stored.
    mean: mean of the second moment over that in float32, minus 1.
    deviation: standard deviation of that ratio.
    error: size of the difference between the steps, relative to the step's.
    size: mean length of the steps along those in float32, minus 1.
  """

  gradient: str
  storage: str
  mean: float
  deviation: float
  error: float
  size: float


def _normal(scale: jax.Array, step: jax.Array) -> jax.Array:
  key = jax.random.fold_in(jax.random.key(1), step)
  return scale * jax.random.normal(key, scale.shape)


def _sparse(scale: jax.Array, step: jax.Array) -> jax.Array:
  key = jax.random.fold_in(jax.random.key(2), step)
  return _normal(scale, step) * jax.random.bernoulli(key, 0.02, scale.shape)


# Name to the gradients of numbers of these sizes at a step.
GRADIENTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "constant": lambda scale, step: scale,
  "normal": _normal,
  "normal, a hundredth from step 2,000": lambda scale, step: (
    _normal(scale, step) * jnp.where(step < 2000, 1, 0.01)
  ),
  "nonzero at one step in 50": _sparse,
}
# Name to whether moments are rounded at random, whether the second one is
# stored as its root, and the decay of the second one.
STORAGES = {
  "to the nearest": (False, False, 0.999),
  "to the nearest, b2 = 0.95": (False, False, 0.95),
  "at random": (True, False, 0.999),
  "at random, the root of nu": (True, True, 0.999),
}


def _store(x: jax.Array, at_random: bool, name: str, step: jax.Array):
  """A moment as it is kept between steps."""
  if not at_random:
    return x.astype(jnp.bfloat16)
  key = bfloat16.leaf_key(bfloat16.step_key("moments", 0, step), name)
  return bfloat16.store(x, jnp.bfloat16, key)


def _adam(mu: jax.Array, nu: jax.Array, g: jax.Array, b2: float, step: Any):
  """Adam's new moments, and its direction."""
  mu, nu = B1 * mu + (1 - B1) * g, b2 * nu + (1 - b2) * g * g
  unbiased = mu / (1 - B1 ** (step + 1.0)), nu / (1 - b2 ** (step + 1.0))
  return mu, nu, unbiased[0] / (jnp.sqrt(unbiased[1]) + EPS)


def follow(gradient: str, storage: str, steps: int, numbers: int) -> Row:
  """Follows moments in one storage and in float32."""
  at_random, is_root, b2 = STORAGES[storage]
  scale = 1e-3 * jnp.exp(jax.random.normal(jax.random.key(0), (numbers,)))

  def body(carry: tuple, step: jax.Array) -> tuple:
    mu, nu, exact_mu, exact_nu = (x.astype(jnp.float32) for x in carry)
    g = GRADIENTS[gradient](scale, step)
    mu, nu, found = _adam(mu, nu * nu if is_root else nu, g, b2, step)
    exact_mu, exact_nu, wanted = _adam(exact_mu, exact_nu, g, b2, step)
    ratio, length = nu / exact_nu, jnp.sum(wanted**2)
    figures = (
      jnp.mean(ratio) - 1,
      jnp.std(ratio),
      jnp.sqrt(jnp.sum((found - wanted) ** 2) / length),
      jnp.sum(found * wanted) / length - 1,
    )
    stored = (
      _store(mu, at_random, "mu", step),
      _store(jnp.sqrt(nu) if is_root else nu, at_random, "nu", step),
    )
    return (*stored, exact_mu, exact_nu), figures

  narrow, wide = jnp.zeros(numbers, jnp.bfloat16), jnp.zeros(numbers)
  _, figures = jax.lax.scan(
    body, (narrow, narrow, wide, wide), jnp.arange(steps)
  )
  return Row(gradient, storage, *(float(x[-LAST:].mean()) for x in figures))


def render(rows: list[Row]) -> str:
  """The table, in Markdown."""
  lines = [
    "| gradients | moments are rounded | nu over exact nu: mean | deviation"
    " | error of a step | its length |",
    "|---|---|--:|--:|--:|--:|",
  ]
  lines += [
    f"| {x.gradient} | {x.storage} | {1 + x.mean:.3f} | {x.deviation:.3f}"
    f" | {x.error:.1%} | {1 + x.size:.3f} |"
    for x in rows
  ]
  return "\n".join(lines)


def main() -> int:
  """Prints the table."""
  rows = [
    follow(gradient, storage, STEPS, NUMBERS)
    for gradient in GRADIENTS
    for storage in STORAGES
  ]
  print(render(rows))
  return 0


if __name__ == "__main__":
  sys.exit(main())
