"""Gradients to find bases of: recorded from a run, and with known spectra."""

import contextlib
import dataclasses
import io
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from train.common.errors import UserError
from train.config import presets, schema
from train.data import corpus as corpus_lib
from train.parallel import mesh as mesh_lib
from train.run import job as job_lib
from train.run import loop, run_dir
from train.step import setup as setup_lib
from train.step import train_step


@dataclasses.dataclass(frozen=True)
class Moments:
  """The steps of a run at which gradients are recorded.

  Attributes:
    early: a refresh soon after the start, and the one before it.
    late: two refreshes in a row near the end.
  """

  early: tuple[int, int] = (1, 51)
  late: tuple[int, int] = (250, 300)


def record(
  preset: str, settings: Sequence[str], when: Moments
) -> dict[str, np.ndarray]:
  """Trains a small LLaMA with AdamW and keeps gradients of its matrices.

  Args:
    preset: of the run.
    settings: fields that differ from the preset, as for `train.pretrain`.
    when: steps after which the gradients are taken.

  Returns:
    `early.old`, `early.new`, `late.old` and `late.new`, each before the path
    of a stack of matrices, to a float32 array (layers, m, n).
  """
  last = max(*when.early, *when.late)
  config = schema.override(
    presets.make(preset, "adamw"),
    [*settings, f"train.steps={max(last + 1, 500)}"],
  )
  wanted = {
    step: f"{name}.{which}"
    for name in ("early", "late")
    for which, step in zip(("old", "new"), getattr(when, name), strict=True)
  }
  found: dict[str, np.ndarray] = {}
  mesh = mesh_lib.make_mesh(config.mesh, config.data.batch)
  corpus = corpus_lib.prepare(config.data, config.model.vocab_size)
  with tempfile.TemporaryDirectory() as name, jax.set_mesh(mesh):
    out = pathlib.Path(name)
    run_dir.write_config(out, config, overwrite=False)
    with contextlib.redirect_stdout(io.StringIO()):
      setup = setup_lib.make(config.model, config.optimizer, config.train, mesh)
      job, state = job_lib.prepare(config, out, corpus, setup)
      compiled = loop.compile_step(job, state)
    gradient = jax.jit(jax.grad(_loss(setup.placed.graphdef)))
    with contextlib.closing(job):
      for step in range(1, last + 1):
        batch = job.put(next(job.feed))
        if step in wanted:
          grads = gradient(state.params, batch)
          found |= _matrices(wanted[step], grads)
        state, _ = compiled(state, batch)
  return found


def _loss(graphdef: Any):
  def loss(params: dict, rows: jax.Array) -> jax.Array:
    return train_step.token_losses(graphdef, params, rows).mean()

  return loss


def _matrices(prefix: str, grads: dict) -> dict[str, np.ndarray]:
  """The stacked matrices of the blocks, by path."""
  found = {}
  for keys, x in jax.tree_util.tree_leaves_with_path(grads):
    path = "/".join(str(getattr(k, "key", k)) for k in keys)
    if x.ndim == 3 and path.startswith("layers/"):
      found[f"{prefix}/{path}"] = np.asarray(x, np.float32)
  return found


def load_or_record(
  path: pathlib.Path | None, preset: str, settings: Sequence[str], when: Moments
) -> dict[str, np.ndarray]:
  """Gradients from a file, or from a run, and then kept in that file."""
  if path and path.is_file():
    try:
      with np.load(path) as kept:
        return dict(kept)
    except (OSError, ValueError) as error:
      raise UserError(
        f"--gradients {path}: not readable as .npz ({error}); delete it to"
        " record it anew"
      ) from None
  found = record(preset, settings, when)
  if path:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = dict(found)
    np.savez(path, **arrays)
  return found


class Synthetic:
  """Matrices of one shape whose singular vectors and values are known."""

  def __init__(self, m: int, n: int, seed: int = 0):
    """Draws singular vectors for m <= n."""
    draw = np.random.default_rng(seed)
    self.left = _orthonormal(draw, m, m)
    self.right = _orthonormal(draw, n, m)
    self._draw = draw

  def gradient(self, alpha: float) -> np.ndarray:
    """The matrix with singular values i^-alpha, float32."""
    sigma = np.arange(1, len(self.left) + 1) ** -alpha
    return ((self.left * sigma) @ self.right.T).astype(np.float32)

  def stale_basis(self, rank: int, overlap: float = 0.5) -> np.ndarray:
    """A basis with this mean squared cosine to the best one of a rank.

    So far does a basis turn between two refreshes early in a run.
    """
    best, rest = self.left[:, :rank], self.left[:, rank:]
    if rest.shape[1] < rank:
      raise ValueError(f"no room for a basis beside the best {rank} directions")
    turned = rest @ _orthonormal(self._draw, rest.shape[1], rank)
    mixed = np.sqrt(overlap) * best + np.sqrt(1 - overlap) * turned
    return mixed.astype(np.float32)


def _orthonormal(draw: np.random.Generator, m: int, n: int) -> np.ndarray:
  q, _ = np.linalg.qr(draw.standard_normal((m, n), np.float32))
  return q
