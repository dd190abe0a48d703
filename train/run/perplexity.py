"""The held-out loss of a run, beside that of a unigram model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from train.data import corpus as corpus_lib
from train.run import metrics
from train.step import state as state_lib


@dataclasses.dataclass
class Evaluator:
  """Measures how well a model predicts held-out text.

  Attributes:
    corpus: whose held-out rows are evaluated.
    batch: rows in a batch.
    part: which part of each batch this process evaluates, of how many.
    eval_step: summed loss and token count of parameters and rows.
    put: moves this process's rows to its devices.
    log: gets the figures.
  """

  corpus: corpus_lib.Corpus
  batch: int
  part: tuple[int, int]
  eval_step: Callable
  put: Callable[[np.ndarray], Any]
  log: metrics.Log

  def __post_init__(self):
    self._unigram: float | None = None

  def __call__(
    self, state: state_lib.TrainState, say: Callable[[str], None]
  ) -> float:
    """Reports and logs the perplexity on held-out text.

    Returns:
      The mean loss in nats a token; its exponential is the perplexity.
    """
    sums = [
      self.eval_step(state.params, self.put(rows))
      for rows in corpus_lib.evaluation_batches(
        self.corpus.held_out, self.batch, *self.part
      )
    ]
    losses, counts = np.asarray(jax.device_get(sums), np.float64).T.tolist()
    figures = metrics.held_out(losses, counts, self.corpus.held_out_bytes)
    unigram = figures["unigram_perplexity"] = self.unigram_perplexity()
    step = int(jax.device_get(state.step))
    say(f"step {step:>5}  {metrics.held_out_text(figures)}")
    if step == 0:
      say(f"            a unigram model's perplexity: {unigram:,.0f}")
    self.log.write(step, **figures)
    return figures["held_out_loss"]

  def unigram_perplexity(self) -> float:
    """Perplexity of the token frequencies on the same held-out rows."""
    if self._unigram is None:
      targets = self.corpus.held_out[:, 1:]
      self._unigram = corpus_lib.unigram_perplexity(self.corpus.counts, targets)
    return self._unigram
