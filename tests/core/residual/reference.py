"""Residuals in float64 NumPy, sharing no code with the library.

Fira, arXiv 2410.01623, and APOLLO, arXiv 2412.05270, as their public code has
them: on top of GaLore's projected Adam, here with bias corrections in the
direction, as Optax has them. The normalized residual as its definition says,
with the residual itself.
"""

import numpy as np

from tests.core import reference


def limited(residual, before):
  """The residual after the norm-growth limiter, its norm, whether it acted."""
  norm = np.linalg.norm(residual)
  if before is None:
    return residual, norm, False
  limiter = max(norm / (before + 1e-8), 1.01) / 1.01
  return residual / limiter, norm / limiter, limiter > 1


class _Adam:
  """Adam's direction for one matrix."""

  def __init__(self, b1=0.9, b2=0.999, eps=1e-8):
    self.b1, self.b2, self.eps = b1, b2, eps
    self.steps, self.mu, self.nu = 0, 0.0, 0.0

  def __call__(self, low):
    self.steps += 1
    self.mu = self.b1 * self.mu + (1 - self.b1) * low
    self.nu = self.b2 * self.nu + (1 - self.b2) * low**2
    mu_hat = self.mu / (1 - self.b1**self.steps)
    nu_hat = self.nu / (1 - self.b2**self.steps)
    return mu_hat / (np.sqrt(nu_hat) + self.eps)


class Fira:
  """One matrix under Fira around AdamW."""

  def __init__(self, rank, gap, alpha, rate, decay):
    self.galore = reference.GaLoreAdamW(rank, gap, 1.0, 1.0, 0.0)
    self.alpha, self.rate, self.decay = alpha, rate, decay
    self.norm, self.limited = None, []

  def update(self, weight, grad, align):
    """The change of the weight; `align` fixes the signs of a new basis."""
    grad = np.asarray(grad, np.float64)
    lifted = -self.galore.update(0 * weight, grad, align)
    basis = self.galore.basis
    if grad.shape[0] <= grad.shape[1]:
      axis, low, normal = 0, basis.T @ grad, basis.T @ lifted
      known = basis @ low
    else:
      axis, low, normal = 1, grad @ basis, lifted @ basis
      known = low @ basis.T
    phi = np.linalg.norm(normal, axis=axis, keepdims=True) / (
      np.linalg.norm(low, axis=axis, keepdims=True) + 1e-8
    )
    residual = (grad - self.alpha * known) * phi
    residual, self.norm, acted = limited(residual, self.norm)
    self.limited.append(acted)
    step = self.alpha * lifted + residual
    return -self.rate * (step + self.decay * weight)


class Apollo:
  """One matrix under APOLLO around AdamW, on projections that are given."""

  def __init__(self, alpha, rate, decay, tensor):
    self.adam, self.alpha, self.rate = _Adam(), alpha, rate
    self.decay, self.tensor = decay, tensor
    self.norm, self.limited = None, []

  def update(self, weight, grad, basis):
    """The change of the weight."""
    grad = np.asarray(grad, np.float64)
    left = grad.shape[0] <= grad.shape[1]
    low = basis.T @ grad if left else grad @ basis
    normal = self.adam(low)
    axis = None if self.tensor else 0 if left else 1
    scale = np.linalg.norm(normal, axis=axis, keepdims=True) / (
      np.linalg.norm(low, axis=axis, keepdims=True) + 1e-8
    )
    step, self.norm, acted = limited(grad * scale, self.norm)
    self.limited.append(acted)
    step = np.sqrt(self.alpha) * step
    return -self.rate * (step + self.decay * weight)


class Normalized:
  """One matrix with its normalized residual, around AdamW.

  It is given the bases, and takes the part of both sides if there are two.
  """

  def __init__(
    self,
    alpha,
    rate,
    decay,
    factored=False,
    factor=1.0,
    memory=0.95,
    growth=np.inf,
  ):
    self.adam, self.alpha, self.rate = _Adam(), alpha, rate
    self.decay, self.factored, self.factor = decay, factored, factor
    self.memory, self.squares = memory, []
    self.growth, self.norm, self.limited = growth, None, []

  def update(self, weight, grad, bases):
    """The change of the weight, given side to basis (m, r) or (n, r)."""
    grad = np.asarray(grad, np.float64)
    m, n = grad.shape
    left = bases.get("left", np.eye(m))
    right = bases.get("right", np.eye(n))
    low = left.T @ grad @ right
    rest = grad - left @ low @ right.T
    direction = left @ self.adam(low) @ right.T
    self.squares.append(rest**2)
    # The weights of the steps so far, the last one first.
    weights = self.memory ** np.arange(len(self.squares))
    weights /= weights.sum()
    mean = sum(
      w * square
      for w, square in zip(weights, reversed(self.squares), strict=True)
    )
    axis = 1 if list(bases) == ["right"] else 0
    lines = mean.sum(axis, keepdims=True)
    if self.factored:
      across = mean.sum(1 - axis, keepdims=True)
      size = np.sqrt(lines * across / mean.sum())
    else:
      size = np.sqrt(lines / ((m * n - low.size) / lines.size))
    rest = rest / size
    norm = np.linalg.norm(rest)
    most = norm if self.norm is None else self.growth * self.norm
    self.limited.append(norm > most)
    rest *= min(norm, most) / norm
    self.norm = min(norm, most)
    step = self.alpha * (direction + self.factor * rest)
    return -self.rate * (step + self.decay * weight)
