"""Trains the lanes of a program from start to end; saves, stops, resumes."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from train.common.errors import UserError
from train.config import schema
from train.data import corpus as corpus_lib
from train.experiments import lanes as lanes_lib
from train.experiments.lanes import Program
from train.run import checkpoint
from train.step.state import TrainState


@dataclasses.dataclass
class History:
  """What a record needs of the steps so far; JSON-able.

  Attributes:
    losses: of each step, of each lane.
    scores: pairs of a step and the validation losses of the lanes.
    skips_in_row: most steps in a row that a lane has skipped.
  """

  losses: list[list[float]]
  scores: list[tuple[int, list[float]]]
  skips_in_row: list[int]

  @property
  def step(self) -> int:
    """Number of steps so far."""
    return len(self.losses)


class Training:
  """Lanes that are trained side by side.

  Attributes:
    program: What trains them.
    lanes: How many there are.
    history: What has been measured so far.
  """

  def __init__(
    self,
    program: Program,
    configs: Sequence[schema.Config],
    corpus: corpus_lib.Corpus,
    out: pathlib.Path,
  ):
    """Starts, or restores what was saved in a folder.

    Args:
      program: The program of what the configs have in common.
      configs: The runs.
      corpus: The text that they read.
      out: Folder of the checkpoints.
    """
    self.program, self.lanes = program, len(configs)
    self._config, self._corpus, self._out = configs[0], corpus, out
    self._numbers = lanes_lib.numbers(configs)
    self._seeds = [config.train.seed for config in configs]
    self._identity = _digest(configs)
    self._seconds: list[float] = []  # of each dispatch
    self._state, self.history, positions = self._restore() or (
      program.start(self._numbers),
      History([], [], [0] * self.lanes),
      {},
    )
    self._loaders = {
      seed: corpus.loader(seed, state=positions.get(str(seed)))
      for seed in dict.fromkeys(self._seeds)
    }
    keep = configs[0].run.keep
    self._checkpoints = checkpoint.Checkpoints(out, keep)

  def close(self) -> None:
    """Ends the background work."""
    for loader in self._loaders.values():
      loader.close()
    self._checkpoints.close()

  def run(self, stopped: Callable[[], bool]) -> bool:
    """Trains to the end; returns False after a stop, with all saved."""
    steps = self._config.train.steps
    if not self.history.scores:
      self._evaluate()
    while self.history.step < steps and not self._all_diverged():
      if stopped():
        self._save()
        return False
      self._advance()
      self._do_what_is_due()
    return True

  def _all_diverged(self) -> bool:
    return min(self.history.skips_in_row) >= self._config.train.max_skips

  def _advance(self) -> None:
    """Makes the steps of one dispatch."""
    begin = time.perf_counter()
    rows = np.stack([self._rows() for _ in range(self.program.chunk)])
    self._state, metrics = self.program.advance(
      self._state, self._numbers, rows
    )
    found = jax.device_get((metrics["loss"], metrics["skips_in_row"]))
    losses, skips = (np.reshape(x, (-1, self.lanes)) for x in found)
    self.history.losses += losses.astype(float).tolist()
    worst = np.maximum(self.history.skips_in_row, skips.max(axis=0))
    self.history.skips_in_row = worst.tolist()
    self._seconds.append(time.perf_counter() - begin)

  def _rows(self) -> np.ndarray:
    """The rows of a step: (B, T + 1), or (lanes, B, T + 1)."""
    by_seed = {seed: next(loader) for seed, loader in self._loaders.items()}
    rows = [by_seed[seed] for seed in self._seeds]
    return np.stack(rows) if self.lanes > 1 else rows[0]

  def _do_what_is_due(self) -> None:
    step, run = self.history.step, self._config.run
    if step % run.eval_every == 0 or step == self._config.train.steps:
      self._evaluate()
    before = step - self.program.chunk
    if step // run.checkpoint_every > before // run.checkpoint_every:
      self._save()

  def _evaluate(self) -> None:
    losses = self.losses_on(self._corpus.held_out)
    self.history.scores.append((self.history.step, losses))

  def losses_on(self, rows: np.ndarray) -> list[float]:
    """The mean loss in nats a token of each lane on rows (N, T + 1)."""
    sums = [
      self.program.evaluate(self._state.params, batch)
      for batch in corpus_lib.evaluation_batches(rows, self._config.data.batch)
    ]
    totals = np.asarray(jax.device_get(sums), np.float64)
    totals = totals.reshape(len(sums), 2, self.lanes).sum(axis=0)
    return (totals[0] / totals[1]).tolist()

  def state_of(self, lane: int) -> TrainState:
    """The training state of a lane."""
    if self.lanes == 1:
      return self._state
    step, *others = self._state
    return TrainState(step, *jax.tree.map(lambda x: x[lane], others))

  def tokens_per_second(self) -> float:
    """Tokens that all lanes read in a second of their median dispatch."""
    data = self._config.data
    tokens = self.lanes * self.program.chunk * data.batch * data.length
    return tokens / statistics.median(self._seconds or [float("inf")])

  def _save(self) -> None:
    saved = {
      "runs": self._identity,
      "history": dataclasses.asdict(self.history),
      "positions": {str(s): x.state() for s, x in self._loaders.items()},
    }
    progress = checkpoint.Progress(sum(self._seconds), saved)
    self._checkpoints.save(self._state, progress)

  def _restore(self) -> tuple[TrainState, History, dict[str, Any]] | None:
    """What was saved; what is damaged, or of other runs, is removed."""
    with contextlib.suppress(UserError):  # none of them can be read
      found = checkpoint.restore(self._out, self.program.state)
      if found and found[1].data["runs"] == self._identity:
        saved = found[1].data
        history = History(**saved["history"])
        return found[0], history, saved["positions"]
    shutil.rmtree(self._out / checkpoint.FOLDER, ignore_errors=True)
    return None


def _digest(configs: Sequence[schema.Config]) -> str:
  """A digest of all settings of some runs."""
  text = json.dumps([schema.flatten(config) for config in configs], default=str)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
