"""The held-out loss of a run, beside that of a model of frequencies."""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np

from train import data
from train import step as steps
from train.job import Job


def evaluate(
  job: Job, state: steps.TrainState, say: Callable[[str], None]
) -> float:
  """Says and logs how well held-out text is predicted.

  Returns:
    The mean loss in nats a token, whose exponential is the perplexity.
  """
  config, held_out = job.config.data, job.corpus.held_out
  sums = []
  for rows in data.evaluation_batches(held_out, config.batch, *job.part):
    sums.append(job.eval_step(state.params, job.put(rows)))
  total, count = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
  loss, step = total / count, int(jax.device_get(state.step))
  perplexity = math.exp(min(loss, 700))
  known = unigram(job)
  say(
    f"step {step:>5}  held-out loss {loss:.4f}, perplexity {perplexity:,.2f}"
    f"  (unigram model {known:,.2f})"
  )
  job.log.write(
    step,
    held_out_loss=loss,
    held_out_perplexity=perplexity,
    unigram_perplexity=known,
  )
  return loss


@functools.cache
def unigram(job: Job) -> float:
  """Held-out perplexity of token frequencies, on the rows `evaluate` reads."""
  corpus = job.corpus
  return data.unigram_perplexity(corpus.counts, corpus.held_out[:, 1:])
