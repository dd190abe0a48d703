"""Runs bitsandbytes' 8-bit Adam on fixed gradients, on CPU.

    python -m tests.parity.bitsandbytes_run

records its code books, the moments after each step and the last weights in
`bitsandbytes.npz`; the tests compare with this record. Recording needs the
extra `parity`; where it is installed, the tests also run bitsandbytes live.

On CPU, bitsandbytes 0.50 rounds float32 to a coarse table of codes: a second
moment of 1e-8 of the largest one becomes 1.6e-5 of it, while its CUDA kernel
and its generic code give 0, the nearest value. Here moments are rounded by the
generic code, which bitsandbytes uses for dtypes other than float32.

The weight has the shape (8, 1024). bitsandbytes divides the flattened weight
into blocks of 256 elements, which then lie along the last axis, as ours do.
"""

import pathlib

import numpy as np

RECORD = pathlib.Path(__file__).with_name("bitsandbytes.npz")
SHAPE, RATE, EPS, STEPS = (8, 1024), 1e-2, 1e-8, 8


def gradients() -> np.ndarray:
  """Gradients (steps, m, n) of many magnitudes, float32."""
  rng = np.random.default_rng(0)
  size = 10.0 ** rng.uniform(-2.5, 0, size=SHAPE)
  mean = rng.normal(size=SHAPE)
  noise = rng.normal(size=(STEPS, *SHAPE))
  return np.float32(size * (mean + 0.5 * noise))


def code_books() -> dict[str, np.ndarray]:
  """The 256 values of the signed and of the unsigned code."""
  from bitsandbytes import functional

  return {
    "signed": functional.create_dynamic_map(signed=True).numpy(),
    "unsigned": functional.create_dynamic_map(signed=False).numpy(),
  }


def run(grads: np.ndarray) -> dict[str, np.ndarray]:
  """Codes and scales of the moments after each step, and the last weights."""
  import bitsandbytes
  import torch
  from bitsandbytes.backends.cpu import ops

  def nearest(x, code, absmax, out, blocksize):
    quantize = torch.ops.bitsandbytes.quantize_blockwise
    codes, largest = quantize(x.double(), code, blocksize)
    out.copy_(codes)
    absmax.copy_(largest)

  ops._quant_blockwise_fp32_direct = nearest
  param = torch.nn.Parameter(torch.zeros(SHAPE))
  optimizer = bitsandbytes.optim.Adam8bit([param], lr=RATE, eps=EPS)
  found: dict[str, list] = {}
  for grad in grads:
    param.grad = torch.tensor(grad)
    optimizer.step()
    for key, x in optimizer.state[param].items():
      if key in ("state1", "state2", "absmax1", "absmax2"):
        found.setdefault(key, []).append(x.numpy().copy())
  moments = {key: np.stack(values) for key, values in found.items()}
  return {**moments, "weights": param.detach().numpy()}


def moments(recorded: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """First and second moments after each step, (steps, m, n)."""
  found = {}
  for name, i, book in (("mu", 1, "signed"), ("nu", 2, "unsigned")):
    values = recorded[book][recorded[f"state{i}"]]
    values = values.reshape(STEPS, -1, 256)
    values = values * recorded[f"absmax{i}"].reshape(STEPS, -1, 1)
    found[name] = values.reshape(STEPS, *SHAPE)
  return found


if __name__ == "__main__":
  np.savez_compressed(RECORD, **code_books(), **run(gradients()))
  print(f"wrote {RECORD}")
