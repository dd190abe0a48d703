"""Runs bitsandbytes' NF4 on a fixed weight, on CPU.

    python -m tests.parity.nf4_run

records the code book, the codes, the scales and the dequantized values, with
and without double quantization, in `nf4.npz`; the tests compare with this
record. Recording needs the extra `parity`; where it is installed, the tests
also run bitsandbytes live.

The weight has the shape (8, 1024). bitsandbytes divides the flattened weight
into blocks of 64 elements, which then lie along the last axis, as ours do.
"""

import pathlib

import numpy as np

RECORD = pathlib.Path(__file__).with_name("nf4.npz")
SHAPE, BLOCK = (8, 1024), 64


def weight() -> np.ndarray:
  """Normal entries whose scale differs between blocks, float32."""
  rng = np.random.default_rng(0)
  size = np.exp(rng.normal(size=(SHAPE[0], SHAPE[1] // BLOCK, 1)))
  x = 0.02 * size * rng.normal(size=(*size.shape[:2], BLOCK))
  return np.float32(x.reshape(SHAPE))


def run() -> dict[str, np.ndarray]:
  """The code book, and the codes 0 ... 15, scales and values of the weight."""
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
