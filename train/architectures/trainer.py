"""What a file of this folder gives to the loop: how one model is trained."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Batch = Mapping[str, Any]  # of arrays: NumPy's, and JAX's within a program
State = Any  # what the library of the model keeps: a TrainState, a pair, ...


class Trainer(NamedTuple):
  """The functions of a model and its optimizer.

  Attributes:
    start: From a seed to the state before the first step.
    step: From state and batch to the next state and the loss. It may reuse the
      memory of the state that it is given.
    evaluate: From state and batch to means over the batch: `loss`, by which
      rates are chosen, and others that are reported.
    params: The parameters in a state.
    opt_state: The optimizer's state in a state.
    sample: From state and seed to images (n, 28, 28), if it can make some.
  """

  start: Callable[[int], State]
  step: Callable[[State, Batch], tuple[State, jax.Array]]
  evaluate: Callable[[State, Batch], dict[str, jax.Array]]
  params: Callable[[State], Any]
  opt_state: Callable[[State], Any]
  sample: Callable[[State, int], np.ndarray] | None = None


class Data(NamedTuple):
  """Batches of three parts that have no example in common.

  Attributes:
    batches: From a seed to endless training batches.
    validation: Batches of one size that decide about rates.
    test: Batches of one size that are only reported on.
  """

  batches: Callable[[int], Iterator[Batch]]
  validation: list[Batch]
  test: list[Batch]
