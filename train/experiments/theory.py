"""The setting in which GaLore's theory proves that gradients become low-rank.

In a reversible network a layer's gradient has the form

    G_t = 1/N sum_i (A_i - B_i W_t C_i),  B_i, C_i positive semi-definite,

so that W_{t+1} = W_t + eta G_t makes G_{t+1} = G_t - eta/N sum_i B_i G_t C_i:
a linear map, S = 1/N sum_i C_i (x) B_i on the stacked columns. The part in the
eigenspace of its least eigenvalue decays the slowest. Lemma 3.3 of arXiv
2403.03507 says (with t0 = 0):

    sr(G_t) <= sr(G') + q^(2t) |G_0 - G'|_F^2 / |G'|_2^2,
    q = (1 - eta l2) / (1 - eta l1),

where sr is the stable rank, l1 < l2 the two least eigenvalues, and G' the part
of G_0 in the eigenspace of l1.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layer:
  """The constants A, B_i and C_i of a layer's gradient."""

  a: np.ndarray  # (m, n), the mean of the A_i
  b: np.ndarray  # (N, m, m)
  c: np.ndarray  # (N, n, n)

  def gradient(self, w: np.ndarray) -> np.ndarray:
    """The gradient at weights w (m, n)."""
    products = np.einsum("kij,jl,klo->io", self.b, w, self.c)
    return self.a - products / len(self.b)

  def operator(self) -> np.ndarray:
    """S, a matrix (m n, m n) that acts on stacked columns."""
    pairs = zip(self.c, self.b, strict=True)
    return np.mean([np.kron(c, b) for c, b in pairs], axis=0)


def draw(m: int, n: int, count: int, seed: int) -> Layer:
  """A layer with `count` random positive definite B_i and C_i."""
  random = np.random.default_rng(seed)

  def definite(size: int) -> np.ndarray:
    x = random.standard_normal((count, size, 2 * size))
    return x @ x.transpose(0, 2, 1) / (2 * size)

  return Layer(random.standard_normal((m, n)), definite(m), definite(n))


def stable_rank(g: np.ndarray) -> float:
  """The squared Frobenius norm over the squared spectral norm."""
  sigma = np.linalg.svd(g, compute_uv=False)
  return float(np.sum(sigma**2) / sigma[0] ** 2)


def descend(layer: Layer, times: np.ndarray) -> dict[str, list[float]]:
  """Stable rank of the gradient, from zero weights, and the lemma's bound.

  The learning rate is 1 over the largest eigenvalue of S.

  Args:
    layer: The layer.
    times: Numbers of steps.

  Returns:
    `stable_rank` and `bound` at each time, and `limit`, the stable rank of G'.
  """
  values, vectors = np.linalg.eigh(layer.operator())
  rate = 1 / values[-1]
  start = layer.a.T.reshape(-1)  # the gradient at zero weights
  parts = vectors.T @ start
  decay = 1 - rate * values
  shape = layer.a.shape
  matrix = lambda x: x.reshape(shape[::-1]).T
  slowest = matrix(vectors[:, 0] * parts[0])
  limit = stable_rank(slowest)
  rest = np.sum((layer.a - slowest) ** 2) / np.linalg.norm(slowest, 2) ** 2
  # Relative to the slowest decay, so that nothing underflows.
  ratio = decay / decay[0]
  ranks = [stable_rank(matrix(vectors @ (parts * ratio**t))) for t in times]
  bounds = [limit + ratio[1] ** (2 * t) * rest for t in times]
  return {
    "stable_rank": ranks,
    "bound": [float(x) for x in bounds],
    "limit": [limit],
  }
