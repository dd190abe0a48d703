"""GaLore with Tucker factors in float64 NumPy, without the library's code.

Adam on the core of one tensor, whose factors are found by subspace iteration on
its unfoldings, with moments carried into new factors.
"""

import numpy as np


def unfold(x, axis):
  """The matrix whose rows are along an axis."""
  return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


def times(x, matrix, axis):
  """The product of a tensor and a matrix along an axis."""
  return np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)


def orthonormal(y):
  """The orthonormal factor of a QR factorization with a positive diagonal."""
  q, r = np.linalg.qr(y)
  return q * np.sign(np.diag(r))


class TuckerAdamW:
  """One tensor under GaLore-AdamW; `factors` is axis to first factor."""

  def __init__(
    self, factors, alpha, rate, decay, iterations=2, residual=None, column=-1
  ):
    self.factors = {k: np.asarray(p, np.float64) for k, p in factors.items()}
    self.alpha, self.rate, self.decay = alpha, rate, decay
    self.iterations, self.steps = iterations, 0
    self.mu = self.nu = 0.0
    self.residual, self.column = residual, column
    self.columns = self.rows = self.weight = 0.0

  def update(self, weight, grad, is_due):
    """The change of the weight."""
    grad = np.asarray(grad, np.float64)
    if is_due:
      self._refresh(grad)
    low = self._through(grad, lambda p: p.T)
    self.steps += 1
    self.mu = 0.9 * self.mu + 0.1 * low
    self.nu = 0.999 * self.nu + 0.001 * low**2
    mean = self.mu / (1 - 0.9**self.steps)
    square = self.nu / (1 - 0.999**self.steps)
    lifted = self._through(mean / (np.sqrt(square) + 1e-8), lambda p: p)
    if self.residual:
      lifted += self._normalized(grad - self._through(low, lambda p: p), low)
    return -self.rate * (self.alpha * lifted + self.decay * weight)

  def _refresh(self, grad):
    for axis, old in self.factors.items():
      matrix, new = unfold(grad, axis), old
      for _ in range(self.iterations):
        y = matrix @ (matrix.T @ new)
        new = orthonormal(y / np.linalg.norm(y) + 1e-6 * new)
      self.factors[axis] = new
      if self.steps:
        overlap = new.T @ old
        self.mu = times(self.mu, overlap, axis)
        self.nu = times(self.nu, overlap**2, axis)

  def _through(self, x, matrix_of):
    for axis, factor in self.factors.items():
      x = times(x, matrix_of(factor), axis)
    return x

  def _normalized(self, rest, low):
    """The residual over the root of a running mean of its squares."""
    moved = np.moveaxis(rest, self.column, -1)
    matrix = moved.reshape(-1, moved.shape[-1])
    self.columns = 0.95 * self.columns + 0.05 * np.sum(matrix**2, 0)
    self.rows = 0.95 * self.rows + 0.05 * np.sum(matrix**2, 1)
    self.weight = 0.95 * self.weight + 0.05
    columns, rows = self.columns / self.weight, self.rows[:, None] / self.weight
    if self.residual == "normalized":
      free = (rest.size - low.size) / moved.shape[-1]
      matrix = matrix * np.sqrt(free / columns)
    else:
      matrix = matrix * np.sqrt(np.sum(rows) / (columns * rows))
    return np.moveaxis(matrix.reshape(moved.shape), -1, self.column)
