"""The held-out loss of a run, beside that of a model of frequencies."""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np

from train import data
from train import mesh as meshes
from train import step as steps
from train.job import Job


def evaluate(
  job: Job, state: steps.TrainState, say: Callable[[str], None]
) -> float:
  """Held-out perplexity, said and logged: exp of the mean loss a token."""
  config, held_out = job.config.data, job.corpus.held_out
  sums = [
    job.eval_step(
      state.params,
      meshes.put_batch(rows, job.sharding),
      meshes.put_batch(weights, job.sharding),
    )
    for rows, weights in data.evaluation_batches(
      held_out, config.batch, config.eval_rows
    )
  ]
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
  return perplexity


@functools.cache
def unigram(job: Job) -> float:
  """Held-out perplexity of token frequencies, on the rows `evaluate` reads."""
  config = job.config
  rows = data.evaluation_rows(job.corpus.held_out, config.data.eval_rows)
  return data.unigram_perplexity(
    job.corpus.train, rows[:, 1:], config.model.vocab_size
  )
