"""The cost model: FLOPs and bytes of each part of GaLore.

Projecting a matrix (m, n) at rank r takes 2 m n r FLOPs at every step, and
lifting takes as many. A refresh, once in T steps, takes k iterations. Each of
them takes 4 m n r FLOPs for two products with the gradient, and
3 (4 m r^2 + 4/3 r^3) to make the basis orthonormal. The gradient itself takes
6 FLOPs per weight and token.
"""

import dataclasses
from typing import Any

from train.bench import refresh as refresh_lib
from train.bench import trees

FLOAT = 4  # bytes
ITERATIONS = refresh_lib.DEFAULT_ITERATIONS


@dataclasses.dataclass(frozen=True)
class Site:
  """A stack of matrices that is projected.

  Attributes:
    m: Short side.
    n: Long side.
    r: Rank.
    layers: Number of matrices.
  """

  m: int = 512
  n: int = 1376
  r: int = 128
  layers: int = 1

  def project(self) -> tuple[float, float]:
    """FLOPs and bytes of P^T G; lifting takes as many."""
    m, n, r = self.m, self.n, self.r
    moved = m * n + m * r + r * n
    return self.layers * 2.0 * m * n * r, self.layers * FLOAT * float(moved)

  def inner(self) -> tuple[float, float]:
    """FLOPs (neglected) and bytes of Adam on the projected gradients.

    Adam reads the gradient, reads and writes two moments, writes the update.
    """
    return 0.0, self.layers * FLOAT * 6.0 * self.r * self.n

  def refresh(self) -> tuple[float, float]:
    """FLOPs and bytes of the subspace iterations of all matrices."""
    m, n, r = self.m, self.n, self.r
    passes = 3 * (4 * m * r**2 + 4 / 3 * r**3)
    flops = ITERATIONS * (4 * m * n * r + passes)
    moved = ITERATIONS * (2 * m * n + 2 * r * n + 10 * m * r)
    return self.layers * flops, self.layers * FLOAT * float(moved)


def flops_per_step(size: trees.Size, gap: int, tokens: int) -> dict[str, float]:
  """FLOPs of GaLore and of the gradient in one step of a LLaMA.

  Args:
    size: The model.
    gap: Steps between refreshes.
    tokens: Tokens of a batch.

  Returns:
    FLOPs of `project_and_lift`, of `refresh` averaged over the gap, and of the
    `gradient`; and `share`, GaLore's FLOPs over the gradient's.
  """
  attention = Site(size.dim, size.dim, size.rank, 4 * size.layers)
  mlp = Site(size.dim, size.hidden, size.rank, 3 * size.layers)
  sites = (attention, mlp)
  each_step = sum(2 * site.project()[0] for site in sites)
  refresh = sum(site.refresh()[0] for site in sites) / gap
  weights = sum(site.layers * site.m * site.n for site in sites)
  weights += size.vocab * size.dim  # the head; the embedding is a look-up
  gradient = 6.0 * weights * tokens
  return {
    "project_and_lift": each_step,
    "refresh": refresh,
    "gradient": gradient,
    "share": (each_step + refresh) / gradient,
  }


def overheads() -> list[dict[str, Any]]:
  """GaLore's share of a step's FLOPs, by model and tokens, at T = 200."""
  rows = []
  for name in ("60m", "130m", "350m", "1b", "7b"):
    size = trees.SIZES[name]
    shares = {
      str(tokens): flops_per_step(size, 200, tokens)
      for tokens in (256, 2048, 16384, 131072)
    }
    rows.append({"model": name, "rank": size.rank, "tokens": shares})
  return rows


def least_seconds(part: dict[str, Any], peak: dict[str, float]) -> float:
  """The least time that a part can take at the machine's peak rates.

  Args:
    part: Its `flops` and `bytes`.
    peak: The machine's `flops` and `bytes` per second.
  """
  return max(part["flops"] / peak["flops"], part["bytes"] / peak["bytes"])
