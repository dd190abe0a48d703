"""The papers' algorithm in float64 NumPy, sharing no code with the library.

GaLore, arXiv 2403.03507, Algorithm 2 with Adam: the shorter side is projected,
the basis comes from an exact SVD at the steps 0, T, 2T, ..., moments are left
as they are then, and the lifted update is multiplied by alpha.
"""

import numpy as np


class GaLoreAdamW:
  """One matrix under GaLore-AdamW."""

  def __init__(self, rank, gap, alpha, rate, decay, b1=0.9, b2=0.999, eps=1e-8):
    self.rank, self.gap, self.alpha = rank, gap, alpha
    self.rate, self.decay = rate, decay
    self.b1, self.b2, self.eps = b1, b2, eps
    self.steps = 0
    self.basis = self.mu = self.nu = None

  def update(self, weight, grad, align):
    """The change of the weight; `align` fixes the signs of a new basis."""
    grad = np.asarray(grad, np.float64)
    rows, cols = grad.shape
    left = rows <= cols
    if self.steps % self.gap == 0:
      u, _, vt = np.linalg.svd(grad, full_matrices=False)
      found = u[:, : self.rank] if left else vt[: self.rank].T
      self.basis = found * np.sign(np.sum(found * align(found), axis=0))
    low = self.basis.T @ grad if left else grad @ self.basis
    if self.mu is None:
      self.mu, self.nu = np.zeros_like(low), np.zeros_like(low)
    self.steps += 1
    self.mu = self.b1 * self.mu + (1 - self.b1) * low
    self.nu = self.b2 * self.nu + (1 - self.b2) * low**2
    mu_hat = self.mu / (1 - self.b1**self.steps)
    nu_hat = self.nu / (1 - self.b2**self.steps)
    normal = mu_hat / (np.sqrt(nu_hat) + self.eps)
    lifted = self.basis @ normal if left else normal @ self.basis.T
    return -self.rate * (self.alpha * lifted + self.decay * weight)
