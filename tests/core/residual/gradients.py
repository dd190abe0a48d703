"""Gradients whose subspace changes slowly."""

import numpy as np

# Fira's limiter acts where gradients grow, not where they shrink.
SIZES = [1, 1, 4, 5, 1, 0.5, 0.5, 6, 2, 1, 0.2, 0.1, 3, 3, 1]


def gradients(shape, sizes=SIZES, seed=0):
  """Gradients of full rank whose singular vectors change slowly."""
  rng = np.random.default_rng(seed)
  short = min(shape[-2:])
  spectrum = 1.5 ** -np.arange(short)
  u = rng.normal(size=(*shape[:-1], short))
  v = rng.normal(size=(*shape[:-2], shape[-1], short))
  for size in sizes:
    u, v = (x + 0.2 * rng.normal(size=x.shape) for x in (u, v))
    left, right = np.linalg.qr(u)[0], np.linalg.qr(v)[0]
    yield np.float32(size * (left * spectrum) @ np.swapaxes(right, -1, -2))
