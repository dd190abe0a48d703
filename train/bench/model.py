"""The cost model: FLOPs and bytes of GaLore's parts.

A matrix (m, n) at rank r takes 2 m n r FLOPs to project and as many to lift,
at every step; a refresh takes, in each of k iterations, 4 m n r for two
products with the gradient and 3 (4 m r^2 + 4/3 r^3) to make the basis
orthonormal, once in T steps. The gradient itself takes 6 FLOPs a weight and
token.
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
    m: short side.
    n: long side.
    r: rank.
    layers: matrices.
  """

  m: int = 512
  n: int = 1376
  r: int = 128
  layers: int = 1

  def project(self) -> tuple[float, float]:
    """FLOPs and bytes of P^T G; those of lifting are the same."""
    m, n, r = self.m, self.n, self.r
    moved = m * n + m * r + r * n
    return self.layers * 2.0 * m * n * r, self.layers * FLOAT * float(moved)

  def inner(self) -> tuple[float, float]:
    """Adam at low rank: two moments read and written, one update."""
    return 0.0, self.layers * FLOAT * 6.0 * self.r * self.n

  def refresh(self) -> tuple[float, float]:
    """Subspace iterations of all matrices."""
    m, n, r = self.m, self.n, self.r
    passes = 3 * (4 * m * r**2 + 4 / 3 * r**3)
    flops = ITERATIONS * (4 * m * n * r + passes)
    moved = ITERATIONS * (2 * m * n + 2 * r * n + 10 * m * r)
    return self.layers * flops, self.layers * FLOAT * float(moved)


def flops_a_step(size: trees.Size, gap: int, tokens: int) -> dict[str, float]:
  """FLOPs of GaLore and of the gradient for a step of a LLaMA.

  Args:
    size: of the model.
    gap: steps between refreshes.
    tokens: of a step.

  Returns:
    `project_and_lift`, `refresh` spread over the gap, `gradient`, and `share`,
    GaLore's part over the gradient's.
  """
  attention = Site(size.dim, size.dim, size.rank, 4 * size.layers)
  mlp = Site(size.dim, size.hidden, size.rank, 3 * size.layers)
  sites = (attention, mlp)
  every = sum(2 * site.project()[0] for site in sites)
  rare = sum(site.refresh()[0] for site in sites) / gap
  weights = sum(site.layers * site.m * site.n for site in sites)
  gradient = 6.0 * (weights + size.vocab * size.dim) * tokens  # and the head
  return {
    "project_and_lift": every,
    "refresh": rare,
    "gradient": gradient,
    "share": (every + rare) / gradient,
  }


def overheads() -> list[dict[str, Any]]:
  """GaLore's share of a step's FLOPs: model by tokens, at T = 200."""
  rows = []
  for name in ("60m", "130m", "350m", "1b", "7b"):
    size = trees.SIZES[name]
    shares = {
      str(tokens): flops_a_step(size, 200, tokens)
      for tokens in (256, 2048, 16384, 131072)
    }
    rows.append({"model": name, "rank": size.rank, "tokens": shares})
  return rows


def bound(part: dict[str, Any], best: dict[str, float]) -> float:
  """The least seconds that the machine's limits allow for a part."""
  return max(part["flops"] / best["flops"], part["bytes"] / best["bytes"])
