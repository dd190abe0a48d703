"""Runs galore-torch's AdamW on fixed gradients.

    python -m tests.parity.galore_torch_run

records the run in `galore_torch.npz`; the tests compare with this record.
Recording needs the extra `parity`; where it is installed, the tests also run
galore-torch live.

Singular vectors are defined up to their signs. galore-torch keeps its old
moments in a new basis, so its weights depend on the signs that the machine's
SVD returns. Here the signs are fixed: the largest entry of each vector is
positive. galore-torch adds epsilon before the bias correction, and we add it
after: epsilon is so small here that this makes no difference.
"""

import pathlib

import numpy as np

RECORD = pathlib.Path(__file__).with_name("galore_torch.npz")
SHAPES = {"wide": (12, 20), "tall": (20, 12), "square": (16, 16)}
SETTINGS = {"rank": 4, "update_proj_gap": 5, "scale": 0.25}
RATE, EPS, STEPS = 1e-2, 1e-12, 23


def inputs() -> dict[str, np.ndarray]:
  """Weights and gradients, float32, with well separated singular values."""
  rng = np.random.default_rng(0)
  arrays = {}
  for name, (m, n) in SHAPES.items():
    short = min(m, n)
    arrays[f"{name}/weight"] = np.float32(rng.normal(size=(m, n)))
    sides = rng.normal(size=(m, short)), rng.normal(size=(n, short))
    grads = []
    for _ in range(STEPS):
      sides = tuple(x + 0.2 * rng.normal(size=x.shape) for x in sides)
      u, v = (np.linalg.qr(x)[0] for x in sides)
      grads.append(np.float32((u * 2.0 ** -np.arange(short)) @ v.T))
    arrays[f"{name}/grads"] = np.stack(grads)
  return arrays


def run(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Weights after each step under galore-torch, (steps, m, n) float32."""
  import galore_torch
  import torch

  plain_svd = torch.linalg.svd

  def signed_svd(x, full_matrices=True):
    u, s, vh = plain_svd(x, full_matrices=full_matrices)
    peak = lambda y: torch.sign(y.gather(0, y.abs().argmax(0, keepdim=True)))
    return u * peak(u), s, (vh.T * peak(vh.T)).T

  torch.linalg.svd = signed_svd
  try:
    return {
      f"{name}/weights": _weights(
        galore_torch.GaLoreAdamW,
        arrays[f"{name}/weight"],
        arrays[f"{name}/grads"],
      )
      for name in SHAPES
    }
  finally:
    torch.linalg.svd = plain_svd


def _weights(optimizer_class, weight, grads) -> np.ndarray:
  import torch

  param = torch.nn.Parameter(torch.tensor(weight))
  optimizer = optimizer_class(
    [{"params": [param], "proj_type": "std", **SETTINGS}],
    lr=RATE,
    eps=EPS,
    no_deprecation_warning=True,
  )
  weights = []
  for grad in grads:
    param.grad = torch.tensor(grad)
    optimizer.step()
    weights.append(param.detach().numpy().copy())
  return np.stack(weights)


if __name__ == "__main__":
  given = inputs()
  np.savez_compressed(RECORD, **given, **run(given))
  print(f"wrote {RECORD}")
