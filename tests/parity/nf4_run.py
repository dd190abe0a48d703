"""Runs bitsandbytes' NF4 on a fixed weight, on CPU.

    python -m tests.parity.nf4_run

records its code book, its codes, scales and what they stand for, with and
without double quantisation, in `nf4.npz`, with which the tests compare in
every run. It needs the extra `parity`; where that is installed the tests also
repeat it live.

The weight is of shape (8, 1024): bitsandbytes cuts the flattened weight in
blocks of 64 elements, which there lie along the last axis, as ours do.
"""

import pathlib

import numpy as np

RECORD = pathlib.Path(__file__).with_name("nf4.npz")
SHAPE, BLOCK = (8, 1024), 64


def weight() -> np.ndarray:
  """Normal entries whose size differs from block to block, float32."""
  rng = np.random.default_rng(0)
  size = np.exp(rng.normal(size=(SHAPE[0], SHAPE[1] // BLOCK, 1)))
  x = 0.02 * size * rng.normal(size=(*size.shape[:2], BLOCK))
  return np.float32(x.reshape(SHAPE))


def run() -> dict[str, np.ndarray]:
  """The code book, and of the weight codes 0 ... 15, scales and values."""
  import torch
  from bitsandbytes import functional

  found: dict[str, np.ndarray] = {}
  x = torch.tensor(weight())
  for name, double in (("single", False), ("double", True)):
    packed, state = functional.quantize_4bit(
      x, blocksize=BLOCK, quant_type="nf4", compress_statistics=double
    )
    values = functional.dequantize_4bit(packed, state)
    found[f"values_{name}"] = values.numpy()
    if double:
      continue
    bytes_ = packed.numpy().reshape(-1)
    pairs = np.stack([bytes_ >> 4, bytes_ & 15], axis=-1)
    found["codes"] = pairs.reshape(SHAPE)
    found["scales"] = state.absmax.numpy()
    found["book"] = state.code.numpy()
  return found


if __name__ == "__main__":
  np.savez_compressed(RECORD, **run())
  print(f"wrote {RECORD}")
