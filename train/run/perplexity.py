"""The held-out loss of a run, beside that of a model of frequencies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import numpy as np

from train.data import corpus as corpus_lib
from train.run import metrics
from train.step import train_step

if TYPE_CHECKING:
  from train.run.job import Job


def evaluate(
  job: Job, state: train_step.TrainState, say: Callable[[str], None]
) -> float:
  """Says and logs how well held-out text is predicted.

  Returns:
    The mean loss in nats a token, whose exponential is the perplexity.
  """
  config, held_out = job.config.data, job.corpus.held_out
  sums = []
  for rows in corpus_lib.evaluation_batches(held_out, config.batch, *job.part):
    sums.append(job.eval_step(state.params, job.put(rows)))
  totals, counts = np.asarray(jax.device_get(sums), np.float64).T.tolist()
  found = metrics.held_out(totals, counts, job.corpus.held_out_bytes)
  found["unigram_perplexity"] = unigram(job)
  step = int(jax.device_get(state.step))
  say(f"step {step:>5}  {metrics.held_out_text(found)}")
  if step == 0:
    known = found["unigram_perplexity"]
    say(f"            perplexity of token frequencies (unigram): {known:,.0f}")
  job.log.write(step, **found)
  return found["held_out_loss"]


@functools.cache
def unigram(job: Job) -> float:
  """Held-out perplexity of token frequencies, on the rows `evaluate` reads."""
  corpus = job.corpus
  return corpus_lib.unigram_perplexity(corpus.counts, corpus.held_out[:, 1:])
