"""The public PyTorch implementations on the same shapes and gradients."""

import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from train.bench import trees
from train.common.errors import UserError
from train.measure import machine

MODULES = ("torch", "galore_torch")


@dataclasses.dataclass
class Peer:
  """A PyTorch optimizer on its parameters.

  Attributes:
    optimizer: the optimizer; parameters hold their gradients.
  """

  optimizer: Any

  def call(self) -> None:
    """One step."""
    self.optimizer.step()

  def state_bytes(self) -> int:
    """Bytes of its state, bases included; there is none before a step."""
    entries = self.optimizer.state.values()
    tensors = (x for entry in entries for x in _tensors(entry.values()))
    return sum(x.numel() * x.element_size() for x in tensors)


def _tensors(values: Any) -> Iterator[Any]:
  import torch

  for value in values:
    if torch.is_tensor(value):
      yield value
    elif hasattr(value, "ortho_matrix"):  # galore-torch's projector
      basis = value.ortho_matrix
      yield from basis if isinstance(basis, list | tuple) else [basis]


def require() -> None:
  """Raises if they are asked for and are not installed.

  Raises:
    UserError: names the packages and what installs them.
  """
  absent = [x for x in MODULES if importlib.util.find_spec(x) is None]
  if absent:
    raise UserError(
      f"--torch: {' and '.join(absent)} not installed;"
      ' pip install -e ".[train,bench]", or leave --torch out'
    )


def start(grads: dict, rank: int, gap: int) -> dict[str, Peer]:
  """AdamW and GaLore's AdamW on fresh parameters.

  Args:
    grads: Gradients; stacked ones are given to both as separate matrices, as
      GaLore's knows no others.
    rank: of the projections, on the matrices of the blocks.
    gap: steps between refreshes.
  """
  require()
  import torch
  from galore_torch import GaLoreAdamW

  if machine.single_threaded():
    torch.set_num_threads(1)
  low, full = _parameters(grads)
  adamw: Any = torch.optim.AdamW
  plain = adamw(low + full, lr=1e-3, weight_decay=0.1, foreach=True)
  low, full = _parameters(grads)
  site = {"rank": rank, "update_proj_gap": gap, "scale": 0.25}
  groups = [{"params": full}, {"params": low, "proj_type": "std", **site}]
  galore = GaLoreAdamW(groups, lr=1e-3, weight_decay=0.1)
  return {"torch AdamW": Peer(plain), "galore-torch": Peer(galore)}


def _parameters(grads: dict) -> tuple[list[Any], list[Any]]:
  """Parameters with gradients: those to project, and the others."""
  import torch

  low: list[Any] = []
  full: list[Any] = []
  for keys, grad in jax.tree_util.tree_leaves_with_path(grads):
    chosen = low if trees.in_blocks(keys, grad) else full
    for x in grad if grad.ndim == 3 else [grad]:
      parameter = torch.nn.Parameter(torch.zeros(*x.shape))
      parameter.grad = torch.from_numpy(np.array(x, np.float32))
      chosen.append(parameter)
  return low, full
