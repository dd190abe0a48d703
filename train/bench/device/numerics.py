"""The core's numerics beside float64 NumPy, at the device's own precision.

Products of float32 arrays have ten bits of mantissa on many GPUs (TF32) and
seven on TPUs (bfloat16), unless a program asks for more. The core asks where it
needs more. Each check compares what a public function returns with the same
computed in float64 from the same inputs; bases and moments are the device's.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax as go
from train.bench.device.rows import Part, Settings

# Bounds of relative errors. Rounding of float32 in sums of a thousand terms
# gives 1e-6, TF32 gives 3e-4.
EXACT = 1e-5
ELEMENTWISE = 1e-4  # after divisions by square roots
RATE, SCALE, DECAY = 1.0, 0.25, 0.1
# In float32, 1 - b2 of 0.999 has an error of 1e-5 itself.
B1, B2, EPS = 0.9, 0.95, 1e-8
SHAPE, QUICK_SHAPE = (1024, 2736, 256), (48, 96, 8)


def run(part: Part, settings: Settings) -> None:
  """Makes all checks; a check that fails to run does not end the others."""
  m, n, rank = QUICK_SHAPE if settings.quick else SHAPE
  case = Case(m, n, rank)
  for check in (
    product,
    bases_and_moments,
    residual,
    codes,
    eight_bits,
    projected_gradient,
    polar,
  ):
    with part.guarded(check.__name__.replace("_", " ")):
      for name, error, bound in check(case):
        part.add(
          name=name,
          error=float(error),
          bound=bound,
          passed=None if bound is None else bool(error <= bound),
        )


class Case:
  """Gradients (m, n) whose singular values decay as i^-0.5, and weights.

  Attributes:
    rank: Rank of the projection.
    weight: The weight, float64 with values of float32.
    grads: Gradients of some steps, likewise.
  """

  def __init__(self, m: int, n: int, rank: int):
    self.rng = np.random.default_rng(0)
    self.rank = rank
    self.weight = single(self.rng.normal(size=(m, n)) * 0.02)
    left, _ = np.linalg.qr(self.rng.normal(size=(m, m)))
    right, _ = np.linalg.qr(self.rng.normal(size=(n, m)))
    sizes = np.arange(1, m + 1) ** -0.5
    base = (left * sizes) @ right.T
    noise = np.linalg.norm(base) / np.sqrt(m * n)
    self.grads = [
      single(base + 0.1 * noise * self.rng.normal(size=(m, n)))
      for _ in range(3)
    ]

  def options(self, gap: int = 2) -> dict[str, Any]:
    """Arguments of the recipes that are checked."""
    return {
      "b1": B1,
      "b2": B2,
      "eps": EPS,
      "weight_decay": DECAY,
      "rank": self.rank,
      "update_proj_gap": gap,
      "scale": SCALE,
    }

  def steps(
    self, tx: optax.GradientTransformation
  ) -> Iterator[tuple[np.ndarray, np.ndarray, Any, Any]]:
    """Gradient, update, and the states before and after, of each step."""
    params = {"w": jnp.asarray(self.weight, jnp.float32)}
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for grad in self.grads:
      before = state
      grads = {"w": jnp.asarray(grad, jnp.float32)}
      updates, state = update(grads, state, params)
      yield grad, double(updates["w"]), before, state


def single(x: np.ndarray) -> np.ndarray:
  """The values of float32, in float64."""
  return x.astype(np.float32).astype(np.float64)


def double(x: Any) -> np.ndarray:
  """An array of the device in float64; codes are decoded."""
  return np.asarray(_decoded(x), np.float64)


@jax.jit
def _decoded(x: Any) -> jax.Array:
  return go.dequantize(x) if isinstance(x, go.QArray) else x


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
  """Norm of the difference over the norm of what is wanted."""
  return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def basis(state: Any) -> np.ndarray:
  """The basis of a state, (m, r)."""
  return double(state.projector["w"]["left"])


def moment(state: Any, name: str) -> np.ndarray:
  """A moment of a state at rank r."""
  return double(optax.tree.get(state, name).low["w"])


def direction(mu: np.ndarray, nu: np.ndarray, count: int) -> np.ndarray:
  """Adam's update of moments."""
  return (mu / (1 - B1**count)) / (np.sqrt(nu / (1 - B2**count)) + EPS)


Found = Iterator[tuple[str, float, float | None]]


def product(case: Case) -> Found:
  """A product at the default precision."""
  yield "product, the device's default", default_error(case), None


@functools.cache
def default_error(case: Case) -> float:
  """Error of a product of float32 arrays at the default precision."""
  a, b = case.grads[0], case.grads[1].T
  found = jax.jit(jnp.matmul)(
    jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
  )
  return relative(double(found), a @ b)


def bases_and_moments(case: Case) -> Found:
  """Steps of `galore_adamw` with a refresh at every second one."""
  worst: dict[str, float] = {}

  def note(name: str, error: float) -> None:
    worst[name] = max(worst.get(name, 0.0), error)

  tx = go.galore_adamw(RATE, **case.options())
  for i, (grad, update, before, after) in enumerate(case.steps(tx)):
    p = basis(after)
    note("orthonormal", np.abs(p.T @ p - np.eye(case.rank)).max())
    if i == 0:
      most = np.linalg.eigvalsh(grad @ grad.T)[-case.rank :].sum()
      note("lost", 1 - np.sum((p.T @ grad) ** 2) / most)
    old = moment(before, "mu")
    carried = p.T @ basis(before) @ old if i else old
    mu = B1 * carried + (1 - B1) * p.T @ grad
    name = "moved" if np.any(p != basis(before)) and i else "projected"
    note(name, relative(moment(after, "mu"), mu))
    normal = direction(moment(after, "mu"), moment(after, "nu"), i + 1)
    wanted = -RATE * (SCALE * p @ normal + DECAY * case.weight)
    note("lifted", relative(update, wanted))
  yield "bases: largest entry of PᵀP - I", worst["orthonormal"], EXACT
  yield "first basis: energy below the best one's", worst["lost"], 0.1
  yield "projected gradient, in the first moment", worst["projected"], EXACT
  yield "first moment, moved to a new basis", worst["moved"], EXACT
  yield "update, lifted, with weight decay", worst["lifted"], EXACT


def residual(case: Case) -> Found:
  """Steps with the normalized residual."""
  tx = go.galore_adamw(RATE, residual="normalized", **case.options(gap=100))
  worst, squares = 0.0, []
  for i, (grad, update, _, after) in enumerate(case.steps(tx)):
    p = basis(after)
    rest = grad - p @ (p.T @ grad)
    squares.append(np.sum(rest**2, axis=0, keepdims=True))
    weights = 0.95 ** np.arange(len(squares))
    mean = np.average(squares[::-1], axis=0, weights=weights)
    size = np.sqrt(mean / (len(grad) - case.rank))
    normal = direction(moment(after, "mu"), moment(after, "nu"), i + 1)
    step = SCALE * (p @ normal + rest / size) + DECAY * case.weight
    worst = max(worst, relative(update, -RATE * step))
  yield "update with the normalized residual", worst, EXACT


# Kind of code to its largest error in a block from `low` to `high`, whose
# largest magnitude is `top`.
CODES: dict[str, Callable[[float, float, float], float]] = {
  "dynamic": lambda low, high, top: top * 0.9 / 128,
  "unsigned_dynamic": lambda low, high, top: top * 0.9 / 256,
  "int8": lambda low, high, top: (high - low) / 510,
  "int4": lambda low, high, top: (high - low) / 30,
}
BLOCK = 256


def codes(case: Case) -> Found:
  """Codes of 8 and 4 bits, against half a cell."""
  for kind, limit in CODES.items():
    sizes = 10.0 ** np.arange(-4, 0.0, 0.25)
    x = case.rng.normal(size=(len(sizes), BLOCK)) * sizes[:, None]
    x = single(np.abs(x) if kind == "unsigned_dynamic" else x)
    code = jax.jit(functools.partial(go.quantize, kind=kind))
    found = double(code(jnp.asarray(x.ravel(), jnp.float32))).reshape(x.shape)
    allowed = [
      limit(min(row.min(), 0), max(row.max(), 0), np.abs(row).max())
      for row in x
    ]
    ratio = np.abs(found - x).max(axis=1) / allowed
    yield f"{kind} code: largest error / half a cell", ratio.max(), 1.01


def eight_bits(case: Case) -> Found:
  """A step of `galore_adamw_8bit`."""
  tx = go.galore_adamw_8bit(RATE, min_size=0, **case.options())
  grad, update, _, after = next(case.steps(tx))
  p = basis(after)
  low = p.T @ grad
  normal = direction((1 - B1) * low, (1 - B2) * low**2, 1)
  wanted = -RATE * (SCALE * p @ normal + DECAY * case.weight)
  yield "8-bit moments: update", relative(update, wanted), ELEMENTWISE
  error = relative(moment(after, "mu"), (1 - B1) * low)
  yield "8-bit moments: first moment as stored", error, 0.02


def projected_gradient(case: Case) -> Found:
  """A gradient of `projected_value_and_grad`."""
  tokens = single(case.rng.normal(size=(256, len(case.weight))))
  params = {"w": jnp.asarray(case.weight, jnp.float32)}
  tx = go.galore_adamw(RATE, **case.options())
  loss = lambda params, x: 0.5 * jnp.sum((x @ params["w"]) ** 2)
  run = jax.jit(go.projected_value_and_grad(loss, tx))
  x = jnp.asarray(tokens, jnp.float32)
  _, grads, state = run(params, jax.jit(tx.init)(params), x)
  p = basis(state)
  wanted = p.T @ (tokens.T @ (tokens @ case.weight))
  # The products are the model's, at its precision.
  bound = max(EXACT, 8 * default_error(case))
  yield (
    "gradient at rank r, at the default",
    relative(double(grads["w"]), wanted),
    bound,
  )


def polar(case: Case) -> Found:
  """A result of `polar_factor`."""
  x = jnp.asarray(case.grads[0], jnp.float32)
  found = double(jax.jit(go.polar_factor)(x))
  error = np.abs(found @ found.T - np.eye(len(found))).max()
  yield "polar factor: largest entry of O Oᵀ - I", error, ELEMENTWISE
