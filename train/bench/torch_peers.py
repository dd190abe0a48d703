"""AdamW of PyTorch and of galore-torch, on the same shapes and gradients."""

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
  """A PyTorch optimizer on its own parameters.

  Attributes:
    optimizer: The optimizer. Its parameters hold their gradients.
  """

  optimizer: Any

  def call(self) -> None:
    """Makes one step."""
    self.optimizer.step()

  def state_bytes(self) -> int:
    """Bytes of its state with all bases; 0 before the first step."""
    states = self.optimizer.state.values()
    tensors = (x for state in states for x in _tensors(state.values()))
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
  """Checks that PyTorch and galore-torch are installed.

  Raises:
    UserError: They are not.
  """
  absent = [x for x in MODULES if importlib.util.find_spec(x) is None]
  if absent:
    raise UserError(
      f"--torch: {' and '.join(absent)} not installed; run"
      ' pip install -e ".[train,bench]", or leave out --torch'
    )


def start(grads: dict, rank: int, gap: int) -> dict[str, Peer]:
  """PyTorch's AdamW and galore-torch's AdamW on new parameters.

  Args:
    grads: Gradients. Stacks are split into separate matrices for both, because
      galore-torch takes no others.
    rank: Rank of the projections, on the matrices of the blocks.
    gap: Steps between refreshes.
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
  options = {"rank": rank, "update_proj_gap": gap, "scale": 0.25}
  groups = [{"params": full}, {"params": low, "proj_type": "std", **options}]
  galore = GaLoreAdamW(groups, lr=1e-3, weight_decay=0.1)
  return {"torch AdamW": Peer(plain), "galore-torch": Peer(galore)}


def _parameters(grads: dict) -> tuple[list[Any], list[Any]]:
  """Parameters with gradients: those to project, and all others."""
  import torch

  low: list[Any] = []
  full: list[Any] = []
  for keys, grad in jax.tree_util.tree_leaves_with_path(grads):
    into = low if trees.in_blocks(keys, grad) else full
    for x in grad if grad.ndim == 3 else [grad]:
      parameter = torch.nn.Parameter(torch.zeros(*x.shape))
      parameter.grad = torch.from_numpy(np.array(x, np.float32))
      into.append(parameter)
  return low, full
