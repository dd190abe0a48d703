"""Gradients to find bases of: recorded in a run, or with known spectra."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from train.common.errors import UserError
from train.config import presets, schema
from train.measure import trial
from train.step import losses as losses_lib


@dataclasses.dataclass(frozen=True)
class Steps:
  """The steps of a run at which gradients are recorded.

  Attributes:
    early: Two successive refreshes soon after the start.
    late: Two successive refreshes near the end.
  """

  early: tuple[int, int] = (1, 51)
  late: tuple[int, int] = (250, 300)


def record(
  preset: str, settings: Sequence[str], when: Steps
) -> dict[str, np.ndarray]:
  """Trains a small LLaMA with AdamW and records gradients of its matrices.

  Args:
    preset: Preset of the run.
    settings: Fields that differ from the preset, as for `train.pretrain --set`.
    when: Steps whose gradients are recorded.

  Returns:
    Float32 arrays (layers, m, n). A name is `early.old`, `early.new`,
    `late.old` or `late.new`, then `/` and the path of the matrices.
  """
  last = max(*when.early, *when.late)
  config = schema.override(
    presets.make(preset, "adamw"),
    [*settings, f"train.steps={max(last + 1, 500)}"],
  )
  names = {
    step: f"{stage}.{which}"
    for stage in ("early", "late")
    for which, step in zip(("old", "new"), getattr(when, stage), strict=True)
  }
  recorded: dict[str, np.ndarray] = {}
  with trial.start(config) as run:
    job, state, compiled = run.job, run.state, run.compile_step()
    gradient = jax.jit(jax.grad(_loss(run.setup.abstract.graphdef)))
    for step in range(1, last + 1):
      batch = job.put(next(job.feed))
      if step in names:
        recorded |= _matrices(names[step], gradient(state.params, batch))
      state, _ = compiled(state, batch)
  return recorded


def _loss(graphdef: Any):
  def loss(params: dict, rows: jax.Array) -> jax.Array:
    return losses_lib.token_losses(graphdef, params, rows).mean()

  return loss


def _matrices(prefix: str, grads: dict) -> dict[str, np.ndarray]:
  """The stacked matrices of the blocks, by prefix and path."""
  found = {}
  for keys, x in jax.tree_util.tree_leaves_with_path(grads):
    path = "/".join(str(getattr(k, "key", k)) for k in keys)
    if x.ndim == 3 and path.startswith("layers/"):
      found[f"{prefix}/{path}"] = np.asarray(x, np.float32)
  return found


def load_or_record(
  path: pathlib.Path | None, preset: str, settings: Sequence[str], when: Steps
) -> dict[str, np.ndarray]:
  """Reads gradients from a file, or records them and writes the file.

  Args:
    path: The .npz file; None records the gradients and writes nothing.
    preset: As for `record`.
    settings: As for `record`.
    when: As for `record`.

  Raises:
    UserError: The file exists and cannot be read.
  """
  if path and path.is_file():
    try:
      with np.load(path) as archive:
        return dict(archive)
    except (OSError, ValueError) as error:
      raise UserError(
        f"--gradients {path}: not readable as .npz ({error}); delete it to"
        " record it again"
      ) from None
  recorded = record(preset, settings, when)
  if path:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = dict(recorded)
    np.savez(path, **arrays)
  return recorded


class Synthetic:
  """Matrices of one shape with known singular vectors and values."""

  def __init__(self, m: int, n: int, seed: int = 0):
    """Draws the singular vectors of matrices (m, n), m <= n."""
    draw = np.random.default_rng(seed)
    self.left = _orthonormal(draw, m, m)
    self.right = _orthonormal(draw, n, m)
    self._draw = draw

  def gradient(self, alpha: float) -> np.ndarray:
    """The float32 matrix with singular values i^-alpha."""
    sigma = np.arange(1, len(self.left) + 1) ** -alpha
    return ((self.left * sigma) @ self.right.T).astype(np.float32)

  def stale_basis(self, rank: int, overlap: float = 0.5) -> np.ndarray:
    """A basis with this mean squared cosine to the best one of its rank.

    The default is about what the early refreshes of a run find.
    """
    best, rest = self.left[:, :rank], self.left[:, rank:]
    if rest.shape[1] < rank:
      raise ValueError(
        f"no room for a basis beside the best {rank} directions of"
        f" {len(best)}; use a rank of at most half of them"
      )
    other = rest @ _orthonormal(self._draw, rest.shape[1], rank)
    mixed = np.sqrt(overlap) * best + np.sqrt(1 - overlap) * other
    return mixed.astype(np.float32)


def _orthonormal(draw: np.random.Generator, m: int, n: int) -> np.ndarray:
  q, _ = np.linalg.qr(draw.standard_normal((m, n), np.float32))
  return q
